package daemon

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix/hook"
)

const (
	accept    = dispatchv1.Reply_ACTION_ACCEPT
	decline   = dispatchv1.Reply_ACTION_DECLINE
	postpone  = dispatchv1.Reply_ACTION_POSTPONE
	stock     = dispatchv1.Reply_ACTION_STOCK
	permanent = dispatchv1.Reply_ACTION_DECLINE_PERMANENTLY
)

// locally makes the hook's Nix one that could build for this host itself.
func locally(h *dispatchv1.Hello) {
	h.MaxJobs, h.LocalSystems, h.LocalFeatures = 1, []string{nixSystem()}, []string{"kvm"}
}

func wantReply(t *testing.T, got *dispatchv1.Reply, want dispatchv1.Reply_Action, reason string) {
	t.Helper()
	if got.GetAction() != want || !strings.Contains(got.GetReason(), reason) {
		t.Errorf("reply = %v, want %v because of %q", got, want, reason)
	}
}

func TestHookRepliesWhenSlotsAreFree(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.features, m.mandatory = "kvm", "big"
	m2 := namedMachine("ssh-ng", "m2")
	s := newSite(t, m, m2)
	plain := drvConfig{}
	feature := func(f string) drvConfig { return drvConfig{env: map[string]string{"requiredSystemFeatures": f}} }
	foreign := func(b string) func(*dispatchv1.Hello) {
		return func(h *dispatchv1.Hello) { h.Builders = b }
	}
	store := func(uri string) func(*dispatchv1.Hello) {
		return func(h *dispatchv1.Hello) { h.Store = uri }
	}
	tests := []struct {
		name   string
		hello  func(*dispatchv1.Hello)
		drv    drvConfig
		want   dispatchv1.Reply_Action
		reason string
		// machine is the name in an acceptance; warn is what Reply says.
		machine string
		warn    bool
	}{
		{name: "free slot", drv: plain, want: accept, machine: m2.uri()},
		{name: "free slot wins over a local one", hello: locally, drv: plain, want: accept, machine: m2.uri()},
		{name: "mandatory feature", drv: feature("kvm big"), want: accept, machine: m.uri()},
		{name: "no machine has the system", drv: drvConfig{system: "riscv64-linux"}, want: decline, reason: m.uri(), warn: true},
		{name: "no machine has the feature", drv: feature("benchmark"), want: decline, reason: m2.uri(), warn: true},
		{name: "no machine has it, Nix does", hello: locally, drv: feature("kvm"), want: decline, reason: "kvm"},
		{name: "every machine builds builtin", hello: locally, drv: drvConfig{system: "builtin"}, want: accept, machine: m2.uri()},
		{name: "empty builders", hello: foreign(" \n"), drv: plain, want: permanent, reason: "no machines"},
		{name: "builders with a bad entry", hello: foreign("ssh://other x86_64-linux - many"), drv: plain, want: stock, reason: "max jobs"},
		{name: "builders from a file of the caller's directory", hello: foreign("@machines"), drv: plain, want: stock, reason: "absolute path"},
		{name: "too many builders", hello: foreign(strings.Repeat("ssh://other;", maxNamedMachines+1)), drv: plain, want: stock, reason: "257 machines"},
		{name: "builders from no file", hello: foreign("@/nonexistent ; # none"), drv: plain, want: permanent, reason: "no machines"},
		{name: "same builders spelt otherwise", hello: func(h *dispatchv1.Hello) {
			h.Builders = " # the list\n" + strings.ReplaceAll(h.Builders, "\n", "  ;  ") + "\n"
		}, drv: plain, want: accept, machine: m2.uri()},
		{name: "foreign store", hello: store("/mnt/root"), drv: plain, want: stock, reason: "/mnt/root"},
		{name: "store by its socket", hello: store("unix://" + s.local.socket), drv: plain, want: accept, machine: m2.uri()},
		{name: "store daemon", hello: store("daemon"), drv: plain, want: accept, machine: m2.uri()},
		{name: "floating output", drv: drvConfig{floating: true}, want: stock, reason: "output paths"},
		{name: "absent derivation", drv: drvConfig{absent: true}, want: stock, reason: "not in the local store"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s.idle()
			h := s.hook(func(hello *dispatchv1.Hello) {
				if tt.hello != nil {
					tt.hello(hello)
				}
			})
			defer h.leave()
			got := h.try(s.drv("thing", tt.drv), false)
			wantReply(t, got, tt.want, tt.reason)
			if got.GetMachineName() != tt.machine || got.GetWarn() != tt.warn || (got.GetBuildId() != 0) != (tt.want == accept) {
				t.Errorf("reply = %v, want machine name %q, warn %v, a build ID only if accepted", got, tt.machine, tt.warn)
			}
		})
	}
}

func TestHookIsToldWhyEachMachineDeclines(t *testing.T) {
	t.Parallel()
	m, m2 := oneMachine("ssh"), namedMachine("ssh", "m2")
	m.mandatory = "big"
	m2.system = "riscv64-linux"
	s := newSite(t, m, m2)
	got := s.hook().try(s.drv("thing", drvConfig{}), false)
	wantReply(t, got, decline, "")
	lines := strings.Split(got.GetReason(), "\n")
	for uri, why := range map[string]string{m.uri(): "big", m2.uri(): "riscv64-linux"} {
		if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, uri) && strings.Contains(l, why) }) {
			t.Errorf("no line tells of %s and %s in:\n%s", uri, why, got.GetReason())
		}
	}
}

func TestUnreadableDerivationsGoToStock(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	garbage := s.path("garbage.drv")
	s.writeDrv(garbage, "Derive(nonsense")
	dynamic := s.path("dynamic.drv")
	s.writeDrv(dynamic, `DrvWithVersion("xp-dyn-drv",[("out","","","")],[],[],"x","y",[],[])`)
	h := s.hook()
	for _, p := range []string{string(garbage), string(dynamic), string(s.source("text")),
		"/nix/store/00000000000000000000000000000001-other.drv", "../../etc/passwd", ""} {
		h.ask(p, false)
		wantReply(t, h.reply(), stock, "")
	}
	// The conversation goes on as if nothing had been.
	wantReply(t, h.try(s.drv("thing", drvConfig{}), false), accept, "")
}

func TestHookRepliesWhenSlotsAreTaken(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.build = untilGone
	s := newSite(t, m)
	busy := s.hook()
	busy.accepted(s.drv("busy", drvConfig{}))
	s.eventually("the slot is taken", func() bool { return m.building() == 1 })

	wantReply(t, s.hook(locally).try(s.drv("shared", drvConfig{}), true), decline, "")
	// One goes ahead to have its inputs there when the slot is free, and one is
	// queued for each slot.
	got := s.hook(locally).try(s.drv("staged", drvConfig{}), false)
	wantReply(t, got, accept, "")
	got2 := s.hook(locally).try(s.drv("queued", drvConfig{}), false)
	wantReply(t, got2, accept, "")
	for _, r := range []*dispatchv1.Reply{got, got2} {
		if r.GetMachineName() != hook.NeutralMachine {
			t.Errorf("machine name = %q while none is free, want %q", r.GetMachineName(), hook.NeutralMachine)
		}
	}
	wantReply(t, s.hook(locally).try(s.drv("postponed", drvConfig{}), false), postpone, "")
	got = s.hook().try(s.drv("never-local", drvConfig{}), true)
	if wantReply(t, got, accept, ""); got.GetMachineName() != hook.NeutralMachine {
		t.Errorf("machine name = %q while none is free, want %q", got.GetMachineName(), hook.NeutralMachine)
	}
	// A build in flight is joined, whatever the slots.
	wantReply(t, s.hook(locally).try(s.recipe(s.findBuild("busy").drvPath), true), accept, "another caller")
}

// findBuild finds a build in flight by its derivation's name.
func (s *site) findBuild(name string) *build {
	s.t.Helper()
	q := s.d.dispatcher
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, b := range q.builds {
		if strings.TrimSuffix(b.drvPath.Name(), ".drv") == name {
			return b
		}
	}
	s.t.Fatalf("no build of %s is in flight", name)
	return nil
}

func TestHookRepliesWhenNoMachineIsUp(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.late = true
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{m},
		options:  func(o *Options) { o.MachineWait = 300 * time.Millisecond },
		prepare:  func(*site) { m.ssh.HangDials(true) },
	})
	// On its first attempt to connect a machine is coming.
	coming := s.hook()
	wantReply(t, coming.try(s.drv("early", drvConfig{}), false), accept, "")
	wantReply(t, s.hook(locally).try(s.drv("local", drvConfig{}), true), decline, "")
	// What could be built locally is not bound to a machine that may not come.
	wantReply(t, s.hook(locally).try(s.drv("local-busy", drvConfig{}), false), postpone, "")
	coming.leave()

	s.stop()
	m2 := oneMachine("ssh")
	m2.late = true
	s = newSiteWith(t, siteConfig{
		machines: []*fakeMachine{m2},
		options:  func(o *Options) { o.MachineWait = 300 * time.Millisecond },
		prepare:  func(*site) { m2.ssh.FailDials(fmt.Errorf("no route to host")) },
	})
	s.eventually("the machine is down", func() bool {
		return s.machineStatus(m2).GetState() == dispatchv1.MachineState_MACHINE_STATE_DOWN
	})
	if got := s.machineStatus(m2).GetReason(); !strings.Contains(got, "no route to host") {
		t.Errorf("reason of the machine that is down = %q", got)
	}
	wantReply(t, s.hook(locally).try(s.drv("local", drvConfig{}), false), decline, "")
	h := s.hook()
	h.accepted(s.drv("stranded", drvConfig{}))
	st := h.finish()
	st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE)
	for _, want := range []string{m2.uri(), "no route to host", "300ms"} {
		if !strings.Contains(st.finished.GetError(), want) {
			t.Errorf("error %q does not tell %q", st.finished.GetError(), want)
		}
	}
}

func TestStrandedBuildIsTakenWhenAMachineComesBack(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	m.late = true
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{m},
		prepare:  func(*site) { m.ssh.FailDials(fmt.Errorf("no route to host")) },
	})
	s.eventually("the machine is down", func() bool {
		return s.machineStatus(m).GetState() == dispatchv1.MachineState_MACHINE_STATE_DOWN
	})
	h := s.hook()
	h.accepted(s.drv("patient", drvConfig{}))
	m.ssh.FailDials(nil)
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
}

func TestOnlyMachinesOfOtherKindsGoToStock(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{oneMachine("ssh")},
		builders: "unix:///other/socket riscv64-linux",
	})
	wantReply(t, s.hook().try(s.drv("theirs", drvConfig{system: "riscv64-linux"}), false), stock, "kind")
	wantReply(t, s.hook().try(s.drv("nobodys", drvConfig{system: "armv7l-linux"}), false), decline, "")
	wantReply(t, s.hook().try(s.drv("ours", drvConfig{}), false), accept, "")
}

func TestHookMessagesOutOfOrder(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	hello := &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Hello{Hello: s.hello()}}
	start := &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Start{Start: &dispatchv1.Start{}}}
	badStart := &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Start{Start: &dispatchv1.Start{Inputs: []string{"/etc/passwd"}}}}
	handed := &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_HandedOver{HandedOver: &dispatchv1.HandedOver{}}}
	try := func() *dispatchv1.HookRequest {
		return &dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Try{
			Try: &dispatchv1.Try{DrvPath: string(s.drv("thing", drvConfig{}).path)}}}
	}
	tests := []struct {
		name string
		says []*dispatchv1.HookRequest
	}{
		{"no Hello", []*dispatchv1.HookRequest{try()}},
		{"two Hellos", []*dispatchv1.HookRequest{hello, hello}},
		{"Start before acceptance", []*dispatchv1.HookRequest{hello, start}},
		{"HandedOver before acceptance", []*dispatchv1.HookRequest{hello, handed}},
		{"empty message", []*dispatchv1.HookRequest{hello, {}}},
		{"Hello after acceptance", []*dispatchv1.HookRequest{hello, try(), hello}},
		{"Try after acceptance", []*dispatchv1.HookRequest{hello, try(), try()}},
		{"inputs that are no store paths", []*dispatchv1.HookRequest{hello, try(), badStart}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			stream, err := s.client.Hook(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range tt.says {
				_ = stream.Send(m) // Recv tells
			}
			for err == nil {
				_, err = stream.Recv()
			}
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("stream ended with %v, want InvalidArgument", err)
			}
			s.idle()
		})
	}
}

func TestHookThatSaysNothingMore(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	s := newSite(t, m)
	h := s.hook()
	wantReply(t, h.try(s.drv("thing", drvConfig{}), false), accept, "")
	if got := len(s.status().GetBuilds()); got != 1 {
		t.Fatalf("%d builds in progress, want 1", got)
	}
	h.leave()
	s.idle()
	if got := m.built(); len(got) != 0 {
		t.Errorf("built %v for a hook that never said Start", got)
	}
}

func TestSameBuilders(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{builders: "ssh://a x86_64-linux - 4\nssh-ng://b x86_64-linux,i686-linux - 2 1.5 kvm big"})
	for builders, want := range map[string]bool{
		"ssh://a x86_64-linux - 4 ; ssh-ng://b i686-linux,x86_64-linux - 2 1.5 kvm big": true,
		"a x86_64-linux - 4 ; ssh-ng://b x86_64-linux,i686-linux - 2 1.5 kvm big":       true,
		"ssh://a x86_64-linux - 5 ; ssh-ng://b x86_64-linux,i686-linux - 2 1.5 kvm big": false,
		"ssh://a x86_64-linux - 4 ; ssh-ng://b x86_64-linux,i686-linux - 2 1.5 kvm":     false,
		"ssh://a x86_64-linux - 4": false,
		"ssh://a x86_64-linux - 4 ; ssh-ng://b x86_64-linux,i686-linux - 2 x kvm big": false,
	} {
		if got := s.d.machines.current().same(builders); got != want {
			t.Errorf("same(%q) = %v, want %v", builders, got, want)
		}
	}
}

func TestReplyWhileShuttingDown(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	s.d.end(errShutdown)
	c := &hookConversation{d: s.d, settings: s.hello()}
	got, f := c.decide(&dispatchv1.Try{DrvPath: string(s.drv("thing", drvConfig{}).path)})
	want := &dispatchv1.Reply{Action: postpone, Reason: errShutdown.Error()}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" || f != nil {
		t.Errorf("decide (-want +got):\n%s, follower %v", diff, f)
	}
}
