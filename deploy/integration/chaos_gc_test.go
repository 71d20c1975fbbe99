package integration

import (
	"context"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// garbageIsCollected has garbage collected on all hosts without a pause while builds
// pass, each of which needs the output of one before: nothing that is needed goes.
func (s *site) garbageIsCollected() {
	s.t.Helper()
	builds := shortOr(12, 100)
	collected := s.collectForever()
	s.allDone(s.askBoth(work{name: "collected", good: builds, size: 20_000, chain: 4, script: "sleep 0.3"}))
	for host, n := range collected() {
		s.t.Logf("%s: %d paths collected meanwhile", host, n)
		if n == 0 {
			s.t.Errorf("%s has collected nothing", host)
		}
	}
	if nightly {
		collected = s.collectForever()
		got := s.askStock(work{name: "collected-stock", good: builds, size: 20_000, chain: 4, script: "sleep 0.3"})[0].result(stockWaits)
		collected()
		s.t.Logf("the stock hook: %s", got)
	}
}

// allDone waits for callers, who must get all that can be built.
func (s *site) allDone(asked []*commission) tally {
	s.t.Helper()
	var all tally
	for _, c := range asked {
		got := c.result(callersWait)
		if len(got.lost) > 0 || got.hung {
			s.t.Errorf("%s: %s\n%s\nIt printed:\n%s", c.what, got, strings.Join(got.lost, "\n"), clip(c.out().Stderr))
		}
		all = all.plus(got)
	}
	s.t.Logf("ours: %s", all)
	return all
}

// pathsDeleted is how nix-store --gc ends.
var pathsDeleted = regexp.MustCompile(`(\d+) store paths deleted`)

// collectForever collects garbage on all hosts, again and again. The function
// that it returns ends that and tells how many paths went, by host.
func (s *site) collectForever() (end func() map[string]int) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	collected := make(map[string]int)
	var mu sync.Mutex
	var loops sync.WaitGroup
	for name, h := range s.hosts() {
		loops.Go(func() {
			n := 0
			for ctx.Err() == nil {
				// Each run to its end, so that none is cut off halfway.
				out, err := h.Run(context.WithoutCancel(ctx), "nix-store", "--gc")
				if err != nil {
					s.t.Errorf("%v", err)
					break
				}
				if m := pathsDeleted.FindStringSubmatch(out.Stdout + out.Stderr); m != nil {
					deleted, _ := strconv.Atoi(m[1])
					n += deleted
				}
				time.Sleep(50 * time.Millisecond)
			}
			mu.Lock()
			collected[name] = n
			mu.Unlock()
		})
	}
	return func() map[string]int {
		cancel()
		loops.Wait()
		return collected
	}
}
