package daemon

import (
	"context"
	"time"

	"nixdispatch/sshpool"
)

// How jumps of the clock are noticed.
const (
	// clockLook is how often the clocks are compared, and clockJump how far one must be
	// off for that to be a jump.
	clockLook = 5 * time.Second
	clockJump = 10 * time.Second
	// wakePatience is how long a connection may take to show life then.
	wakePatience = 10 * time.Second
)

// watchClock notices when the wall clock jumps, as it does while a computer sleeps,
// or this process was stopped: then much may have happened to the connections that
// no timer tells of, so they are looked at. It returns when ctx ends. wall is the
// wall clock.
func watchClock(ctx context.Context, wall func() time.Time, jumped func(by time.Duration)) {
	ticker := time.NewTicker(clockLook)
	defer ticker.Stop()
	// The monotonic clock does not run while the computer sleeps, and runs while only
	// the process does.
	lastWall, last := wall().Round(0), time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		nowWall, now := wall().Round(0), time.Now()
		passed := now.Sub(last)
		by := nowWall.Sub(lastWall) - passed
		if passed-clockLook > by.Abs() {
			by = passed - clockLook
		}
		lastWall, last = nowWall, now
		if by.Abs() >= clockJump {
			jumped(by)
		}
	}
}

// wake has all connections looked at.
func (d *Daemon) wake(pool *sshpool.Pool, by time.Duration) {
	d.log.Warn("the clock has jumped, the connections to machines are looked at", "by", by.Round(time.Millisecond))
	pool.Wake(wakePatience)
}
