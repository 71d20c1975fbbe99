package sshpool

import (
	"context"
	"reflect"
	"time"
)

// Refresh is for when somebody has changed OpenSSH's configuration. A host that is
// down is tried at once, as with [Host.Kick]. For one that is up, ssh is asked
// again; if the answer is another one than it was, a connection is made by it, and
// when that is up the others take no more sessions and end with those they have.
// If it cannot be made, everything stays as it is, and [Status] has the error.
func (h *Host) Refresh() { signal(h.again) }

// renew begins an attempt to connect as ssh_config now has it, if that is another
// way than before.
func (o *owner) renew(ctx context.Context) {
	o.dialing, o.stale = true, false
	o.mu.Lock()
	o.status.RetryAt = time.Time{}
	o.mu.Unlock()
	o.wg.Go(func() {
		before := o.target
		if o.cfg.Local {
			o.dialed <- dialResult{}
			return
		}
		if _, err := o.resolveTarget(ctx, true); err != nil || reflect.DeepEqual(before, o.target) {
			o.dialed <- dialResult{err: err}
			return
		}
		c, err := o.connect(ctx, false)
		if err == nil {
			err = o.probe(ctx, c)
		}
		o.dialed <- dialResult{conn: c, probed: true, replaces: true, err: err}
	})
}
