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
	var cfg siteConfig
	var pairs []string
	for n, suite := range suites {
		for _, protocol := range shortOr(protocols[n%2:][:1], protocols) {
			pair := suite + "-" + protocol
			pairs = append(pairs, pair)
			m := machineConfig{suite: suite, scheme: protocol, columns: fmt.Sprintf("x86_64-linux - 1 1 claimed-%s,both-%[1]s", pair)}
			m.name, m.host = "liar-"+pair, feature("both-"+pair)
			cfg.machines = append(cfg.machines, m)
			m.name, m.host = "honest-"+pair, feature("both-"+pair, "claimed-"+pair)
			cfg.machines = append(cfg.machines, m)
		}
	}
	s := newSite(t, cfg)
	t.Run("machines", func(t *testing.T) {
		for _, pair := range pairs {
			t.Run(pair, func(t *testing.T) {
				t.Parallel()
				s := s.in(t)
				s.featureThatIsNotThere(pair)
				s.killedBuilder(pair)
			})
		}
	})
	s.idle(time.Minute)
}

// featureThatIsNotThere builds what the first machine of a pair takes and then refuses.
func (s *site) featureThatIsNotThere(pair string) {
	t := s.t
	t.Helper()
	r := recipe{name: "needs-claimed-" + pair, feature: "claimed-" + pair, script: "echo > $out"}
	run := s.launch("alice", r.expr(), "-v")
	run.succeed(patience)
	if n := s.runs(r, s.machines["honest-"+pair]); n != 1 {
		t.Errorf("it ran %d times on the machine that has the feature, want once", n)
	}
	if printed := run.out().Stderr; !strings.Contains(printed, "root@honest-"+pair+"'") {
		t.Errorf("the user is not told of the other machine:\n%s", printed)
	}
}

// killedBuilder builds what is killed on both machines of a pair.
func (s *site) killedBuilder(pair string) {
	t := s.t
	t.Helper()
	r := recipe{name: "killed-" + pair, feature: "both-" + pair, script: "kill -9 $$"}
	run := s.launch("alice", r.expr())
	if code := run.wait(patience); code == 0 {
		t.Error("a build that was killed succeeded")
	}
	for _, h := range []*fleet.Host{s.machines["liar-"+pair], s.machines["honest-"+pair]} {
		if n := s.runs(r, h); n != 1 {
			t.Errorf("%s: it ran %d times, want once", h.Name(), n)
		}
	}
	if printed := run.out().Stderr; !strings.Contains(printed, "signal 9") {
		t.Errorf("the user does not see what happened:\n%s", printed)
	}
}
