package daemon

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/sshpool"
)

func (s *site) explain(req *dispatchv1.ExplainRequest) *dispatchv1.ExplainResponse {
	s.t.Helper()
	r, err := s.client.Explain(s.t.Context(), req)
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

func TestExplainTellsOfEachMachine(t *testing.T) {
	t.Parallel()
	idle, kvm, picky, full, drained := oneMachine("ssh"), namedMachine("ssh", "kvm"), namedMachine("ssh", "picky"), namedMachine("ssh", "full"), namedMachine("ssh-ng", "drained")
	for _, m := range []*fakeMachine{idle, full, drained} {
		m.features = "big,kvm"
	}
	full.features = "big,kvm,only-full"
	kvm.features = "kvm"
	picky.mandatory = "picky"
	picky.features = "big,kvm"
	open := make(chan struct{})
	full.build = full.gated(open)
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{idle, kvm, picky, full, drained},
		builders: "ssh://arm aarch64-linux\nssh://gone " + nixSystem() + " - 1 1 big,kvm\nssh://off " + nixSystem() + " - 0 1 big,kvm\nunix:///elsewhere",
	})
	h := s.hook()
	h.accepted(s.drv("blocker", drvConfig{env: map[string]string{"requiredSystemFeatures": "only-full"}}))
	s.eventually("the slot is taken", func() bool { return full.building() == 1 })
	s.drain("drained")
	s.eventually("one is down", func() bool {
		for _, m := range s.status().GetMachines() {
			if m.GetUri() == "ssh://gone" {
				return m.GetState() == dispatchv1.MachineState_MACHINE_STATE_DOWN
			}
		}
		return false
	})
	r := s.explain(&dispatchv1.ExplainRequest{System: nixSystem(), Features: []string{"kvm", "big"}})
	if !r.GetPossible() || r.GetChosen() != idle.uri() || r.GetWhy() != "goes to ssh://m1: the only matching machine with a free slot" {
		t.Errorf("Explain = %v", r)
	}
	type reason = dispatchv1.VerdictReason
	want := map[string]struct {
		reason reason
		text   string
	}{
		"ssh://m1":          {dispatchv1.VerdictReason_VERDICT_REASON_ELIGIBLE, "is eligible: 0 of 1 slots taken"},
		"ssh://kvm":         {dispatchv1.VerdictReason_VERDICT_REASON_FEATURE_MISSING, "does not support required feature big"},
		"ssh://picky":       {dispatchv1.VerdictReason_VERDICT_REASON_MANDATORY_FEATURE, "takes only builds that require feature picky"},
		"ssh://full":        {dispatchv1.VerdictReason_VERDICT_REASON_FULL, "is full: its only slot is taken (1 running)"},
		"ssh-ng://drained":  {dispatchv1.VerdictReason_VERDICT_REASON_DRAINED, "is drained: since "},
		"ssh://arm":         {dispatchv1.VerdictReason_VERDICT_REASON_SYSTEM, "does not support system " + nixSystem() + " (it has aarch64-linux)"},
		"ssh://gone":        {dispatchv1.VerdictReason_VERDICT_REASON_DOWN, "is down: "},
		"ssh://off":         {dispatchv1.VerdictReason_VERDICT_REASON_NO_SLOTS, "has max-jobs 0"},
		"unix:///elsewhere": {dispatchv1.VerdictReason_VERDICT_REASON_UNSUPPORTED, "left to the stock hook"},
	}
	if len(r.GetMachines()) != len(want) {
		t.Errorf("%d machines, want %d", len(r.GetMachines()), len(want))
	}
	for _, v := range r.GetMachines() {
		w := want[v.GetMachine()]
		if v.GetReason() != w.reason || !strings.Contains(v.GetText(), w.text) || !strings.Contains(r.GetText(), v.GetText()) {
			t.Errorf("%s: %v %q, want %v %q", v.GetMachine(), v.GetReason(), v.GetText(), w.reason, w.text)
		}
		if w.reason == dispatchv1.VerdictReason_VERDICT_REASON_DOWN && (!strings.Contains(v.GetText(), "no such host") || !strings.Contains(v.GetText(), "(since ")) {
			t.Errorf("%s: %q, want the error and since when", v.GetMachine(), v.GetText())
		}
	}
	if n := s.metric("nix_dispatch_machine_down", map[string]string{"machine": "ssh://gone", "reason": "resolve"}); n != 1 {
		t.Errorf("machine_down{reason=resolve} = %v, want 1", n)
	}
	close(open)
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
}

func TestExplainOfADerivation(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	open := make(chan struct{})
	m.build = m.gated(open)
	s := newSite(t, m)
	thing := s.drv("thing", drvConfig{env: map[string]string{"preferLocalBuild": "1"}})
	r := s.explain(&dispatchv1.ExplainRequest{DrvPath: string(thing.path)})
	if r.GetChosen() != m.uri() || r.GetBuildId() != 0 || !strings.Contains(r.GetText(), "preferLocalBuild") {
		t.Errorf("Explain = %v, want it to go to the machine, and a note", r)
	}
	h := s.hook()
	accepted := h.accepted(thing)
	s.eventually("it runs", func() bool { return m.building() == 1 })
	r = s.explain(&dispatchv1.ExplainRequest{DrvPath: string(thing.path)})
	if r.GetBuildId() != accepted.GetBuildId() || r.GetWhy() != "is running on ssh://m1" {
		t.Errorf("Explain of a build in progress = %v", r)
	}
	close(open)
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	foreign := s.drv("foreign", drvConfig{system: "riscv64-linux"})
	r = s.explain(&dispatchv1.ExplainRequest{DrvPath: string(foreign.path)})
	if r.GetPossible() || r.GetWhy() != "no machine can build it" {
		t.Errorf("Explain of what no machine can build = %v", r)
	}
	reply := s.hook().try(foreign, false)
	if reply.GetReason() != r.GetText() {
		t.Errorf("the hook is told %q, explain tells %q", reply.GetReason(), r.GetText())
	}
	if n := s.metric("nix_dispatch_derivations_unplaceable_total", nil); n != 1 {
		t.Errorf("derivations_unplaceable_total = %v, want 1", n)
	}
	for _, tt := range []struct {
		req  *dispatchv1.ExplainRequest
		want codes.Code
	}{
		{&dispatchv1.ExplainRequest{}, codes.InvalidArgument},
		{&dispatchv1.ExplainRequest{DrvPath: "/etc/passwd"}, codes.InvalidArgument},
		{&dispatchv1.ExplainRequest{DrvPath: string(s.drv("absent", drvConfig{absent: true}).path)}, codes.NotFound},
	} {
		if _, err := s.client.Explain(t.Context(), tt.req); status.Code(err) != tt.want {
			t.Errorf("Explain(%v) = %v, want %v", tt.req, err, tt.want)
		}
	}
}

// TestOwnStoreIsRefused has a machine that is this host by another name.
func TestOwnStoreIsRefused(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		own, other := oneMachine(scheme), namedMachine(scheme, "m2")
		own.late = true
		s := newSiteWith(t, siteConfig{machines: []*fakeMachine{own, other}, prepare: func(s *site) {
			own.store = s.local.store
			// Everything of this host's store was copied to the other, the usual mark, too.
			other.store.PutFile(s.d.stores.own.marks.usual(s.dir).info.Path, "a copy")
		}})
		s.eventually("it is refused", func() bool {
			st := s.machineStatus(own)
			return st.GetState() == dispatchv1.MachineState_MACHINE_STATE_DOWN && strings.Contains(st.GetReason(), "this host's own")
		})
		if n := s.metric("nix_dispatch_machine_down", map[string]string{"machine": own.uri(), "reason": "own_store"}); n != 1 {
			t.Errorf("machine_down{reason=own_store} = %v, want 1", n)
		}
		s.mustBuild(s.drv("thing", drvConfig{}))
		if len(own.built()) != 0 || len(other.built()) != 1 {
			t.Errorf("built %v on the own store, %v on the other", own.built(), other.built())
		}
	})
}

func TestReasonsForDownAreBounded(t *testing.T) {
	t.Parallel()
	for want, err := range map[string]error{
		"other":        nil,
		"lost":         &sshpool.LostError{Host: "x", Err: errCancelled},
		"own_store":    &sshpool.ConnectError{Step: sshpool.StepProbe, Err: errOwnStore},
		"host_key":     &sshpool.ConnectError{Step: sshpool.StepHostKey, Err: errCancelled},
		"open_session": &sshpool.ConnectError{Step: sshpool.StepOpenSession, Err: errCancelled},
	} {
		if got := downReason(err); got != want {
			t.Errorf("downReason(%v) = %q, want %q", err, got, want)
		}
	}
}

// TestMarkIsTheStorePathThatNixComputes has the path that Nix gives
// builtins.toFile "greeting" "hello\n".
func TestMarkIsTheStorePathThatNixComputes(t *testing.T) {
	t.Parallel()
	if got, want := markOf("/nix/store", "hello\n", "greeting").info, "/nix/store/ybf7by4xvcgjhwilsg87rqz9di79bify-greeting"; string(got.Path) != want {
		t.Errorf("path = %s (%s), want %s", got.Path, got.CA, want)
	}
}
