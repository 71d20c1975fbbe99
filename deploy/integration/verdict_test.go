package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// TestWhoseFaultAFailureIs has the machines' own Nix, of every version, report
// failures that are not the derivation's.
func TestWhoseFaultAFailureIs(t *testing.T) {
	t.Parallel()
	for _, suite := range suites {
		for _, protocol := range protocols {
			t.Run(fmt.Sprintf("machines=%s/%s", suite, protocol), func(t *testing.T) {
				t.Parallel()
				const columns = "x86_64-linux - 1 1 claimed,both"
				s := newSite(t, siteConfig{machines: []machineConfig{
					{name: "liar", suite: suite, scheme: protocol, columns: columns,
						host: fleet.HostConfig{SystemFeatures: []string{"both"}}},
					{name: "honest", suite: suite, scheme: protocol, columns: columns,
						host: fleet.HostConfig{SystemFeatures: []string{"both", "claimed"}}},
				}})
				s.featureThatIsNotThere()
				s.killedBuilder()
				s.idle(time.Minute)
			})
		}
	}
}

// featureThatIsNotThere builds what the first machine takes and then refuses.
func (s *site) featureThatIsNotThere() {
	t := s.t
	t.Helper()
	r := recipe{name: "needs-claimed", feature: "claimed", script: "echo > $out"}
	run := s.launch("alice", r.expr(), "-v")
	run.succeed(time.Minute)
	if n := s.runs(r, s.machines["honest"]); n != 1 {
		t.Errorf("it ran %d times on the machine that has the feature, want once", n)
	}
	if printed := run.out().Stderr; !strings.Contains(printed, "root@honest'") {
		t.Errorf("the user is not told of the other machine:\n%s", printed)
	}
}

// killedBuilder builds what is killed everywhere.
func (s *site) killedBuilder() {
	t := s.t
	t.Helper()
	r := recipe{name: "killed", feature: "both", script: "kill -9 $$"}
	run := s.launch("alice", r.expr())
	if code := run.wait(time.Minute); code == 0 {
		t.Error("a build that was killed succeeded")
	}
	for _, h := range s.allMachines() {
		if n := s.runs(r, h); n != 1 {
			t.Errorf("%s: it ran %d times, want once", h.Name(), n)
		}
	}
	if printed := run.out().Stderr; !strings.Contains(printed, "signal 9") {
		t.Errorf("the user does not see what happened:\n%s", printed)
	}
}
