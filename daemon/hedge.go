package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
)

// This file starts a build a second time, beside the first, when its machine has not
// answered for long and another machine has a free slot. Derivations are pure, so both
// results are right. Whichever machine has a verdict first wins: the other attempt is
// ended, and its slot held if its end is not confirmed. Only the winner's outputs are
// imported.

const (
	// hedgeAfter is how long a machine has been suspect when its builds are started
	// elsewhere as well.
	hedgeAfter = 10 * time.Second
	// hedgeLook is how often running builds are looked at.
	hedgeLook = time.Second
)

// errOutrun ends the attempt whose machine did not have the first verdict.
var errOutrun = errors.New("another machine built it first")

// A race is an attempt at a build and the second one beside it, if there is one.
// Safe for concurrent use.
type race struct {
	ctx context.Context //nolint:containedctx // the build's, for the second attempt

	mu     sync.Mutex // protects following fields
	won    *build     // nil until one attempt has a verdict
	stops  map[*build]context.CancelCauseFunc
	closed bool          // no second attempt may begin
	second *build        // nil if there is none
	over   chan struct{} // closed when second has ended

	// How second ended; valid once over is closed.
	o   outcome
	err error
}

func newRace(ctx context.Context) *race {
	return &race{ctx: ctx, stops: make(map[*build]context.CancelCauseFunc)}
}

// enter makes b's attempt one that ends when another one wins. The caller must call
// leave.
func (r *race) enter(ctx context.Context, b *build) (_ context.Context, leave func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.won != nil {
		cancel(errOutrun)
	}
	r.stops[b] = cancel
	return ctx, func() { cancel(nil) }
}

// win reports whether b's verdict is the first. It ends the other attempt then.
func (r *race) win(b *build) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.won != nil {
		return false
	}
	r.won = b
	for other, stop := range r.stops {
		if other != b {
			stop(errOutrun)
		}
	}
	return true
}

// settle ends the race, once its first attempt has ended with o and err, and returns
// how it ended. While the second attempt goes on, the build has not failed.
func (r *race) settle(b *build, o outcome, err error) (outcome, error) {
	r.mu.Lock()
	r.closed = true
	second := r.second
	r.mu.Unlock()
	if second == nil {
		return o, err
	}
	<-r.over
	b.account.add(second.account)
	if r.err == nil || errors.Is(err, errOutrun) {
		return r.o, r.err
	}
	return o, err
}

// attempt tries the build on the machine that the scheduler chooses, and on a second
// one if that does not answer. It returns a machine's verdict, or why there is none.
func (d *Daemon) attempt(ctx context.Context, b *build) (outcome, error) {
	r := newRace(ctx)
	o, err := d.try(ctx, b, r)
	return r.settle(b, o, err)
}

// hedges are the attempts whose remote build runs. Safe for concurrent use.
type hedges struct {
	mu      sync.Mutex
	running map[*attempt]struct{}
}

// add adds an attempt until remove is called.
func (h *hedges) add(a *attempt) (remove func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.running == nil {
		h.running = make(map[*attempt]struct{})
	}
	h.running[a] = struct{}{}
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.running, a)
	}
}

// suspect are those on machines that have been suspect for so long, the oldest builds
// first.
func (h *hedges) suspect(now time.Time, after time.Duration) []*attempt {
	h.mu.Lock()
	defer h.mu.Unlock()
	var late []*attempt
	for a := range h.running {
		if since := a.m.suspectSince(); !since.IsZero() && now.Sub(since) >= after {
			late = append(late, a)
		}
	}
	slices.SortFunc(late, func(a, b *attempt) int { return cmp.Compare(a.b.id, b.b.id) })
	return late
}

// watchHedges starts second attempts until ctx ends.
func (d *Daemon) watchHedges(ctx context.Context) {
	if d.opts.NoHedge {
		return
	}
	ticker := time.NewTicker(hedgeLook)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			for _, a := range d.hedges.suspect(now, d.hedgeAfter) {
				d.hedge(a)
			}
		}
	}
}

// hedge starts a second attempt beside a, if there is none and another machine has a
// free slot. Fixed outputs are fetched from somebody, who is not asked twice.
func (d *Daemon) hedge(a *attempt) {
	r := a.race
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.b.first != nil || a.b.drv.ContentAddressed() || r.closed || r.won != nil || r.second != nil || d.stopping() {
		return
	}
	second := a.b.again(a.given)
	ctx, cancel := context.WithCancelCause(r.ctx)
	second.cancel = cancel
	if !d.dispatcher.placeSecond(second, a.place.machine) {
		cancel(nil)
		return
	}
	r.second, r.over = second, make(chan struct{})
	at := d.dispatcher.place(second).machine.URI()
	a.b.feed.note(fmt.Sprintf("%s does not answer; the build is started on %s as well", a.place.machine.URI(), at))
	log := d.log.With("build_id", a.b.id, "drv_path", a.b.drvPath, "machine", a.place.machine.URI(), "second", at)
	log.Warn("the machine of a running build does not answer, starting the build on a second one as well")
	d.builds.Go(func() { // the first attempt's goroutine is counted, so this may be added
		defer close(r.over)
		defer cancel(nil)
		r.o, r.err = d.try(ctx, second, r)
		d.dispatcher.removeSecond(second)
		result := hedgeWon
		if r.err != nil {
			result = hedgeFailed
			if errors.Is(r.err, errOutrun) {
				result = hedgeOutrun
			}
		}
		d.metrics.hedges.WithLabelValues(result).Inc()
		log.Info("second attempt ended", "result", result, "err", r.err)
	})
}

// How a second attempt can end, as label values.
const (
	hedgeWon    = "won"
	hedgeOutrun = "outrun" // the first machine answered again and was quicker
	hedgeFailed = "failed"
)

// again returns a build for a second attempt at b, which is the first. given are b's
// inputs. It tells b's followers what it does.
func (b *build) again(given []nix.StorePath) *build {
	second := &build{
		first: b, drvPath: b.drvPath, drv: b.drv, caller: b.caller, user: b.user,
		substitute: b.substitute, local: b.local, chain: b.chain, lease: b.lease,
		store: b.store, users: b.users, since: b.since, asked: b.asked, feed: b.feed,
		inputs: inputs{ready: make(chan struct{})}, tally: newTally(),
	}
	second.inputs.provide(given)
	return second
}

// placeSecond gives a second attempt a free slot of a machine that answers, and
// reports whether there is one. except does not count.
func (d *dispatcher) placeSecond(b *build, except scheduler.MachineID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	b.turn, b.priority = b.first.turn, b.first.priority
	r := b.request()
	r.Exclude, r.Rest = []scheduler.MachineID{except}, "while it runs there"
	e := d.queue.Explain(r)
	up := slices.ContainsFunc(d.queue.Machines(), func(m scheduler.MachineStatus) bool {
		return m.ID == e.Chosen && m.State == scheduler.Up
	})
	if e.Situation != scheduler.SlotFree || !up {
		return false
	}
	b.id = d.nextIDLocked()
	r.ID = b.id
	b.place.changed = make(chan struct{})
	d.builds[b.id] = b
	d.carryOutLocked(d.queue.Enqueue(r))
	return true
}

// removeSecond takes a second attempt out for good.
func (d *dispatcher) removeSecond(b *build) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.builds, b.id)
	d.carryOutLocked(d.queue.Remove(b.id))
}

// findLocked returns the build with an id, or the first one if it is a second attempt; nil
// if there is none.
func (d *dispatcher) findLocked(id scheduler.BuildID) *build {
	b := d.builds[id]
	if b != nil && b.first != nil {
		return b.first
	}
	return b
}
