package daemon

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/scheduler"
)

// A dispatcher owns the scheduler's queue and the builds in flight: every event
// passes through it, and it tells the builds what the queue decided.
// Safe for concurrent use.
type dispatcher struct {
	log *slog.Logger

	mu     sync.Mutex
	queue  *scheduler.Queue
	builds map[scheduler.BuildID]*build
	// ending are the builds that have ended, but whose logs are not kept yet: they are
	// in progress no more, and their logs are read as they were before.
	ending map[scheduler.BuildID]*build
	// shared finds the build that callers of the same derivation share.
	shared map[buildKey]*build
	lastID scheduler.BuildID
	// idGiven is called with each id that is given; nil if nobody wants to know.
	idGiven func(id uint64)
	visits  uint64
}

func newDispatcher(log *slog.Logger) *dispatcher {
	return &dispatcher{
		log:    log,
		queue:  scheduler.New(),
		builds: make(map[scheduler.BuildID]*build),
		ending: make(map[scheduler.BuildID]*build),
		shared: make(map[buildKey]*build),
	}
}

// A placement is what the queue has decided for a build.
type placement struct {
	machine scheduler.MachineID // "" while it waits
	granted bool                // whether it has a build slot
	why     string
	visit   uint64        // counts the builds' stays on machines: a grant begins none
	changed chan struct{} // closed when this is no longer so
}

// carryOutLocked passes the queue's orders on to the builds concerned.
func (d *dispatcher) carryOutLocked(orders []scheduler.Order) {
	for _, o := range orders {
		b := d.builds[o.Build]
		next := placement{machine: o.Machine, why: o.Why, visit: b.place.visit}
		if next.granted = o.Kind == scheduler.Grant; !next.granted {
			d.visits++
			next.visit = d.visits
		}
		b.setPlaceLocked(next)
		d.log.Debug("order", "build_id", o.Build, "kind", o.Kind, "machine", o.Machine, "why", o.Why)
	}
}

// do runs one event of the queue and carries out what follows from it.
func (d *dispatcher) do(event func(q *scheduler.Queue) []scheduler.Order) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.carryOutLocked(event(d.queue))
}

// submitLocked takes a build in and makes it findable by its derivation. The
// caller starts it.
func (d *dispatcher) submitLocked(b *build) {
	b.id = d.nextIDLocked()
	b.place.changed = make(chan struct{})
	b.waiting = time.Now()
	d.builds[b.id] = b
	d.shared[b.key()] = b
	d.carryOutLocked(d.queue.Enqueue(b.request()))
}

// nextID is an id that no build has.
func (d *dispatcher) nextID() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return uint64(d.nextIDLocked())
}

func (d *dispatcher) nextIDLocked() scheduler.BuildID {
	d.lastID++
	if d.idGiven != nil {
		d.idGiven(uint64(d.lastID))
	}
	return d.lastID
}

// skipID keeps ids that are in use from being given again.
func (d *dispatcher) skipID(used uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lastID = max(d.lastID, scheduler.BuildID(used))
}

// remove takes a build out for good, whatever it held. At the same moment it calls
// enter, which adds the build to what has ended; it must not wait for anything.
func (d *dispatcher) remove(b *build, enter func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	enter()
	d.forgetLocked(b)
	b.stopRestLocked()
	delete(d.builds, b.id)
	d.ending[b.id] = b
	d.carryOutLocked(d.queue.Remove(b.id))
}

// forgetLocked lets no further caller join the build.
func (d *dispatcher) forgetLocked(b *build) {
	if d.shared[b.key()] == b {
		delete(d.shared, b.key())
	}
}

// othersFor tells whether a machine other than the given one could take a build,
// now or when it has room.
func (d *dispatcher) othersFor(b *build, than scheduler.MachineID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.ContainsFunc(d.queue.Explain(b.request()).Machines, func(v scheduler.Verdict) bool {
		return v.Machine != than && (v.Reason == scheduler.Eligible || v.Reason == scheduler.SlotsTaken)
	})
}

// restart puts a build that had its slot back to the beginning, for an attempt
// in another way.
func (d *dispatcher) restart(b *build) {
	d.mu.Lock()
	defer d.mu.Unlock()
	b.setPlaceLocked(placement{})
	d.carryOutLocked(d.queue.Remove(b.id))
	d.carryOutLocked(d.queue.Enqueue(b.request()))
}

// place is what is decided for a build now.
func (d *dispatcher) place(b *build) placement {
	d.mu.Lock()
	defer d.mu.Unlock()
	return b.place
}

// awaitPlace waits for a machine.
func (d *dispatcher) awaitPlace(ctx context.Context, b *build) (placement, error) {
	for {
		p := d.place(b)
		if p.machine != "" {
			return p, nil
		}
		select {
		case <-p.changed:
		case <-ctx.Done():
			return p, context.Cause(ctx)
		}
	}
}

// awaitSlot waits until the build may start where it was placed. It returns
// errMoved when it has been given another place.
func (d *dispatcher) awaitSlot(ctx context.Context, b *build, at placement) error {
	for {
		p := d.place(b)
		switch {
		case p.visit != at.visit:
			return errMoved
		case p.granted:
			return nil
		}
		select {
		case <-p.changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// possible tells whether a machine could ever build it.
func (d *dispatcher) possible(r scheduler.Request) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.queue.Possible(r)
}

// explain says where a build could go, in the scheduler's words.
func (d *dispatcher) explain(r scheduler.Request) scheduler.Explanation {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.queue.Explain(r)
}

// strandedPoll is how often builds are looked for that no machine can take.
const strandedPoll = 2 * time.Second

// watchStranded ends builds for which no machine that could run them has been up
// or coming for patience. It returns when ctx ends.
func (d *dispatcher) watchStranded(ctx context.Context, patience time.Duration) {
	since := make(map[scheduler.BuildID]time.Time)
	ticker := time.NewTicker(min(strandedPoll, patience))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			since = d.endStranded(now, since, patience)
		}
	}
}

// watchHopes sees to the machines that stranded builds wait for, until ctx ends:
// those that are down are tried again soon, and those that are parked give way.
func (d *Daemon) watchHopes(ctx context.Context) {
	since := make(map[scheduler.MachineID]time.Time)
	patience := min(d.lastResort, d.opts.MachineWait/2)
	ticker := time.NewTicker(min(strandedPoll, patience))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			since = d.seeToHopes(now, since, patience)
		}
	}
}

func (d *Daemon) seeToHopes(now time.Time, before map[scheduler.MachineID]time.Time, patience time.Duration) map[scheduler.MachineID]time.Time {
	since := make(map[scheduler.MachineID]time.Time)
	for _, id := range d.dispatcher.hopes() {
		m := d.machines.acquire(id)
		if m == nil {
			continue
		}
		first, known := before[id]
		if !known {
			first = now
		}
		since[id] = first
		m.host.Hasten(d.hopeRetry)
		m.condition.hoped(now.Sub(first) >= patience, now)
		m.keeper.tell()
		m.keeper.kick()
		d.machines.release(m)
	}
	return since
}

// lastResort is how long builds wait for a machine to have room that is short of
// something, when no other could do them; then it gets them all the same.
const lastResort = 30 * time.Second

// hopes are the machines that stranded builds wait for.
func (d *dispatcher) hopes() []scheduler.MachineID {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.queue.Hopes()
}

func (d *dispatcher) endStranded(now time.Time, before map[scheduler.BuildID]time.Time, patience time.Duration) map[scheduler.BuildID]time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	since := make(map[scheduler.BuildID]time.Time)
	for _, id := range d.queue.Stranded() {
		first, known := before[id]
		if !known {
			first = now
		}
		since[id] = first
		if now.Sub(first) >= patience {
			explanation, _ := d.queue.ExplainBuild(id)
			d.builds[id].cancel(&noMachineError{waited: patience, explanation: explanation})
		}
	}
	return since
}

// snapshot is the queue's state and the builds', taken at one moment.
// Of the builds that wait for a machine maxQueued are told of, those that came
// first; 0 means all.
func (d *dispatcher) snapshot(maxQueued int) (scheduler.Snapshot, []*dispatchv1.BuildInfo) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.queue.Snapshot()
	var infos []*dispatchv1.BuildInfo
	queued := 0
	for _, sb := range s.Builds {
		if sb.Phase == scheduler.Queued || sb.Phase == scheduler.Lost {
			if queued++; maxQueued > 0 && queued > maxQueued {
				continue
			}
		}
		info := d.builds[sb.ID].infoLocked(sb)
		info.Reason = sb.Why
		infos = append(infos, info)
	}
	return s, infos
}

// machines are the scheduler's machines as they are now.
func (d *dispatcher) machines() []scheduler.MachineStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.queue.Machines()
}

// A load is what a scrape needs of the queue and the builds, at one moment.
type load struct {
	machines []scheduler.MachineStatus
	systems  []scheduler.SystemStatus
	builds   int // in progress
	// waiting is since when the build has waited that has waited longest for a
	// machine; zero if none waits.
	waiting time.Time
}

// load makes nothing for each build: it must not hold up ten thousand of them. At the
// same moment it calls also, which must not wait for anything.
func (d *dispatcher) load(also func()) load {
	d.mu.Lock()
	defer d.mu.Unlock()
	also()
	l := load{machines: d.queue.Machines(), systems: d.queue.QueuedBySystem(), builds: len(d.builds)}
	for _, b := range d.builds {
		if !b.waiting.IsZero() && (l.waiting.IsZero() || b.waiting.Before(l.waiting)) {
			l.waiting = b.waiting
		}
	}
	return l
}
