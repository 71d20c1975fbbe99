package daemon

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestClockJumpsAreNoticed moves the wall clock against the other.
func TestClockJumpsAreNoticed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var off time.Duration
		var jumps []time.Duration
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			watchClock(ctx, func() time.Time { return time.Now().Add(off) }, func(by time.Duration) { jumps = append(jumps, by) })
		}()
		for _, step := range []struct {
			name string
			by   time.Duration
			want int
		}{
			{"nothing", 0, 0}, {"set right", 3 * time.Second, 0}, {"slept", time.Hour, 1}, {"set back", -time.Minute, 2}, {"nothing again", 0, 2},
		} {
			off += step.by
			time.Sleep(time.Minute)
			synctest.Wait()
			if len(jumps) != step.want {
				t.Fatalf("%s: jumps %v, want %d", step.name, jumps, step.want)
			}
		}
		if jumps[0] != time.Hour || jumps[1] != -time.Minute {
			t.Errorf("jumps by %v", jumps)
		}
		stop()
		<-done
	})
}
