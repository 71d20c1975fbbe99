package integration

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// TestChaosDeadMachineCostsNothing has one of four machines cut off. A run of
// builds may take a second longer than where that machine is not in the list.
func TestChaosDeadMachineCostsNothing(t *testing.T) {
	onlyNightly(t, "TestMachinesOutOfReach, which builds beside dead machines")
	var cfg siteConfig
	three := ""
	for n := range 4 {
		m := machineConfig{name: fmt.Sprintf("mac%d", n), scheme: protocols[n%2], columns: "x86_64-linux - 2"}
		if n == 0 {
			m.columns = "x86_64-linux - 2 4" // all would go there
		} else {
			three += m.line()
		}
		cfg.machines = append(cfg.machines, m)
	}
	s := newSite(t, cfg)
	l := s.openLedger()
	v := victim{s, s.machines["mac0"]}
	v.cutOff()
	s.eventually(2*time.Minute, "the machine is known to be down", func() bool { return s.status().Machines[0].State == "down" })
	var with, without []time.Duration
	for n := range 4 {
		without = append(without, s.timeBuilds(fmt.Sprintf("three-%d", n), 60, []string{"--option", "builders", three}))
		with = append(with, s.timeBuilds(fmt.Sprintf("four-%d", n), 60, nil))
	}
	// The first of each is a warm-up, of the connections of the list of three too.
	slices.Sort(with[1:])
	slices.Sort(without[1:])
	t.Logf("60 builds: %v with the dead machine, %v without", with, without)
	if cost := with[2] - without[2]; cost > time.Second {
		t.Errorf("a dead machine in the list costs 60 builds %v, want at most 1 s", cost)
	}
	v.heal()
	l.settle(ledgerWait)
}
