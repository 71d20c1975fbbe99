package daemon

import (
	"strings"
	"testing"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A build that has not started leaves a machine that does not answer, long before the
// machine's connection is given up.
func TestBuildLeavesASuspectMachine(t *testing.T) {
	t.Parallel()
	m1, m2 := oneMachine("ssh"), namedMachine("ssh-ng", "m2")
	s := newSite(t, m1, m2)
	m1.ssh.Freeze(true) // while idle, so nobody knows
	s.mustBuild(s.drv("hello", drvConfig{}))
	m2.mu.Lock()
	if len(m2.builds) != 1 {
		t.Errorf("m2 built %q, want one build", m2.builds)
	}
	m2.mu.Unlock()
	got := s.machineStatus(m1)
	if got.GetState() != dispatchv1.MachineState_MACHINE_STATE_SUSPECT || !strings.Contains(got.GetReason(), "it does not answer since ") {
		t.Errorf("the machine that does not answer: %v", got)
	}
	labels := map[string]string{"machine": m1.uri()}
	if up, suspect := s.metric("nix_dispatch_machine_up", labels), s.metric("nix_dispatch_machine_suspect", labels); up != 1 || suspect != 1 {
		t.Errorf("metrics of the machine that does not answer: up %v, suspect %v", up, suspect)
	}
	m1.ssh.Freeze(false)
	s.eventually("the machine answers again", func() bool {
		return s.machineStatus(m1).GetState() == dispatchv1.MachineState_MACHINE_STATE_UP
	})
	if n := s.inUse(m1).host.Status().Connects; n != 1 {
		t.Errorf("%d connections were made to it, want 1", n)
	}
	s.mustBuild(s.drv("again", drvConfig{}))
	m1.mu.Lock()
	defer m1.mu.Unlock()
	if len(m1.builds) != 1 {
		t.Errorf("m1 built %q, want one build once it answers", m1.builds)
	}
}

// hedgedSite has a build running on m1 and m2 free. Both build when they are told to.
func hedgedSite(t *testing.T, hedge bool, cfg drvConfig) (s *site, m1, m2 *fakeMachine, go1, go2 chan struct{}, r *recipe, asked *hookClient) {
	t.Helper()
	m1, m2 = oneMachine("ssh"), namedMachine("ssh-ng", "m2")
	go1, go2 = make(chan struct{}), make(chan struct{})
	m1.build, m2.build = m1.gated(go1), m2.gated(go2)
	s = newSiteWith(t, siteConfig{
		machines: []*fakeMachine{m1, m2},
		options:  func(o *Options) { o.NoHedge = !hedge },
		prepare:  func(s *site) { s.d.hedgeAfter = time.Second },
	})
	r = s.drv("hello", cfg)
	asked = s.hook()
	asked.accepted(r)
	s.eventually("m1 builds", func() bool { return m1.building() == 1 })
	m1.ssh.Freeze(true)
	return s, m1, m2, go1, go2, r, asked
}

func (s *site) hedges(result string) float64 {
	return s.metric("nix_dispatch_second_attempts_total", map[string]string{"result": result})
}

// A build whose machine does not answer is started on another one, whose verdict comes
// first. The slot on the first machine is held: nobody knows what runs there.
func TestSecondAttemptWins(t *testing.T) {
	t.Parallel()
	s, m1, m2, _, go2, r, asked := hedgedSite(t, true, drvConfig{})
	s.eventually("m2 builds too", func() bool { return m2.building() == 1 })
	close(go2)
	story := asked.finish()
	story.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	s.checkOutputs(r)
	if n := s.hedges("won"); n != 1 {
		t.Errorf("%v second attempts won, want 1", n)
	}
	if got := s.machineStatus(m1); got.GetRunning() != 1 {
		t.Errorf("the slot on the machine that does not answer is not held: %v", got)
	}
	if got := s.machineStatus(m2); got.GetRunning() != 0 {
		t.Errorf("the second machine has a slot in use: %v", got)
	}
	if !strings.Contains(story.log, "ssh://m1 does not answer; the build is started on ssh-ng://m2 as well") {
		t.Errorf("the log does not tell of the second attempt: %q", story.log)
	}
	if n := len(s.status().GetBuilds()); n != 0 {
		t.Errorf("%d builds in progress after the end", n)
	}
	m1.ssh.Freeze(false)
}

// The first machine answers again and is quicker: the second attempt is ended.
func TestSecondAttemptIsOutrun(t *testing.T) {
	t.Parallel()
	s, m1, m2, go1, _, r, asked := hedgedSite(t, true, drvConfig{})
	s.eventually("m2 builds too", func() bool { return m2.building() == 1 })
	m1.ssh.Freeze(false)
	close(go1)
	asked.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	s.checkOutputs(r)
	if n := s.hedges("outrun"); n != 1 {
		t.Errorf("%v second attempts were outrun, want 1", n)
	}
	s.eventually("no slot is in use", func() bool {
		return s.machineStatus(m1).GetRunning()+s.machineStatus(m2).GetRunning() == 0
	})
	if n := m2.building(); n != 0 {
		t.Errorf("m2 still runs %d builds", n)
	}
}

// A second attempt that fails by its machine's fault leaves the first one alone.
func TestSecondAttemptFails(t *testing.T) {
	t.Parallel()
	s, m1, m2, go1, _, r, asked := hedgedSite(t, true, drvConfig{})
	s.eventually("m2 builds too", func() bool { return m2.building() == 1 })
	m2.ssh.Cut()
	s.eventually("the second attempt has failed", func() bool { return s.hedges("failed") == 1 })
	m1.ssh.Freeze(false)
	close(go1)
	asked.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	s.checkOutputs(r)
}

// Nobody is asked twice for what a fixed-output derivation fetches, and nothing is
// started twice with --hedge=off.
func TestNoSecondAttempt(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		hedge bool
		cfg   drvConfig
	}{
		"fixed outputs": {true, drvConfig{fixed: true}},
		"off":           {false, drvConfig{}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, m1, m2, go1, _, _, asked := hedgedSite(t, c.hedge, c.cfg)
			s.eventually("m1 is suspect for long", func() bool {
				since := s.inUse(m1).suspectSince()
				return !since.IsZero() && time.Since(since) > 4*time.Second
			})
			if n := m2.building(); n != 0 {
				t.Errorf("m2 runs %d builds", n)
			}
			m1.ssh.Freeze(false)
			close(go1)
			asked.finish()
		})
	}
}

// Who cancels a build that runs twice ends both.
func TestCancelEndsBothAttempts(t *testing.T) {
	t.Parallel()
	s, m1, m2, _, _, _, asked := hedgedSite(t, true, drvConfig{})
	s.eventually("m2 builds too", func() bool { return m2.building() == 1 })
	if _, err := s.client.Cancel(t.Context(), &dispatchv1.CancelRequest{BuildId: uint64(s.findBuild("hello").id)}); err != nil {
		t.Fatal(err)
	}
	asked.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_CANCELLED)
	s.eventually("m2 builds no more", func() bool { return m2.building() == 0 && s.machineStatus(m2).GetRunning() == 0 })
	s.eventually("the build is gone", func() bool { return len(s.status().GetBuilds()) == 0 })
	if got := s.machineStatus(m1); got.GetRunning() != 1 {
		t.Errorf("the slot on the machine that does not answer is not held: %v", got)
	}
	m1.ssh.Freeze(false)
}
