package daemon

import (
	"strings"
	"testing"

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
