package daemon

import (
	"context"
	"os"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
)

// newBuild makes a build that is not in the queue yet.
func (d *Daemon) newBuild(drvPath nix.StorePath, drv *nix.Derivation, substitute bool, by caller) *build {
	now := time.Now()
	return &build{
		drvPath:         drvPath,
		drv:             drv,
		caller:          by,
		substitute:      substitute,
		since:           now,
		queued:          now,
		feed:            newFeed(d.opts.StateDir),
		inputs:          inputs{ready: make(chan struct{})},
		hooks:           make(map[*hookFollower]struct{}),
		handOverChanged: make(chan struct{}),
	}
}

// startLocked runs a submitted build until its outcome. The dispatcher's mutex
// is held.
func (d *Daemon) startLocked(b *build) {
	ctx, cancel := context.WithCancelCause(d.life)
	b.cancel = cancel
	d.builds.Go(func() {
		defer cancel(nil)
		d.run(ctx, b)
	})
}

// offerHook puts a hook's derivation to the scheduler. If the answer is to
// accept, f follows the build: b, or one of the same derivation that is already
// in flight.
func (d *Daemon) offerHook(b *build, f *hookFollower, amWilling bool) scheduler.Decision {
	q := d.dispatcher
	q.mu.Lock()
	defer q.mu.Unlock()
	if flying := q.byDrv[b.drvPath]; flying != nil {
		f.joinLocked(flying)
		return scheduler.Decision{Reply: scheduler.Accept, Machine: flying.place.machine, Why: "it is being built for another caller"}
	}
	decision := q.queue.Offer(b.request(), amWilling)
	if decision.Reply == scheduler.Accept || decision.Reply == scheduler.AcceptQueued {
		q.submitLocked(b)
		f.joinLocked(b)
		d.startLocked(b)
	}
	return decision
}

// submit puts a derivation whose inputs are known into the queue and returns a
// follower of its build, or of the one of the same derivation that is already in
// flight.
func (d *Daemon) submit(b *build, l limits, inputs []nix.StorePath) *follower {
	q := d.dispatcher
	q.mu.Lock()
	defer q.mu.Unlock()
	f := &follower{limits: l}
	if flying := q.byDrv[b.drvPath]; flying != nil {
		f.joinLocked(flying)
	} else {
		q.submitLocked(b)
		f.joinLocked(b)
		d.startLocked(b)
	}
	f.b.inputs.provide(inputs)
	return f
}

func (f *follower) joinLocked(b *build) {
	f.b = b
	b.followers++
}

func (f *hookFollower) joinLocked(b *build) {
	f.follower.joinLocked(b)
	b.hooks[f] = struct{}{}
}

// unfollow ends a caller's interest. A build that nobody follows is cancelled.
func (d *Daemon) unfollow(f *follower) {
	q := d.dispatcher
	q.mu.Lock()
	defer q.mu.Unlock()
	f.b.followers--
	if f.b.followers == 0 {
		q.forgetLocked(f.b)
		f.b.cancel(errCancelled)
		f.b.freeLocked()
	}
}

// ended notes that a build's goroutine writes to its feed no more.
func (q *dispatcher) ended(b *build) {
	q.mu.Lock()
	defer q.mu.Unlock()
	b.ended = true
	b.freeLocked()
}

// freeLocked frees the log once nobody writes or reads it any more.
func (b *build) freeLocked() {
	if b.ended && b.followers == 0 {
		b.feed.log.close()
	}
}

// cancel ends a build on purpose.
func (d *Daemon) cancel(id scheduler.BuildID, by caller) error {
	q := d.dispatcher
	q.mu.Lock()
	defer q.mu.Unlock()
	b := q.builds[id]
	if b == nil {
		return errNoSuchBuild
	}
	if by.uid != 0 && by.uid != uint32(os.Geteuid()) && by.uid != b.caller.uid {
		return errNotYours
	}
	q.forgetLocked(b)
	b.cancel(errCancelled)
	return nil
}

// noLocks notes that a hook has freed its output locks, or has gone.
func (q *dispatcher) noLocks(f *hookFollower) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(f.b.hooks, f)
	close(f.b.handOverChanged)
	f.b.handOverChanged = make(chan struct{})
}

// pendingHandOver tells whether a hook that follows the build still holds its
// output locks; changed is closed when that may have changed.
func (q *dispatcher) pendingHandOver(b *build) (pending bool, changed <-chan struct{}) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(b.hooks) > 0, b.handOverChanged
}
