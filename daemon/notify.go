package daemon

import (
	"context"
	"time"

	"nixdispatch/scheduler"
)

// What a service manager is told (sd_notify(3)).
const (
	notifyReady    = "READY=1"
	notifyStopping = "STOPPING=1"
	notifyAlive    = "WATCHDOG=1"
)

func (d *Daemon) notify(state string) {
	if d.opts.Notify != nil {
		d.opts.Notify(state)
	}
}

// keepTelling tells the service manager, twice in each interval, that the daemon
// is alive: that its dispatcher, which everything passes through, gets its turn.
// A daemon that is stuck falls silent, and is restarted.
func (d *Daemon) keepTelling(ctx context.Context, interval time.Duration) {
	if interval <= 0 {
		return
	}
	tick := time.NewTicker(interval / 2)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			d.dispatcher.do(func(*scheduler.Queue) []scheduler.Order { return nil })
			d.notify(notifyAlive)
		case <-ctx.Done():
			return
		}
	}
}
