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

// plainSite has a machine of each protocol that nothing happens to.
func plainSite(t *testing.T, slots int) *site {
	t.Helper()
	columns := fmt.Sprintf("x86_64-linux - %d", slots)
	return newSite(t, siteConfig{machines: []machineConfig{
		{name: "mac", suite: fleet.Sid, columns: columns},
		{name: "mini", suite: fleet.Bookworm, scheme: "ssh-ng", columns: columns},
	}})
}

// TestChaosCallersKilled ends half of the callers at random moments, in several
// ways: the others get what they want, and nothing is left of those that went.
func TestChaosCallersKilled(t *testing.T) {
	t.Parallel()
	callers := 6
	if wholeChaos {
		callers = 24
	}
	random := seeded(t)
	s := plainSite(t, 4)
	l := s.openLedger()
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
		t.Logf("%s: gets %v after %v", c.what, sig, after)
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
	l.settle(ledgerWait)
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

// TestChaosDaemonKilled kills nix-dispatchd again and again while plain Nix builds:
// the user notices nothing but the time.
func TestChaosDaemonKilled(t *testing.T) {
	t.Parallel()
	kills, builds := 3, 20
	if wholeChaos {
		kills, builds = 10, 100
	}
	random := seeded(t)
	s := plainSite(t, 4)
	l := s.openLedger()
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
	l.settle(ledgerWait)
}

// seeded is a source of random numbers whose seed is told.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := chaosSeed()
	t.Logf("SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}
