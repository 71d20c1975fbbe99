package daemon

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
)

// newBuild makes a build that is not in the queue yet, for the daemon's own machines.
func (d *Daemon) newBuild(store *localStore, drvPath nix.StorePath, drv *nix.Derivation, substitute bool, by caller) *build {
	now := time.Now()
	b := &build{
		store:           store,
		drvPath:         drvPath,
		drv:             drv,
		caller:          by,
		owners:          owners{by.uid},
		following:       make(map[uint32]int),
		substitute:      substitute,
		lease:           new(lease),
		since:           now,
		asked:           now,
		queued:          now,
		feed:            newFeed(d.opts.StateDir),
		inputs:          inputs{ready: make(chan struct{})},
		tally:           newTally(),
		hooks:           make(map[*hookFollower]struct{}),
		handOverChanged: make(chan struct{}),
	}
	b.users = d.usage
	b.wantedFor(originOf(by, nil), 0)
	return b
}

// startLocked runs a submitted build until its outcome. The dispatcher's mutex
// is held.
func (d *Daemon) startLocked(b *build) {
	ctx, cancel := context.WithCancelCause(d.life)
	b.cancel = cancel
	held := b.lease.retain()
	d.builds.Go(func() {
		defer cancel(nil)
		defer held.release()
		// Thousands of builds may wait, so here, where each needs the smallest stack there
		// is, and not further down, where run looks at what has come.
		_, _ = d.dispatcher.awaitPlace(ctx, b)
		d.run(ctx, b)
	})
}

// offerHook puts a hook's derivation to the scheduler. If the answer is to
// accept, f follows the build: b, or one of the same derivation that is already
// in flight.
func (d *Daemon) offerHook(b *build, f *hookFollower, amWilling bool) scheduler.Decision {
	defer d.logAccepted(b) // without the lock
	q := d.dispatcher
	q.mu.Lock()
	defer q.mu.Unlock()
	if flying := q.shared[b.key()]; flying != nil {
		q.joinTurnLocked(flying, b)
		q.joinHookLocked(f, flying, b.caller)
		return scheduler.Decision{Reply: scheduler.Accept, Machine: flying.place.machine, Why: "it is being built for another caller"}
	}
	if d.refusing() {
		return scheduler.Decision{Reply: scheduler.Postpone, Why: errShutdown.Error()}
	}
	decision := q.queue.Offer(b.request(), amWilling)
	if decision.Reply == scheduler.Accept || decision.Reply == scheduler.AcceptQueued {
		q.submitLocked(b)
		q.joinHookLocked(f, b, b.caller)
		d.startLocked(b)
	}
	return decision
}

// submit puts a derivation whose inputs are known into the queue and returns a
// follower of its build, or of the one of the same derivation that is already in
// flight.
func (d *Daemon) submit(b *build, l limits, inputs []nix.StorePath) (*follower, error) {
	defer d.logAccepted(b) // without the lock
	q := d.dispatcher
	q.mu.Lock()
	defer q.mu.Unlock()
	f := &follower{limits: l}
	switch flying := q.shared[b.key()]; {
	case flying != nil:
		q.joinTurnLocked(flying, b)
		flying.owners = flying.owners.with(b.caller.uid)
		q.joinLocked(f, flying, b.caller)
	case d.stopping():
		return nil, errShutdown
	default:
		q.submitLocked(b)
		q.joinLocked(f, b, b.caller)
		d.startLocked(b)
	}
	f.b.inputs.provide(inputs)
	return f, nil
}

// logAccepted notes that a build was taken in, unless it was not, and another is
// followed instead.
func (d *Daemon) logAccepted(b *build) {
	if b.id != 0 {
		d.log.Info("build accepted", "build_id", b.id, "drv_path", b.drvPath, "system", b.drv.Platform, "user", b.user)
	}
}

// joinLocked makes f, a caller's, one of those who wait for a build.
func (q *dispatcher) joinLocked(f *follower, b *build, by caller) {
	f.b, f.uid = b, by.uid
	b.followers++
	b.following[f.uid]++
	var once sync.Once
	f.leave = func(why error) { once.Do(func() { q.leave(f, why) }) }
}

// joinHookLocked is joinLocked for a hook, whose Nix has asked for the build.
func (q *dispatcher) joinHookLocked(f *hookFollower, b *build, by caller) {
	b.owners = b.owners.with(by.uid)
	q.joinLocked(f.follower, b, by)
	b.hooks[f] = struct{}{}
}

// leave ends a caller's interest. A build that nobody follows is cancelled.
func (q *dispatcher) leave(f *follower, why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	f.b.followers--
	if f.b.following[f.uid]--; f.b.following[f.uid] == 0 {
		delete(f.b.following, f.uid)
	}
	if f.b.followers == 0 {
		f.last = true
		q.forgetLocked(f.b)
		f.b.cancel(why)
		f.b.freeLocked()
	}
}

// ended notes that a build has ended and its log is kept, as far as it is to be.
func (q *dispatcher) ended(b *build) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.ending, b.id)
	b.ended = true
	b.freeLocked()
}

// read finds a build in progress whose log somebody wants to read without following
// it, or one that has ended and whose log is not kept yet: by its id, or if that is
// 0, the last one of a derivation. nil if there is none. The caller must call done
// after the last read.
func (q *dispatcher) read(id scheduler.BuildID, drvPath nix.StorePath) (b *build, done func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if id != 0 {
		b = cmp.Or(q.findLocked(id), q.ending[id])
	} else {
		b = lastOf(drvPath, q.builds, q.ending)
	}
	if b == nil {
		return nil, nil
	}
	b.readers++
	return b, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		b.readers--
		b.freeLocked()
	}
}

// lastOf is the last build of a derivation that is in one of the sets; nil if none is.
func lastOf(drvPath nix.StorePath, sets ...map[scheduler.BuildID]*build) (last *build) {
	for _, set := range sets {
		for _, b := range set {
			if b.drvPath == drvPath && b.first == nil && (last == nil || b.id > last.id) {
				last = b
			}
		}
	}
	return last
}

// freeLocked frees the log once nobody writes or reads it any more.
func (b *build) freeLocked() {
	if b.ended && b.followers == 0 && b.readers == 0 {
		b.feed.log.close()
	}
}

// onlyForLocked tells whether a user, and nobody else, waits for the build. One that
// nobody waits for is its owners'.
func (b *build) onlyForLocked(uid uint32) bool {
	if len(b.following) == 0 {
		return slices.Contains(b.owners, uid)
	}
	return len(b.following) == 1 && b.following[uid] > 0
}

// ownersOf are those who have asked for a build so far.
func (q *dispatcher) ownersOf(b *build) owners {
	q.mu.Lock()
	defer q.mu.Unlock()
	return b.owners
}

// cancel ends a build on purpose. It is returned, for its end may take a while.
func (d *Daemon) cancel(id scheduler.BuildID, by caller) (*build, error) {
	q := d.dispatcher
	q.mu.Lock()
	defer q.mu.Unlock()
	b := q.findLocked(id)
	if b == nil {
		return nil, errNoSuchBuild
	}
	if !by.commands() && !b.onlyForLocked(by.uid) {
		return nil, errNotYours
	}
	q.forgetLocked(b)
	b.cancel(errCancelled)
	return b, nil
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
	b = cmp.Or(b.first, b)
	return len(b.hooks) > 0, b.handOverChanged
}
