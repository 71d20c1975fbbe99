package integration

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// TestChaosCutWhileIdle cuts one of four machines off while nothing is built, and then
// has 40 builds that take no time: at most two seconds more than without that machine.
func TestChaosCutWhileIdle(t *testing.T) {
	t.Parallel()
	var cfg siteConfig
	three := ""
	for n := range 4 {
		m := machineConfig{name: fmt.Sprintf("mac%d", n), scheme: protocols[n%2], columns: "x86_64-linux - 4"}
		if n == 0 {
			m.columns = "x86_64-linux - 4 4" // all would go there
		} else {
			three += m.line()
		}
		cfg.machines = append(cfg.machines, m)
	}
	s := newSite(t, cfg)
	l := s.openLedger()
	v := victim{s, s.machines["mac0"]}
	s.timeBuilds("warm-up", 40, []string{"--option", "builders", three})
	without := s.timeBuilds("three", 40, []string{"--option", "builders", three})
	s.timeBuilds("four", 40, nil)
	s.idle(time.Minute)
	time.Sleep(5 * time.Second) // what is kept for the next build has ended
	v.cutOff()
	with := s.timeBuilds("cut", 40, nil)
	t.Logf("40 builds: %v with a machine that was cut off while idle, %v without it", with, without)
	if log := s.daemon.log.String(); !strings.Contains(log, `msg="the machine does not answer" machine=ssh://root@mac0`) {
		t.Error("the machine was never suspect")
	}
	if !nightly {
		// The pace of this host decides. Without the rule it would be half a minute.
		if with > without+20*time.Second {
			t.Errorf("it cost 40 builds %v", with-without)
		}
	} else if with > without+2*time.Second {
		t.Errorf("it cost 40 builds %v, want at most 2 s", with-without)
	}
	v.heal()
	l.settle(ledgerWait)
	if nightly {
		v.cutOff()
		stock := s.askStock(work{name: "cut-stock", good: 20})[0]
		t.Logf("the stock hook: %s after %v", stock.result(stockWaits), time.Since(stock.began).Round(time.Second))
		v.heal()
	}
}

// TestChaosSecondAttempt has eight builds of eight seconds on two machines. After four
// seconds one machine falls silent, or its connections are reset.
func TestChaosSecondAttempt(t *testing.T) {
	for _, tt := range []struct {
		name   string
		begin  func(victim)
		within time.Duration
	}{
		{"frozen", victim.freeze, 30 * time.Second},
		{"off", victim.kill, 30 * time.Second},
		{"reset", victim.restartSSHD, 20 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, siteConfig{machines: []machineConfig{
				{name: "mac", suite: fleet.Sid, columns: "x86_64-linux - 4"},
				{name: "mini", suite: fleet.Bookworm, scheme: "ssh-ng", columns: "x86_64-linux - 4"},
			}})
			l := s.openLedger()
			v := victim{s, s.machines["mac"]}
			w := work{name: "ours-" + tt.name, good: 8, script: "sleep 8"}
			asked := s.askDispatch(s.make(w))
			v.await(whileBuilt, w.name)
			time.Sleep(4 * time.Second)
			tt.begin(v)
			took := s.allDone([]*commission{asked}).took
			if nightly && took > tt.within {
				t.Errorf("all built after %v, want at most %v", took, tt.within)
			}
			log := s.daemon.log.String()
			if hedged := strings.Count(log, "starting the build on a second one as well"); tt.name != "reset" && hedged == 0 {
				t.Error("no build was started on a second machine")
			}
			_, got := s.scrape()
			t.Logf("second attempts: %v won, %v outrun, %v failed", got[`nix_dispatch_second_attempts_total{result=won}`],
				got[`nix_dispatch_second_attempts_total{result=outrun}`], got[`nix_dispatch_second_attempts_total{result=failed}`])
			v.heal()
			l.settle(ledgerWait)
			if nightly {
				w.name, w.good = "stock-"+tt.name, 4
				stock := s.askStock(w)[0]
				v.await(whileBuilt, w.name)
				time.Sleep(4 * time.Second)
				tt.begin(v)
				t.Logf("the stock hook: %s after %v", stock.result(stockWaits), time.Since(stock.began).Round(time.Second))
				v.heal()
			}
		})
	}
}

// TestChaosConnectionKilledOften kills the only connection to the only machine once under
// eight builds, again and again: none fails.
func TestChaosConnectionKilledOften(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{{name: "mac", suite: fleet.Sid, columns: "x86_64-linux - 8"}}})
	l := s.openLedger()
	v := victim{s, s.machines["mac"]}
	rounds := shortOr(4, 100)
	for n := range rounds {
		w := work{name: fmt.Sprintf("under-fire-%d", n), good: 8, size: 50_000, script: "sleep 1"}
		asked := s.askDispatch(s.make(w))
		v.await(whileBuilt, w.name)
		v.signal(syscall.SIGKILL, "sshd: root@")
		v.signal(syscall.SIGKILL, "sshd-session: root@")
		s.allDone([]*commission{asked})
	}
	if lost := strings.Count(s.daemon.log.String(), `msg="ssh connection lost"`); lost < rounds {
		t.Errorf("%d connections were lost in %d rounds", lost, rounds)
	}
	l.settle(ledgerWait)
}

// TestChaosSaturatedUplink has uploads fill a line of 1 Mbit/s, with a queue before it
// that holds two seconds' worth: the machine is never down, and nothing is started on
// the other one as well.
func TestChaosSaturatedUplink(t *testing.T) {
	t.Parallel()
	pieces := shortOr(4, 75) // ten minutes
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "mac", suite: fleet.Sid, columns: "x86_64-linux - 2 4"},
		{name: "mini", suite: fleet.Bookworm, columns: "x86_64-linux - 1 - big"},
	}})
	l := s.openLedger()
	v := victim{s, s.machines["mac"]}
	v.must(v.LimitQueue(s.t.Context(), lineRate, 2*time.Second))
	asked := s.askDispatch(s.make(work{name: "uphill", good: pieces, size: 1_000_000, script: "sleep 12"}))
	if got := asked.result(shortOr(callersWait, 30*time.Minute)); len(got.lost) > 0 || got.hung {
		t.Errorf("%s: %s\n%s", asked.what, got, clip(asked.out().Stderr))
	}
	t.Logf("%d MB uploaded in %v", pieces, time.Since(asked.began).Round(time.Second))
	log := s.daemon.log.String()
	// The line is a program on this host. Where that gets no processor for a second, the
	// machine may be suspect for a moment.
	t.Logf("suspect %d times", strings.Count(log, `msg="the machine does not answer"`))
	for _, never := range []string{`msg="ssh connection lost"`, "starting the build on a second one as well"} {
		if strings.Contains(log, never) {
			at := slices.IndexFunc(strings.Split(log, "\n"), func(line string) bool { return strings.Contains(line, never) })
			t.Errorf("the log has %s", strings.Split(log, "\n")[at])
		}
	}
	v.must(v.Limit(context.WithoutCancel(s.t.Context()), 0))
	l.settle(ledgerWait)
}
