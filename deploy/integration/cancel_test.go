package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A cancelCase is a way to end a caller in the middle of a build.
type cancelCase struct {
	name   string
	signal syscall.Signal
	user   string // of nix-build; "" for nix-dispatch build
}

var cancelCases = []cancelCase{
	{"int-daemon", syscall.SIGINT, "alice"},
	{"int-direct", syscall.SIGINT, "root"},
	{"int-dispatch", syscall.SIGINT, ""},
	{"kill-daemon", syscall.SIGKILL, "alice"},
	{"kill-direct", syscall.SIGKILL, "root"},
	{"kill-dispatch", syscall.SIGKILL, ""},
}

// A doomed is a caller whose build will not end by itself.
type doomed struct {
	cancelCase
	protocol string
	marker   string // part of the command line of the builder's process
	run      *launched
}

// builderRuns tells whether the builder is there.
func (d doomed) builderRuns(s *site) bool { return runsOn(s.machines[d.protocol+"-1"], d.marker) > 0 }

// TestCallerGone ends callers with Ctrl-C and kill -9, all at once: their builds
// are gone from the machines in no time, others go on.
func TestCallerGone(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: protocolMachines(1, len(cancelCases)+1)})
		var callers []doomed
		for _, protocol := range protocols {
			for n, c := range cancelCases {
				callers = append(callers, s.doom(c, protocol, fmt.Sprintf("sleep 8000%d", n)))
			}
		}
		bystander := recipe{name: "bystander", feature: "ssh"}
		bystander.script = bystander.awaitGate() + "echo > $out"
		stays := s.launch("alice", bystander.expr())
		s.eventually(time.Minute, "all builds run", func() bool {
			for _, c := range callers {
				if !c.builderRuns(s) {
					return false
				}
			}
			return s.runs(bystander, s.allMachines()...) == 1
		})
		// Whose a build is that comes through nix-daemon is known, too.
		for _, b := range s.status().Builds {
			want := "root"
			if strings.Contains(b.DrvPath, "-daemon-") || strings.Contains(b.DrvPath, "bystander") {
				want = "alice"
			}
			if b.User != want {
				t.Errorf("%s is shown as %q's, want %s", b.DrvPath, b.User, want)
			}
		}
		for _, c := range callers {
			c.run.signal(c.signal)
		}
		start := time.Now()
		for _, c := range callers {
			for c.builderRuns(s) {
				if time.Since(start) > time.Minute {
					t.Fatalf("%s over %s: the builder still runs on the machine a minute later", c.name, c.protocol)
				}
				time.Sleep(50 * time.Millisecond)
			}
		}
		t.Logf("the builders were gone after %v", time.Since(start).Round(time.Millisecond))
		s.eventually(time.Minute, "all slots but one are free", func() bool {
			r := s.status()
			return len(r.Builds) == 1 && r.Machines[0].Running == 1 && r.Machines[1].Running == 0
		})
		for _, c := range callers {
			if code := c.run.wait(time.Minute); code == 0 {
				t.Errorf("%s over %s: exit 0, though it was ended", c.name, c.protocol)
			}
		}
		s.openGate(bystander)
		s.verify(stays.succeed(time.Minute)...)
		s.idle(time.Minute)
	})
}

// doom starts a caller.
func (s *site) doom(c cancelCase, protocol, marker string) doomed {
	s.t.Helper()
	r := recipe{name: c.name + "-" + protocol, feature: protocol, script: "echo waiting; " + marker}
	d := doomed{cancelCase: c, protocol: protocol, marker: marker}
	if c.user == "" {
		d.run = s.launchDispatch("build", s.drvOf(r.expr()))
	} else {
		d.run = s.launch(c.user, r.expr())
	}
	return d
}

// TestCancel cancels a build for all its callers: they are told, and the machine
// is rid of it.
func TestCancel(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: protocolMachines(1, 1)})
	for n, protocol := range protocols {
		c := s.doom(cancelCase{name: "cancelled"}, protocol, fmt.Sprintf("sleep 8100%d", n))
		s.eventually(time.Minute, "the build runs", func() bool { return c.builderRuns(s) })
		second := s.launch("alice", recipe{name: "cancelled-" + protocol, feature: protocol, script: "echo waiting; " + c.marker}.expr())
		s.eventually(time.Minute, "the second caller is accepted", func() bool {
			return strings.Contains(second.out().Stderr, "waiting\n")
		})
		builds := s.status().Builds
		if len(builds) != 1 {
			t.Fatalf("%s: %d builds in progress, want one: %+v", protocol, len(builds), builds)
		}
		if out, err := s.dispatch("cancel", builds[0].ID.String()); err != nil {
			t.Fatalf("nix-dispatch cancel: %v\n%s", err, out.Stderr)
		}
		s.eventually(time.Minute, "the builder is gone from the machine", func() bool { return !c.builderRuns(s) })
		for _, run := range []*launched{c.run, second} {
			if code := run.wait(time.Minute); code != 1 || !strings.Contains(run.out().Stderr, "cancelled") {
				t.Errorf("%s: %s: exit %d, want 1 and to be told:\n%s", protocol, run.what, code, run.out().Stderr)
			}
		}
		s.idle(time.Minute)
	}
	if out, err := s.dispatch("cancel", "4711"); err == nil || !strings.Contains(out.Stderr, "no such build") {
		t.Errorf("cancelling a build that is not there: %v, %q; want to be told so", err, out.Stderr)
	}
}
