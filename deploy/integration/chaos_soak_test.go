package integration

import (
	"cmp"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

var soakedMachines = []string{"air", "mac", "mini"}

// TestChaosSoak has callers build without a pause while machines and nix-dispatchd
// go through whatever a seed has in store for them.
func TestChaosSoak(t *testing.T) {
	t.Parallel()
	seed, total, longest, callers := uint64(1), 20*time.Second, 4*time.Second, 3
	files := map[string]string{"/root/.ssh/config": impatient}
	if nightly {
		seed, total, longest, callers, files = chaosSeed(), 10*time.Minute, time.Minute, 4, nil
	} else if os.Getenv(seedVariable) != "" {
		seed = chaosSeed()
	}
	t.Logf("SEED=%d", seed)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("SEED=%d: \"make chaos ONLY=Soak SEED=%[1]d\" does the same again", seed)
		}
	})
	s := newSite(t, siteConfig{files: files, machines: []machineConfig{
		{name: "air", scheme: "ssh-ng", user: "nix", columns: "x86_64-linux - 2", host: fleet.HostConfig{NixTrusted: true}},
		{name: "mac", suite: fleet.Sid, columns: "x86_64-linux - 3 2"},
		{name: "mini", suite: fleet.Bookworm, scheme: "ssh-ng", columns: "x86_64-linux - 2"},
	}})
	plan := planFaults(seed, soakedMachines, total, longest)
	for _, f := range plan {
		t.Log(f)
	}
	l := s.openLedger()
	k := soak{s: s, steps: s.stepsOf(plan), clients: make([]client, callers)}
	for n := range k.clients {
		k.clients[n].orders = newOrders(seed, n)
	}
	k.run(total)
	l.settle(ledgerWait)
}

// A soak is faults and clients in progress. All is done by one goroutine.
type soak struct {
	s       *site
	steps   []step // still to come, in order
	clients []client
	all     tally // of those that stayed
	gone    int   // callers that were ended
}

// A step is the beginning or the end of a fault.
type step struct {
	at time.Duration
	do func()
}

// A client makes one order after the other.
type client struct {
	orders *orders
	order  order
	asked  *commission // nil before the first
	left   bool        // it was ended on purpose
}

// stepsOf are the beginnings and ends of faults.
func (s *site) stepsOf(plan []soakFault) []step {
	var steps []step
	for _, f := range plan {
		begin, end := s.faultSteps(f)
		steps = append(steps, step{f.at, begin}, step{f.at + f.lasts, end})
	}
	slices.SortStableFunc(steps, func(a, b step) int { return cmp.Compare(a.at, b.at) })
	return steps
}

// faultSteps begin and end a fault.
func (s *site) faultSteps(f soakFault) (begin, end func()) {
	v := victim{s, s.machines[f.on]}
	nothing := func() {}
	switch f.kind {
	case poweredOff:
		return v.kill, v.heal
	case frozen:
		return v.freeze, v.heal
	case cutOff:
		return v.cutOff, v.heal
	case slowLine:
		return func() { v.must(v.Limit(s.t.Context(), lineRate)) }, func() { v.must(v.Limit(s.t.Context(), 0)) }
	case sshdKilled:
		return v.restartSSHD, nothing
	case remotesKilled:
		return v.killRemotes, nothing
	case noNixDaemon:
		return func() { v.must(v.StopNixDaemon(s.t.Context())) }, func() { v.must(v.StartNixDaemon(s.t.Context())) }
	case collects:
		return func() { s.onHost(v.Host, "nix-store --gc") }, nothing
	case daemonKilled:
		return func() { s.stopDaemon(syscall.SIGKILL) }, func() { s.startUnready() }
	case daemonStopped:
		return s.hangDaemon, s.unhangDaemon
	}
	s.t.Fatalf("what is %q?", f.kind)
	return nil, nil
}

// killRemotes kills what serves builds on the machine.
func (v victim) killRemotes() {
	v.signal(syscall.SIGKILL, "nix-store --serve")
	v.signal(syscall.SIGKILL, "nix-daemon --stdio")
}

// run has clients make orders, and faults happen, for total; then it waits for what
// is under way.
func (k *soak) run(total time.Duration) {
	k.s.t.Helper()
	start := time.Now()
	for busy := true; busy; time.Sleep(50 * time.Millisecond) {
		now := time.Since(start)
		for len(k.steps) > 0 && k.steps[0].at <= now {
			k.steps[0].do()
			k.steps = k.steps[1:]
		}
		busy = len(k.steps) > 0
		for n := range k.clients {
			busy = k.serve(&k.clients[n], now < total) || busy
		}
	}
	k.s.t.Logf("ours: %s; %d callers were ended", k.all, k.gone)
	if k.all.built == 0 {
		k.s.t.Error("nothing was built")
	}
}

// serve does what is to be done for a client, and tells whether it is busy.
func (k *soak) serve(c *client, more bool) bool {
	k.s.t.Helper()
	if c.asked != nil {
		select {
		case <-c.asked.done:
			k.count(c)
		default:
			if age := time.Since(c.asked.began); age > callersWait {
				k.count(c)
			} else if c.order.leaves > 0 && !c.left && age > c.order.leaves {
				c.left = true
				_ = k.s.client.Signal(c.asked.cmd, c.order.signal) // it may just have ended
			}
			return true
		}
	}
	if !more {
		return false
	}
	c.order, c.left = c.orders.next(), false
	k.s.t.Log(c.order)
	c.asked = k.s.ask(c.order.way, k.s.make(c.order.work))
	return true
}

// count adds what a client has got, which ends it if it takes too long.
func (k *soak) count(c *client) {
	k.s.t.Helper()
	asked := c.asked
	c.asked = nil
	if c.left {
		k.gone++
		return
	}
	got := asked.result(callersWait)
	if len(got.lost) > 0 || got.hung {
		k.s.t.Errorf("%s: %s: %s\n%s\nIt printed:\n%s", c.order.work.name, asked.what, got, strings.Join(got.lost, "\n"), clip(asked.out().Stderr))
	}
	k.all = k.all.plus(got)
}
