package buildhook

import (
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"nixdispatch/cmd/internal/daemonsocket"
	"nixdispatch/proto/dispatch/dispatchtest"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestHookWithoutADaemonLeavesLocalBuildsToNix(t *testing.T) {
	hung, connections := dispatchtest.Silent(t)
	for name, socket := range map[string]string{"missing": "/nonexistent/socket", "hung": hung} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+socket, hookPatienceEnv+"=1h", hookAnswerEnv+"=300ms", hookAskAgainEnv+"=1h")
			for _, system := range []string{testSystem, "i686-linux", "builtin", testSystem} {
				if got, _ := n.try(system, false, "kvm"); got != "decline" {
					t.Errorf("%s: reply = %q, want decline", system, got)
				}
			}
			if said := n.said(1); strings.Count(said, "out of reach") != 1 {
				t.Errorf("said %q, want one warning", said)
			}
			for _, system := range []string{"riscv64-linux", "aarch64-linux"} {
				if got, _ := n.try(system, false); got != "postpone" {
					t.Errorf("%s: reply = %q, want postpone", system, got)
				}
			}
			if got, _ := n.try(testSystem, true, "nixos-test"); got != "postpone" {
				t.Errorf("with a feature missing here: reply = %q, want postpone", got)
			}
			n.stdin.Close()
			if status := n.wait(); status != 0 {
				t.Errorf("exit status = %d", status)
			}
		})
	}
	if got := connections.Load(); got != 1 {
		t.Errorf("the hung daemon was asked %d times, want once", got)
	}
}

func TestHookAnswersWithinASecondWithoutADaemon(t *testing.T) {
	hung, _ := dispatchtest.Silent(t)
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+hung, hookAnswerEnv+"=")
	start := time.Now()
	if got, _ := n.try(testSystem, false); got != "decline" {
		t.Errorf("reply = %q, want decline", got)
	}
	// Far from the bound: the machine may be busy.
	if took := time.Since(start); took < 900*time.Millisecond || took > time.Minute {
		t.Errorf("the answer took %v, want about 1s", took)
	}
}

func TestHookPostponesWhileTheDaemonRestarts(t *testing.T) {
	d := (&fakeDaemon{hook: func(s hookStream) error {
		s.Recv()
		return status.Error(codes.Unavailable, "shutting down")
	}}).start(t)
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	for range 2 {
		if got, _ := n.try(testSystem, true); got != "postpone" {
			t.Errorf("reply = %q, want postpone", got)
		}
	}
	if said := n.said(1); strings.Count(said, "restarting: shutting down") != 1 {
		t.Errorf("said %q, want one warning", said)
	}
}

func TestHookAsksARestartedDaemonAnew(t *testing.T) {
	var calls atomic.Int32
	d := (&fakeDaemon{hook: func(s hookStream) error {
		calls.Add(1)
		for range 2 { // Hello and one Try
			if _, err := s.Recv(); err != nil {
				return err
			}
		}
		s.Send(replyWith(dispatchv1.Reply_ACTION_DECLINE, "", false))
		return status.Error(codes.Unavailable, "shutting down")
	}}).start(t)
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	for range 3 {
		if got, _ := n.try(testSystem, true); got != "decline" {
			t.Errorf("reply = %q, want that of the daemon's next life", got)
		}
	}
	if got := calls.Load(); got != 3 {
		t.Errorf("%d calls, want 3", got)
	}
}

func TestHooksOfOneNixTellEachOtherOfAnOutage(t *testing.T) {
	state := t.TempDir()
	stock := stockScript(t, "printf '# accept\\nstock://machine\\n' >&2; cat >/dev/null")
	ended := filepath.Join(state, "outage-999999999-1")
	if err := os.WriteFile(ended, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	start := func(socket, patience, askAgain string) *fakeNix {
		return newFakeNix(t, testSettings(), hookStateEnv+"="+state, stockHookEnv+"="+stock,
			daemonsocket.Env+"="+socket, hookPatienceEnv+"="+patience, hookAskAgainEnv+"="+askAgain)
	}
	steps := []struct {
		patience, reply, said string
	}{
		{"1h", "postpone", "out of reach"},
		{"1ns", "accept", "using Nix's own build hook"}, // has waited long enough already
		{"1ns", "accept", ""},
	}
	for i, step := range steps {
		n := start("/nonexistent/socket", step.patience, "1h")
		if got, _ := n.try("riscv64-linux", false); got != step.reply {
			t.Errorf("hook %d: reply = %q, want %q", i, got, step.reply)
		}
		n.stdin.Close()
		n.wait()
		said := n.said(1)
		if strings.Count(said, "nix-dispatch:") != min(1, len(step.said)) || !strings.Contains(said, step.said) {
			t.Errorf("hook %d: said %q, want only %q", i, said, step.said)
		}
	}
	if _, err := os.Stat(ended); !os.IsNotExist(err) {
		t.Errorf("what a process that has ended left is still there: %v", err)
	}
	d := answering(t, replyWith(dispatchv1.Reply_ACTION_DECLINE, "", false))
	for i, socket := range []string{d.socket, "/nonexistent/socket"} {
		n := start(socket, "1ns", "1ns")
		n.try(testSystem, false)
		n.stdin.Close()
		n.wait()
		if told := strings.Contains(n.said(1), "out of reach"); told != (i == 1) {
			t.Errorf("after the daemon's return, hook %d: said %q; want a new outage told, no old one", i, n.said(1))
		}
	}
}

func TestOutageMemoryIgnoresWhatItCannotUse(t *testing.T) {
	file := filepath.Join(t.TempDir(), "outage-1-1")
	for _, text := range []string{"", "x", "12", "12 perhaps", "99999999999999999999 true"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		m := outageMemory{dir: filepath.Dir(file), file: file}
		if got := m.recall(); got != (outage{}) {
			t.Errorf("%q: recalled %+v", text, got)
		}
	}
	m := outageMemory{dir: filepath.Dir(file), file: file}
	m.keep(outage{began: time.Now(), stockTold: true})
	if got := m.recall(); got.began.IsZero() || !got.stockTold || !got.heard {
		t.Errorf("recalled %+v, want what was kept", got)
	}
	long := time.Now().Add(-2 * outageMemoryAge)
	if err := os.Chtimes(file, long, long); err != nil {
		t.Fatal(err)
	}
	if got := m.recall(); got != (outage{}) {
		t.Errorf("recalled %+v of long ago", got)
	}
	m.forget()
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("forgotten, but there: %v", err)
	}
	(&outageMemory{}).keep(outage{began: time.Now()}) // nowhere
	blocked := outageMemory{dir: filepath.Join(file, "x"), file: filepath.Join(file, "x", "outage-1-1")}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	blocked.keep(outage{began: time.Now()})
	if got := blocked.recall(); got != (outage{}) {
		t.Errorf("recalled %+v from a place that cannot be", got)
	}
}
