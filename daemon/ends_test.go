package daemon

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

// goneSlowly builds until the caller has gone, and takes its time to end: who is told
// too early sees the build.
func goneSlowly(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
	r := untilGone(ctx, req)
	time.Sleep(300 * time.Millisecond)
	return r
}

// TestWhoEndsABuildFindsItEnded looks right after a limit was passed, or a
// cancellation.
func TestWhoEndsABuildFindsItEnded(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	m.build = goneSlowly
	s := newSite(t, m)
	check := func(what string, id uint64) {
		t.Helper()
		if inProgressOf(s.status())[id] || !s.endedSoFar()[id] {
			t.Errorf("build %d, %s: in progress %v, ended %v", id, what, s.status().GetBuilds(), s.endedSoFar())
		}
	}
	for n := range 2 {
		h := s.hook(func(h *dispatchv1.Hello) {
			h.Limits = &dispatchv1.Limits{Timeout: durationpb.New(50 * time.Millisecond)}
		})
		id := h.accepted(s.drv(fmt.Sprintf("slow%d", n), drvConfig{})).GetBuildId()
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT)
		check("which passed its limit", id)

		h = s.hook()
		id = h.accepted(s.drv(fmt.Sprintf("unwanted%d", n), drvConfig{})).GetBuildId()
		s.eventually("it is being built", func() bool { return m.building() == 1 })
		if _, err := s.client.Cancel(t.Context(), &dispatchv1.CancelRequest{BuildId: id}); err != nil {
			t.Fatal(err)
		}
		check("which was cancelled", id)
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_CANCELLED)

		id, _ = s.detach(s.drv(fmt.Sprintf("detached%d", n), drvConfig{}))
		s.eventually("it is being built", func() bool { return m.building() == 1 })
		if _, err := s.client.Cancel(t.Context(), &dispatchv1.CancelRequest{BuildId: id}); err != nil {
			t.Fatal(err)
		}
		for _, b := range s.status().GetDetached() {
			if b.GetId() == id && b.GetEnded() == nil {
				t.Errorf("detached build %d, which was cancelled, is in progress", id)
			}
		}
	}
}

// TestFailedCallLeavesNothingInProgress has one of two builds fail.
func TestFailedCallLeavesNothingInProgress(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	m.slots = 2
	s := newSite(t, m)
	for n := range 2 {
		bad, long := s.drv(fmt.Sprintf("bad%d", n), drvConfig{}), s.drv(fmt.Sprintf("long%d", n), drvConfig{})
		m.buildWith(func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
			if req.DrvPath == long.path {
				return goneSlowly(ctx, req)
			}
			for m.building() < 2 && ctx.Err() == nil {
				time.Sleep(time.Millisecond)
			}
			return nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "it fails"}
		})
		if got := s.realise(asked(bad, long)); got.err != nil || got.summary.GetSuccess() {
			t.Errorf("the call ended with %v, %v", got.summary, got.err)
		}
		if builds := s.status().GetBuilds(); len(builds) > 0 {
			t.Errorf("the call has ended, and of it are in progress: %v", builds)
		}
	}
}

// TestCommandIsSeenWhenItReturns drains a machine and reads lists of machines, and
// looks right after.
func TestCommandIsSeenWhenItReturns(t *testing.T) {
	t.Parallel()
	m1, m2 := namedMachine("ssh-ng", "m1"), namedMachine("ssh-ng", "m2")
	s := newFileSite(t, 0, m1, m2)
	on := map[string]string{"machine": m2.uri()}
	for n := range 5 {
		if _, err := s.client.Drain(t.Context(), &dispatchv1.DrainRequest{Machine: m2.uri()}); err != nil {
			t.Fatal(err)
		}
		st := s.machineStatus(m2)
		if st.GetState() != dispatchv1.MachineState_MACHINE_STATE_DRAINING || !st.GetDrained() || s.metric("nix_dispatch_machine_drained", on) != 1 ||
			s.metric("nix_dispatch_machine_up", on) != 0 {
			t.Errorf("drained: status %v, metrics drained %v, up %v", st, s.metric("nix_dispatch_machine_drained", on), s.metric("nix_dispatch_machine_up", on))
		}
		why, err := s.client.Explain(t.Context(), &dispatchv1.ExplainRequest{System: nixSystem()})
		if err != nil || !slices.ContainsFunc(why.GetMachines(), func(v *dispatchv1.Verdict) bool {
			return v.GetMachine() == m2.uri() && v.GetReason() == dispatchv1.VerdictReason_VERDICT_REASON_DRAINED
		}) {
			t.Errorf("drained: explained as %v, %v", why, err)
		}
		if _, err := s.client.Undrain(t.Context(), &dispatchv1.UndrainRequest{Machine: m2.uri()}); err != nil {
			t.Fatal(err)
		}
		if st := s.machineStatus(m2); st.GetState() != dispatchv1.MachineState_MACHINE_STATE_UP || s.metric("nix_dispatch_machine_up", on) != 1 {
			t.Errorf("not drained any more: status %v, metric up %v", st, s.metric("nix_dispatch_machine_up", on))
		}

		s.mustReload(s.lines["m1"])
		if got := s.metric("nix_dispatch_machines_reloads_total", map[string]string{"result": "ok"}); got != float64(2*n+1) {
			t.Errorf("%d lists were read, and %v counted", 2*n+1, got)
		}
		if st := s.machineStatus(m2); st != nil || s.metricSeries("nix_dispatch_machine_up", on)+s.metricSeries("nix_dispatch_ssh_connects_total", on)+
			s.metricSeries("nix_dispatch_builds_total", on) > 0 {
			t.Errorf("a machine that is listed no more: status %v, or metrics", st)
		}
		s.mustReload(s.lines["m1"], s.lines["m2"])
		if st := s.machineStatus(m2); st == nil || s.status().GetReload().GetSuccess() != true {
			t.Errorf("a machine that is listed again: %v", st)
		}
		s.eventually("it is up", func() bool { return s.machineStatus(m2).GetState() == dispatchv1.MachineState_MACHINE_STATE_UP })
	}
}

// metricSeries is the number of a metric's series with these labels.
func (s *site) metricSeries(name string, labels map[string]string) (n int) {
	s.t.Helper()
	families, err := s.d.metrics.registry.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && hasLabels(m, labels) {
				n++
			}
		}
	}
	return n
}
