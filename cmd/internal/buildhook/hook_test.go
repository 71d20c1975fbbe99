package buildhook

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"

	"nixdispatch/cmd/internal/daemonsocket"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/hookcall"
)

func replyWith(action dispatchv1.Reply_Action, reason string, warn bool) *dispatchv1.HookResponse {
	return &dispatchv1.HookResponse{Message: &dispatchv1.HookResponse_Reply{Reply: &dispatchv1.Reply{
		Action: action, Reason: reason, Warn: warn, MachineName: "ssh://mac", BuildId: 1,
	}}}
}

func event(ev *dispatchv1.BuildEvent) *dispatchv1.HookResponse {
	return &dispatchv1.HookResponse{Message: &dispatchv1.HookResponse_Event{Event: ev}}
}

func finished(s dispatchv1.BuildStatus, machine, text string) *dispatchv1.HookResponse {
	return event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Finished{
		Finished: &dispatchv1.Finished{Status: s, Machine: machine, Error: text}}})
}

func logged(text string) *dispatchv1.HookResponse {
	return event(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Log{Log: &dispatchv1.Log{Data: []byte(text)}}})
}

// answering makes a daemon that answers every question with the same reply.
func answering(t testing.TB, reply *dispatchv1.HookResponse) *fakeDaemon {
	return (&fakeDaemon{hook: func(s hookStream) error {
		for {
			req, err := s.Recv()
			if err != nil {
				return nil
			}
			if req.GetTry() != nil {
				if err := s.Send(reply); err != nil {
					return err
				}
			}
		}
	}}).start(t)
}

// building makes a daemon that accepts, reads Start, and goes on with then.
func building(t testing.TB, then func(s hookStream, start *dispatchv1.Start) error) *fakeDaemon {
	return (&fakeDaemon{hook: func(s hookStream) error {
		for {
			req, err := s.Recv()
			switch {
			case err != nil:
				return nil
			case req.GetTry() != nil:
				s.Send(replyWith(dispatchv1.Reply_ACTION_ACCEPT, "", false))
			case req.GetStart() != nil:
				return then(s, req.GetStart())
			}
		}
	}}).start(t)
}

func TestHookPassesOnTheDaemonsReply(t *testing.T) {
	const reason = "because of \x1b[31mred\x1b[0m"
	for _, tt := range []struct {
		action dispatchv1.Reply_Action
		warn   bool
		want   string
		said   string // at level warn
	}{
		{dispatchv1.Reply_ACTION_DECLINE, false, "decline", ""},
		{dispatchv1.Reply_ACTION_DECLINE, true, "decline", "warning: because of red"},
		{dispatchv1.Reply_ACTION_DECLINE_PERMANENTLY, false, "decline-permanently", ""},
		{dispatchv1.Reply_ACTION_POSTPONE, false, "postpone", ""},
		{dispatchv1.Reply_ACTION_POSTPONE, true, "postpone", "warning: because of red"},
	} {
		t.Run(fmt.Sprintf("%v warn=%v", tt.action, tt.warn), func(t *testing.T) {
			t.Parallel()
			d := answering(t, replyWith(tt.action, reason, tt.warn))
			n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
			for range 3 {
				n.messages = nil
				if got, _ := n.try(testSystem, true); got != tt.want {
					t.Fatalf("reply = %q, want %q", got, tt.want)
				}
				if got := n.said(1); got != tt.said {
					t.Errorf("said %q, want %q", got, tt.said)
				}
			}
			n.stdin.Close()
			if got := n.wait(); got != 0 {
				t.Errorf("exit status = %d, want 0", got)
			}
		})
	}
}

func TestHookForwardsOnlyWhatTheDaemonNeeds(t *testing.T) {
	var got [2]*dispatchv1.HookRequest
	d := (&fakeDaemon{hook: func(s hookStream) (err error) {
		for i := range got {
			if got[i], err = s.Recv(); err != nil {
				return err
			}
		}
		return s.Send(replyWith(dispatchv1.Reply_ACTION_DECLINE, "", false))
	}}).start(t)
	settings := testSettings()
	settings["builders-use-substitutes"] = "true"
	settings["max-build-log-size"] = "99"
	n := newFakeNix(t, settings, daemonsocket.Env+"="+d.socket)
	n.try("riscv64-linux", true, "big-parallel", "kvm")
	want := [2]*dispatchv1.HookRequest{
		{Message: &dispatchv1.HookRequest_Hello{Hello: &dispatchv1.Hello{
			Builders: "@/etc/nix/machines", BuildersUseSubstitutes: true, Store: "auto",
			Environment:  []string{"NIX_STORE_DIR=" + n.storeDir},
			LocalSystems: []string{testSystem, "i686-linux"}, LocalFeatures: []string{"benchmark", "kvm"}, MaxJobs: 4,
			Limits: &dispatchv1.Limits{
				Timeout: durationpb.New(time.Minute), MaxSilentTime: durationpb.New(7 * time.Second), MaxLogSize: 99,
			},
		}}},
		{Message: &dispatchv1.HookRequest_Try{Try: &dispatchv1.Try{
			AmWilling: true, System: "riscv64-linux", DrvPath: string(n.drv), RequiredFeatures: []string{"big-parallel", "kvm"},
		}}},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("requests (-want +got):\n%s", diff)
	}
}

func TestHookRefusesForGoodWithoutBuilders(t *testing.T) {
	settings := testSettings()
	settings["builders"] = " \n"
	n := newFakeNix(t, settings, daemonsocket.Env+"=/nonexistent/socket")
	if got, _ := n.try(testSystem, true); got != "decline-permanently" {
		t.Fatalf("reply = %q", got)
	}
	n.stdin.Close()
	if status := n.wait(); status != 0 || len(n.messages) > 0 {
		t.Errorf("exit status %d, said %v; want silence", status, n.messages)
	}
}

func TestHookBuilds(t *testing.T) {
	started := make(chan *dispatchv1.Start, 1)
	log := strings.Repeat("line of the log\n", 20000) // more than pipes hold
	d := building(t, func(s hookStream, start *dispatchv1.Start) error {
		started <- start
		for part := range strings.SplitAfterSeq(log, "999") {
			s.Send(logged(part))
		}
		return s.Send(finished(dispatchv1.BuildStatus_BUILD_STATUS_BUILT, "ssh://mac", ""))
	})
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	reply, machine := n.try(testSystem, true)
	if reply != "accept" || machine != "ssh://mac" {
		t.Fatalf("reply = %q %q", reply, machine)
	}
	input := n.output("2d1qmlv2ixdxvsazmkg3aj2jh4ajx4m7-input")
	n.begin(input)
	if status := n.wait(); status != 0 {
		t.Errorf("exit status = %d; said %q", status, n.said(9))
	}
	want := &dispatchv1.Start{Inputs: []string{input}, WantedOutputs: []string{"out", "doc"}}
	if diff := cmp.Diff(want, <-started, protocmp.Transform()); diff != "" {
		t.Errorf("start (-want +got):\n%s", diff)
	}
	if string(n.log) != log {
		t.Errorf("log has %d bytes, want %d", len(n.log), len(log))
	}
}

func TestHookTellsWhyABuildFailed(t *testing.T) {
	for _, tt := range []struct {
		status dispatchv1.BuildStatus
		text   string
		exit   int
		want   string
	}{
		{dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE, "builder failed with exit code 1\x1b[2J\n", 100, "builder failed with exit code 1"},
		{dispatchv1.BuildStatus_BUILD_STATUS_OUTPUT_REJECTED, "hash mismatch", 100, "hash mismatch"},
		{dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT, "timed out after 60 seconds", 101, "timed out after 60 seconds"},
		{dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE, "two\nlines", 1, "two\nlines"},
		{dispatchv1.BuildStatus_BUILD_STATUS_TRANSIENT_FAILURE, "", 1, "transient failure"},
	} {
		t.Run(tt.status.String(), func(t *testing.T) {
			t.Parallel()
			d := building(t, func(s hookStream, _ *dispatchv1.Start) error {
				s.Send(logged("last words\n"))
				return s.Send(finished(tt.status, "ssh://other", tt.text))
			})
			n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
			n.try(testSystem, true)
			n.begin()
			if got := n.wait(); got != tt.exit {
				t.Errorf("exit status = %d, want %d", got, tt.exit)
			}
			want := fmt.Sprintf("error: build of '%s' on 'ssh://other' failed: %s", n.drv, tt.want)
			if got := n.said(0); got != want {
				t.Errorf("said %q, want %q", got, want)
			}
			if string(n.log) != "last words\n" {
				t.Errorf("log = %q", n.log)
			}
		})
	}
}

func TestHookEndsTheCallWhenNixKillsIt(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan struct{})
	d := building(t, func(s hookStream, _ *dispatchv1.Start) error {
		close(begun)
		<-s.Context().Done()
		close(ended)
		return nil
	})
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	n.try(testSystem, true)
	n.begin()
	<-begun
	n.kill()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("the daemon still thinks somebody waits")
	}
}

func TestHookLosesNoLogWhenNixReadsSlowly(t *testing.T) {
	const lines = 10000
	sent := make(chan struct{})
	d := building(t, func(s hookStream, _ *dispatchv1.Start) error {
		for i := range lines {
			if i == lines/2 {
				close(sent)
			}
			if err := s.Send(logged(fmt.Sprintf("line %400d\n", i))); err != nil {
				return err
			}
		}
		return s.Send(finished(dispatchv1.BuildStatus_BUILD_STATUS_BUILT, "", ""))
	})
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	n.mu.Lock() // keeps the log's reader waiting
	n.try(testSystem, true)
	n.begin()
	select {
	case <-sent:
		t.Error("the daemon could send everything though nobody read")
	case <-time.After(300 * time.Millisecond):
	}
	n.mu.Unlock()
	if status := n.wait(); status != 0 {
		t.Errorf("exit status = %d", status)
	}
	if got := strings.Count(string(n.log), "\n"); got != lines {
		t.Errorf("%d lines of the log came, want %d", got, lines)
	}
}

func TestHookDeclinesEverythingAfterAPanic(t *testing.T) {
	h := &hookProcess{} // without settings
	d := h.decide(nil)
	if d.action != hookcall.Decline || !d.warn || !h.broken {
		t.Errorf("decision = %+v, broken = %v", d, h.broken)
	}
	if d = h.decide(nil); d.action != hookcall.Decline || d.warn {
		t.Errorf("second decision = %+v", d)
	}
}

func TestHookDeclinesWhatItCannotRead(t *testing.T) {
	for name, send := range map[string]func(n *fakeNix){
		"oversize setting": func(n *fakeNix) {
			n.w.Bool(true)
			n.w.String("builders")
			n.w.Uint64(1 << 40)
		},
		"path outside a store": func(n *fakeNix) {
			n.sendSettings()
			n.w.String("try")
			n.w.Bool(true)
			n.w.String(testSystem)
			n.w.String("../../etc/shadow")
			n.w.Strings(nil)
		},
		"bad setting": func(n *fakeNix) {
			n.settings["max-jobs"] = "many"
			n.sendSettings()
			n.w.String("try")
			n.w.Bool(true)
			n.w.String(testSystem)
			n.w.StorePath(n.drv)
			n.w.Strings(nil)
		},
		"endless features": func(n *fakeNix) {
			n.sendSettings()
			n.w.String("try")
			n.w.Bool(true)
			n.w.String(testSystem)
			n.w.StorePath(n.drv)
			n.w.Uint64(1 << 62)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newFakeNix(t, testSettings(), daemonsocket.Env+"=/nonexistent/socket")
			send(n)
			n.w.Flush()
			if got := n.reply(); got != "decline" {
				t.Errorf("reply = %q, want decline", got)
			}
			n.stdin.Close()
			if status := n.wait(); status != 1 || !strings.Contains(n.said(1), "nix-dispatch hook: ") {
				t.Errorf("exit status = %d, said %q", status, n.said(1))
			}
		})
	}
}

func TestHookLeavesDescriptorsClosed(t *testing.T) {
	d := building(t, func(s hookStream, _ *dispatchv1.Start) error {
		s.Send(logged("x"))
		<-s.Context().Done()
		return nil
	})
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	n.try(testSystem, true)
	n.begin()
	for len(n.copyLog()) == 0 {
		time.Sleep(time.Millisecond)
	}
	dir := fmt.Sprintf("/proc/%d/fd/", n.cmd.Process.Pid)
	log, err := os.Readlink(dir + "4")
	if err != nil {
		t.Fatal(err)
	}
	if read, err := os.Readlink(dir + "5"); err == nil && read == log {
		t.Error("descriptor 5 is still the log after acceptance")
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/4", n.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(info), "flags:\t02") { // O_CLOEXEC = 02000000
		t.Errorf("descriptor 4 would be inherited:\n%s", info)
	}
}

func (n *fakeNix) copyLog() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return string(n.log)
}

func TestHookExplainsItself(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "--help")
	cmd.Env = append(os.Environ(), asHookEnv+"=1")
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != usage {
		t.Errorf("%v, output %q", err, out)
	}
}
