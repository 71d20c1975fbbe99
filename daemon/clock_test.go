package daemon

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestClockJumpsAreNoticed moves the wall clock against the other.
func TestClockJumpsAreNoticed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex // guards the two
		var off time.Duration
		var jumps []time.Duration
		wall := func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			return time.Now().Add(off)
		}
		jumped := func(by time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			jumps = append(jumps, by)
		}
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			watchClock(ctx, wall, jumped)
		}()
		for _, step := range []struct {
			name string
			by   time.Duration
			want int
		}{
			{"nothing", 0, 0}, {"set right", 3 * time.Second, 0}, {"slept", time.Hour, 1}, {"set back", -time.Minute, 2}, {"nothing again", 0, 2},
		} {
			mu.Lock()
			off += step.by
			mu.Unlock()
			time.Sleep(time.Minute)
			synctest.Wait()
			mu.Lock()
			n := len(jumps)
			mu.Unlock()
			if n != step.want {
				t.Fatalf("%s: %d jumps, want %d", step.name, n, step.want)
			}
		}
		stop()
		<-done
		if jumps[0] != time.Hour || jumps[1] != -time.Minute {
			t.Errorf("jumps by %v", jumps)
		}
	})
}
