package integration

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// TestChaosCallers has several things happen on the client, one after the other, while
// nothing happens to its machines, one of each protocol. What each is says the function.
func TestChaosCallers(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "mac", suite: fleet.Sid, columns: "x86_64-linux - 4"},
		{name: "mini", suite: fleet.Bookworm, scheme: "ssh-ng", columns: "x86_64-linux - 4"},
	}})
	s.admit("bob")
	random := seeded(t)
	for _, step := range []struct {
		name string
		run  func()
	}{
		{"callers are killed", func() { s.callersAreKilled(random) }},
		{"thousands of hook calls are open", s.hookCallsAreOpen},
		{"garbage is collected", s.garbageIsCollected},
		{"the daemon is killed", func() { s.daemonIsKilled(random) }},
	} {
		t.Log(step.name)
		l := s.openLedger()
		step.run()
		l.settle(ledgerWait)
	}
}

// callersAreKilled ends half of the callers at random moments, in several ways: the
// others get what they want, and nothing is left of those that went.
func (s *site) callersAreKilled(random *rand.Rand) {
	s.t.Helper()
	callers := shortOr(6, 24)
	signals := []syscall.Signal{syscall.SIGKILL, syscall.SIGINT, syscall.SIGTERM}
	var stay []*commission
	var doomed sync.WaitGroup
	for n := range callers {
		pieces := s.make(work{name: fmt.Sprintf("caller-%d", n), good: 4, size: 50_000, script: "sleep 1"})
		c := s.ask(n%3, pieces)
		if n%2 == 0 {
			stay = append(stay, c)
			continue
		}
		after, sig := time.Duration(random.IntN(4000))*time.Millisecond, signals[random.IntN(len(signals))]
		s.t.Logf("%s: gets %v after %v", c.what, sig, after)
		doomed.Go(func() {
			select {
			case <-time.After(after):
				_ = s.client.Signal(c.cmd, sig) // it may be done
				<-c.done
			case <-c.done:
			}
		})
	}
	s.allDone(stay)
	doomed.Wait()
}

// ask has one of three ways in ask for pieces.
func (s *site) ask(way int, pieces []piece) *commission {
	s.t.Helper()
	switch way {
	case 0:
		return s.askNix("alice", pieces)
	case 1:
		return s.askNix("root", pieces)
	default:
		return s.askDispatch(pieces)
	}
}

// daemonIsKilled kills nix-dispatchd again and again while plain Nix builds: the user
// notices nothing but the time.
func (s *site) daemonIsKilled(random *rand.Rand) {
	s.t.Helper()
	kills, builds := shortOr(3, 10), shortOr(16, 100)
	var asked []*commission
	for n, user := range []string{"alice", "root"} {
		asked = append(asked, s.askNix(user, s.make(work{name: fmt.Sprintf("survivor-%d", n), good: builds, size: 20_000, script: "sleep 1"})))
	}
	for range kills {
		time.Sleep(time.Second + time.Duration(random.IntN(2000))*time.Millisecond)
		s.stopDaemon(syscall.SIGKILL)
		s.startUnready()
	}
	s.allDone(asked)
}

// seeded is a source of random numbers whose seed is told.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := chaosSeed()
	t.Logf("SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}
