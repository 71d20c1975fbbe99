package integration

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// A limitCase is a build that passes a limit its caller sets, or keeps to it.
type limitCase struct {
	name   string
	user   string // who may set it
	script string
	args   []string
	says   string // in the failure's message; "" if the build must succeed
	exit   int    // of Nix up to 2.28, which tells root more than that it failed
}

// limitCases end in a process that a broken limit would leave running, found by
// its argument.
var limitCases = []limitCase{
	{
		name: "timeout", user: "alice", args: []string{"--timeout", "3"},
		script: "while :; do echo busy; sleep 0.2; done & sleep 70001", says: "timed out after 3 seconds", exit: 1,
	}, {
		name: "silent", user: "root", args: []string{"--max-silent-time", "3"},
		script: "echo started; sleep 70002", says: "timed out after 3 seconds of silence", exit: 101,
	}, {
		name: "log-size", user: "root", args: []string{"--max-build-log-size", "100000"},
		// Nix applies this one itself, to what it has read.
		script: "seq 1 50000; sleep 70003", says: "killed after writing more than 100000 bytes of log output",
	}, {
		name: "within", user: "root", args: []string{"--timeout", "200", "--max-silent-time", "20", "--max-build-log-size", "100000"},
		script: "for i in 1 2 3 4; do echo $i; sleep 1; done; echo > $out",
	},
}

// TestLimits sets Nix's limits, which Nix does not apply to remote builds: the
// build is stopped on the machine, the user is told why, the slot is free.
func TestLimits(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: protocolMachines(1, len(limitCases))})
		type trial struct {
			limitCase
			drvPath string
			run     *launched
		}
		var trials []trial
		for _, protocol := range protocols {
			for _, c := range limitCases {
				r := recipe{name: c.name + "-" + protocol, feature: protocol, script: c.script}
				drvPath := s.drvOf(r.expr())
				c.name = r.name
				trials = append(trials, trial{c, drvPath, s.launch(c.user, r.expr(), c.args...)})
			}
		}
		for _, c := range trials {
			code, printed := c.run.wait(patience), c.run.out().Stderr
			if c.says == "" {
				if code != 0 {
					t.Errorf("%s: exit %d, want success:\n%s", c.name, code, clip(printed))
				}
				continue
			}
			want := c.exit
			if suite == fleet.Sid {
				want = 1
			}
			if code <= 0 || c.exit != 0 && code != want {
				t.Errorf("%s: exit %d, want %d", c.name, code, want)
			}
			if !regexp.MustCompile("error: build.* '" + c.drvPath + ".* " + c.says).MatchString(printed) {
				t.Errorf("%s: the user is not told that %q:\n%s", c.name, c.says, clip(printed))
			}
		}
		s.eventually(patience, "no builder is left on the machines", func() bool {
			n := 0
			for _, h := range s.allMachines() {
				n += runsOn(h, "sleep 7000")
			}
			return n == 0
		})
		s.idle(time.Minute)
	})
}

// TestLimitsOfDispatch sets the limits of nix-dispatch build.
func TestLimitsOfDispatch(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: protocolMachines(1, len(limitCases))})
	for _, protocol := range protocols {
		for _, c := range limitCases {
			r := recipe{name: c.name + "-" + protocol, feature: protocol, script: c.script}
			run := s.launchDispatch(append(append([]string{"build"}, c.args...), s.drvOf(r.expr()))...)
			want := 1
			if c.says == "" {
				want = 0
			}
			if code, printed := run.wait(time.Minute), run.out().Stderr; code != want || !strings.Contains(printed, c.says) {
				t.Errorf("%s: exit %d, want %d and to be told %q:\n%s", r.name, code, want, c.says, clip(printed))
			}
			s.idle(time.Minute)
			if n := runsOn(s.machines[protocol+"-1"], "sleep 7000"); n != 0 {
				t.Errorf("%s: the builder still runs", r.name)
			}
		}
	}
}

// TestLimitsAreEachCallers has two callers follow one build. The one whose limit
// it passes is sent away; the other gets the build.
func TestLimitsAreEachCallers(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: protocolMachines(1, 1)})
	for _, protocol := range protocols {
		r := recipe{name: "shared-" + protocol, feature: protocol}
		r.script = r.awaitGate() + "echo > $out"
		drvPath := s.drvOf(r.expr())
		patient := s.launchDispatch("build", drvPath)
		s.eventually(patience, "the build runs", func() bool { return s.runs(r, s.allMachines()...) == 1 })
		hasty := s.launch("alice", r.expr(), "--timeout", "2")
		if code, printed := hasty.wait(patience), hasty.out().Stderr; code == 0 || !strings.Contains(printed, "timed out after 2 seconds") {
			t.Errorf("%s: the hasty caller: exit %d, want a time-out:\n%s", protocol, code, printed)
		}
		s.openGate(r)
		s.verify(patient.succeed(patience)...)
		if n := s.runs(r, s.allMachines()...); n != 1 {
			t.Errorf("%s: built %d times, want once", protocol, n)
		}
	}
	s.idle(time.Minute)
}
