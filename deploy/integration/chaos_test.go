package integration

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

const (
	// callersWait is how long callers may take; stockWaits how long the stock hook
	// may, which waits for ever in some cases.
	callersWait = 5 * time.Minute
	stockWaits  = 90 * time.Second
	// ledgerWait is how long after it all something may be left of it.
	ledgerWait = 3 * time.Minute
)

// TestChaos has mishaps happen to one of two machines while builds are under way
// that prefer it, at the pace of a real site, and beside it what the stock hook makes
// of that: every build that can be built is, the others fail by their own fault, and
// then nothing is left of it.
func TestChaos(t *testing.T) {
	onlyNightly(t, "TestChaosShort")
	t.Cleanup(func() { t.Log("\n" + chaosTable.String()) })
	for _, m := range mishaps {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			s := chaosSite(t, m.scheme, m.user, nil)
			l := s.openLedger()
			ours := s.suffer(m, "ours", callersWait, s.askBoth)
			l.settle(ledgerWait)
			// Last, for it may leave anything.
			chaosTable.add(m.name, ours, s.suffer(m, "stock", stockWaits, s.askStock))
		})
	}
}

// TestChaosShort is TestChaos with some mishaps, one after the other, on links
// that are given up sooner.
func TestChaosShort(t *testing.T) {
	t.Parallel()
	for scheme, names := range map[string][]string{
		"ssh":    {"store full", "killed", "cut off while it builds"},
		"ssh-ng": {"frozen", "sshd restarted"},
	} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			s := chaosSite(t, scheme, "", map[string]string{"/root/.ssh/config": impatient})
			l := s.openLedger()
			for _, name := range names {
				n := slices.IndexFunc(mishaps, func(m mishap) bool { return m.name == name })
				s.suffer(mishaps[n], "ours", callersWait, s.askBoth)
				s.eventually(ledgerWait, "the machine is back", func() bool { return s.status().Machines[0].State == "up" })
			}
			l.settle(ledgerWait)
		})
	}
}

// impatient is ssh's configuration by which a connection is given up after a few
// seconds of silence instead of 45.
const impatient = "Host *\n\tServerAliveInterval 2\n\tServerAliveCountMax 3\n\tConnectTimeout 4\n"

// chaosSite has two machines; mac is the one that everything goes to first.
func chaosSite(t *testing.T, scheme, user string, files map[string]string) *site {
	t.Helper()
	trust := fleet.HostConfig{NixTrusted: true}
	return newSite(t, siteConfig{files: files, machines: []machineConfig{
		{name: "mac", suite: fleet.Sid, scheme: scheme, user: user, columns: "x86_64-linux - 3 4", host: trust},
		{name: "mini", suite: fleet.Bookworm, scheme: scheme, user: user, columns: "x86_64-linux - 3", host: trust},
	}})
}

// askBoth has a user of plain Nix and one of nix-dispatch ask for work.
func (s *site) askBoth(w work) []*commission {
	s.t.Helper()
	direct := w
	w.name, direct.name = w.name+"-hook", w.name+"-direct"
	hook, all := s.make(w), s.make(direct)
	return []*commission{s.askNix("alice", hook), s.askDispatch(all)}
}

// askStock has Nix's own hook do the same.
func (s *site) askStock(w work) []*commission {
	s.t.Helper()
	w.good, w.bad = 2*w.good, 2*w.bad
	return []*commission{s.askNix("root", s.make(w), "--option", "build-hook", stockHook)}
}

// suffer has the mishap happen while work is done, and returns how that ended,
// with the machine well again. Whatever is lost of ours fails the test.
func (s *site) suffer(m mishap, who string, within time.Duration, ask func(work) []*commission) tally {
	s.t.Helper()
	name := who + "-" + strings.ReplaceAll(m.name, " ", "-")
	w := work{name: name, good: cmp.Or(m.good, 6), bad: 1, size: m.size, script: cmp.Or(m.script, "sleep 2")}
	v := victim{s, s.machines["mac"]}
	v.must(v.Limit(s.t.Context(), m.rate))
	if m.at == beforeAll {
		m.begin(v)
	}
	asked := ask(w)
	if m.at != beforeAll {
		v.await(m.at, name)
		m.begin(v)
	}
	var all tally
	for _, c := range asked {
		got := c.result(within)
		if who == "ours" && (len(got.lost) > 0 || got.hung) {
			s.t.Errorf("%s: %s: %s\n%s\nIt printed:\n%s", m.name, c.what, got, strings.Join(got.lost, "\n"), clip(c.out().Stderr))
		}
		all = all.plus(got)
	}
	s.t.Logf("%s, %s: %s", m.name, who, all)
	if m.end != nil {
		m.end(v)
	}
	v.heal()
	v.must(v.Limit(s.t.Context(), 0))
	if m.leaves && who == "ours" {
		s.eventually(ledgerWait, "what was left on the machine is ended", func() bool {
			return strings.Contains(s.daemon.log.String(), "nothing of it is left on the machine")
		})
	}
	if lost := strings.Contains(s.daemon.log.String(), `msg="ssh connection lost" machine=`+"ssh://root@mac"); m.keeps && lost {
		s.t.Errorf("%s: the connection to the machine was given up", m.name)
	}
	return all
}

// chaosTable is what became of the same work with the same mishap, with ours and
// with the stock hook.
var chaosTable comparison

type comparison struct {
	mu   sync.Mutex
	rows map[string][2]tally
}

func (c *comparison) add(name string, ours, stock tally) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rows == nil {
		c.rows = make(map[string][2]tally)
	}
	c.rows[name] = [2]tally{ours, stock}
}

func (c *comparison) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b strings.Builder
	for _, m := range mishaps {
		if row, ok := c.rows[m.name]; ok {
			fmt.Fprintf(&b, "%-36s  ours: %s\n%36s stock: %s\n", m.name, row[0], "", row[1])
		}
	}
	return b.String()
}
