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
	cfg.machines = append(cfg.machines, machineConfig{name: "boxed", columns: "x86_64-linux - 1 1 boxed", host: fleet.HostConfig{
		NixConf: "sandbox = true\n", SystemFeatures: []string{"boxed"},
	}})
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
	t.Run("words of a derivation", func(t *testing.T) { s.in(t).wordsParkNoMachine(pairs) })
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

// wordsParkNoMachine has alice build what fails with words that a full disk would cause,
// which Nix quotes from the derivation, by every machine: none of them is parked, and
// bob's builds go there.
func (s *site) wordsParkNoMachine(pairs []string) {
	t := s.t
	t.Helper()
	const words = "/No space left on device"
	attack := func(name, feature, attr string) {
		out, err := s.nixBuild("alice", shell(name, "echo > $out", features(feature)+"__structuredAttrs = true; "+attr+` = [ "`+words+`" ];`))
		if err == nil || !strings.Contains(out.Stderr, words) {
			t.Errorf("%s: %v; it printed:\n%s", name, err, out.Stderr)
		}
		for _, m := range s.status().Machines {
			if m.State != "up" || m.Parked != "" {
				t.Errorf("after %s: %s is %s: %s%s", name, m.URI, m.State, m.Reason, m.Parked)
			}
		}
	}
	for _, pair := range pairs {
		attack("words-"+pair, "both-"+pair, "exportReferencesGraph.x")
	}
	attack("words-boxed", "boxed", "__impureHostDeps")
	for _, pair := range pairs {
		for _, kind := range []string{"liar-", "honest-"} {
			if n := ran(t, s.machines[kind+pair], "words-"+pair); n != 0 {
				t.Errorf("%s%s has run what it must refuse", kind, pair)
			}
		}
		s.mustBuild("bob", shell("after-words-"+pair, "echo > $out", features("both-"+pair)))
		if n := ran(t, s.machines["liar-"+pair], "after-words-"+pair) + ran(t, s.machines["honest-"+pair], "after-words-"+pair); n != 1 {
			t.Errorf("bob's build ran %d times on the machines of %s, want once", n, pair)
		}
	}
	if strings.Contains(s.daemon.log.String(), "msg=\"machine parked\"") {
		t.Error("a machine was parked")
	}
}
