package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
)

// A build is one derivation on its way through the daemon, shared by all who
// asked for it. It ends when it is done or when its last follower has left.
type build struct {
	id         scheduler.BuildID
	drvPath    nix.StorePath
	drv        *nix.Derivation
	caller     caller // who asked first
	user       string // whose it is, for people
	substitute bool   // whether the machine may substitute inputs
	local      bool   // whether the caller's own Nix could build it
	chain      int    // of derivations that wait for it, as far as is known
	lease      *lease // on the list of machines that it goes by
	store      *localStore
	users      *usage.Ledger
	since      time.Time
	asked      time.Time // when the caller asked for all that it belongs to

	feed   *feed
	cancel context.CancelCauseFunc

	// inputs is set once, by the first follower that knows them.
	inputs inputs

	// first is set for a second attempt beside a build: that build. See hedge.
	first *build

	// queued is when the build began to wait for a machine; zero once it has
	// one. Its goroutine's own.
	queued time.Time
	// at is where the last attempt was made. Its goroutine's own.
	at      scheduler.MachineID
	account account
	tally   tally // of its attempts. Its goroutine's own

	// The dispatcher's mutex guards the rest.

	place     placement
	turn      string // by which it goes, see origin
	priority  int
	waiting   time.Time // since when it has had no machine; zero while it has one
	rest      *time.Timer
	owners    owners // who asked for it; those who attached have not
	followers int
	following map[uint32]int // the followers, by user id
	readers   int            // of the log, who do not follow
	ended     bool
	// hooks are the followers whose Nix still holds output locks.
	hooks           map[*hookFollower]struct{}
	handOverChanged chan struct{} // closed and replaced when hooks changes
}

// A drvKey is a derivation of a store.
type drvKey struct {
	store   string
	drvPath nix.StorePath
}

// A buildKey is what callers have in common who share a build: the derivation and
// the list of machines.
type buildKey struct {
	drvKey
	list string
}

func (b *build) drvKey() drvKey { return drvKey{b.store.key, b.drvPath} }

func (b *build) key() buildKey { return buildKey{b.drvKey(), b.lease.key} }

func (b *build) request() scheduler.Request {
	return scheduler.Request{
		ID:       b.id,
		List:     b.lease.key,
		System:   b.drv.Platform,
		Features: b.drv.RequiredSystemFeatures(),
		Caller:   b.turn,
		Priority: b.priority,
		Since:    b.asked,
		Chain:    b.chain,

		CouldBuildLocally: b.local,
	}
}

func (b *build) setPlaceLocked(p placement) {
	close(b.place.changed)
	p.changed = make(chan struct{})
	b.place = p
	if b.waiting = (time.Time{}); p.machine == "" {
		b.waiting = time.Now()
	}
}

// event wraps news of this build for its followers.
func (b *build) event() *dispatchv1.BuildEvent {
	return &dispatchv1.BuildEvent{BuildId: uint64(cmp.Or(b.first, b).id), DrvPath: string(b.drvPath)}
}

func (b *build) infoLocked(s scheduler.BuildStatus) *dispatchv1.BuildInfo {
	info := &dispatchv1.BuildInfo{
		Id:      uint64(b.id),
		DrvPath: string(b.drvPath),
		Phase:   phases[s.Phase],
		Machine: s.Machine.URI(),
		Since:   timestamppb.New(b.since),
		Callers: uint32(b.followers), //nolint:gosec // a count of open streams
		System:  b.drv.Platform,

		Unplaceable: s.Unplaceable,
		User:        b.user,
		Priority:    int32(s.Priority), //nolint:gosec // bounded when it came in
	}
	if since, _ := b.feed.buildingSince(); !since.IsZero() {
		info.BuildingSince = timestamppb.New(since)
	}
	return info
}

var phases = map[scheduler.Phase]dispatchv1.Phase{
	scheduler.Queued:   dispatchv1.Phase_PHASE_QUEUED,
	scheduler.Staging:  dispatchv1.Phase_PHASE_COPYING,
	scheduler.Staged:   dispatchv1.Phase_PHASE_STAGED,
	scheduler.Running:  dispatchv1.Phase_PHASE_BUILDING,
	scheduler.Fetching: dispatchv1.Phase_PHASE_FETCHING,
	scheduler.Lost:     dispatchv1.Phase_PHASE_QUEUED,
}

// inputs is a set of store paths that somebody provides later.
type inputs struct {
	once  sync.Once
	ready chan struct{}
	paths []nix.StorePath
}

func (i *inputs) provide(paths []nix.StorePath) {
	i.once.Do(func() {
		i.paths = paths
		close(i.ready)
	})
}

func (i *inputs) await(ctx context.Context) ([]nix.StorePath, error) {
	select {
	case <-i.ready:
		return i.paths, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// A noMachineError says that no machine that could run a build came up in time.
type noMachineError struct {
	waited      time.Duration
	explanation scheduler.Explanation
}

// Error tells of the machines that could build it only, if there are any.
func (e *noMachineError) Error() string {
	x := e.explanation
	if x.Situation == scheduler.Impossible { // the list has changed since it was accepted
		return fmt.Sprintf("no machine has been able to build this for %s: %s", e.waited, x.Text(maxExplained))
	}
	x.Machines = slices.DeleteFunc(slices.Clone(x.Machines), func(v scheduler.Verdict) bool {
		return v.Reason != scheduler.Eligible && v.Reason <= scheduler.NoSlots
	})
	return fmt.Sprintf("no machine that could build this has been up for %s: %s", e.waited, x.Text(maxExplained))
}

// notUpPause is the time between finding that a build's machine is no longer listed
// and asking the scheduler again.
const notUpPause = 100 * time.Millisecond

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// run takes the build from the queue to its outcome, in the build's one goroutine.
func (d *Daemon) run(ctx context.Context, b *build) {
	log := d.log.With("build_id", b.id, "drv_path", b.drvPath)
	o, err := d.attempts(ctx, b, log)
	if err != nil {
		o = outcomeOf(err)
		if _, local := errors.AsType[*localError](err); !local {
			o.machine = cmp.Or(o.machine, d.dispatcher.place(b).machine.URI())
		}
	}
	log.Info("build ended", "status", o.status, "machine", o.machine, "err", o.err)
	d.conclude(b, o)
}

// try tries the build on the machine the scheduler chooses, as one of r's attempts. It
// returns the machine's verdict, or why there is none.
func (d *Daemon) try(ctx context.Context, b *build, r *race) (outcome, error) {
	ctx, leave := r.enter(ctx, b)
	defer leave()
	if _, err := b.inputs.await(ctx); err != nil {
		return outcome{}, err
	}
	place, err := d.dispatcher.awaitPlace(ctx, b)
	if err != nil {
		return outcome{}, err
	}
	if !b.queued.IsZero() { // else it was merely moved
		d.metrics.placed(b)
		b.account.queued += time.Since(b.queued)
		b.queued = time.Time{}
	}
	b.postPlaced(place)
	m := d.machines.acquire(place.machine)
	if m == nil {
		// It was moved away, and nothing else kept the machine.
		return outcome{}, cmp.Or(sleep(ctx, notUpPause), errMoved)
	}
	defer d.machines.release(m)
	b.at = place.machine
	b.tally.begin(&m.absences)
	b.feed.startCopying(time.Now())
	defer b.feed.stopCopying()
	ctx, stop := d.untilMoved(ctx, b, place)
	defer stop()
	// nix-store --serve substitutes nothing any more after its first build.
	process, err := m.open(ctx, b.substitute && !m.ng, b.store)
	if err != nil {
		return outcome{}, m.blamed(ctx, err)
	}
	b.account.attempts++
	a := &attempt{d: d, b: b, m: m, r: process, race: r, place: place}
	defer func() {
		if confirmed := process.close(); !confirmed && a.running {
			a.loseSlot()
		}
	}()
	o, err := a.run(ctx)
	if err != nil {
		return outcome{}, m.blamed(ctx, err)
	}
	m.learn(ctx, nil)
	return o, nil
}

func (b *build) postPlaced(p placement) {
	e := b.event()
	e.Event = &dispatchv1.BuildEvent_Placed{Placed: &dispatchv1.Placed{Machine: p.machine.URI(), Reason: p.why}}
	b.feed.post(e)
}

// untilMoved returns a context that ends, with errMoved, when the build is given
// another place. The caller must call stop, which waits for the watcher.
func (d *Daemon) untilMoved(ctx context.Context, b *build, at placement) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		for {
			p := d.dispatcher.place(b)
			if p.visit != at.visit {
				cancel(errMoved)
				return
			}
			select {
			case <-p.changed:
			case <-ctx.Done():
				return
			}
		}
	})
	return ctx, func() {
		cancel(nil)
		watcher.Wait()
	}
}
