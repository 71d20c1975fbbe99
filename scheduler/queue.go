package scheduler

import (
	"fmt"
	"slices"
	"time"
)

// A BuildID names a build for as long as the Queue knows it. The caller chooses it.
type BuildID uint64

// A Request is what a build asks for.
type Request struct {
	ID BuildID
	// List is the list of machines it may go to.
	List string
	// System is the derivation's, such as "x86_64-linux" or "builtin".
	System string
	// Features are the required system features, in any order.
	Features []string
	// Caller names whose build it is: callers take turns.
	Caller string
	// Priority puts the build before all queued builds of lower priority,
	// whosever they are; 0 is normal. The caller decides who may set it.
	Priority int
	// Since is when it was asked for. A caller's builds go in this order; those that
	// were asked for together, as parts of one graph, have the same.
	Since time.Time
	// Chain is how many derivations wait for this one in the longest chain, each of
	// them for the one before, as far as the caller knows: 0 if none does. The build
	// goes before others that were asked for together with it and have a shorter chain.
	Chain int
	// CouldBuildLocally tells that the caller's own Nix could build it too.
	CouldBuildLocally bool
	// Exclude names machines it already failed on; their URIs count. See Requeue.
	Exclude []MachineID
	// Rest keeps it from these machines though no other can take it. It says for how
	// long, in words such as "until 10:03:05"; "" if it does not.
	Rest string
}

// A Phase is how far a build has come; see the package comment.
type Phase int

// The phases of a build.
const (
	Queued Phase = iota
	Staging
	Staged
	Running
	Fetching
	Lost
)

// String returns the phase as the package comment names it.
func (p Phase) String() string {
	if p < 0 || int(p) >= len(phaseNames) {
		return fmt.Sprintf("phase %d", int(p))
	}
	return phaseNames[p]
}

var phaseNames = [...]string{"queued", "staging", "staged", "running", "fetching", "lost"}

// An OrderKind is what an Order demands.
type OrderKind int

// The kinds of orders.
const (
	// Place: the build goes to Machine; start copying its inputs there.
	Place OrderKind = iota
	// Grant: the build has a slot on Machine, where it is; start it.
	Grant
	// Move: the build leaves From for Machine; start copying its inputs there.
	Move
	// Withdraw: the build leaves From and is queued again, because From may not build
	// it any more since the machines changed, or is suspect. A Place may follow at once.
	Withdraw
)

// String returns the kind as scenarios and logs write it.
func (k OrderKind) String() string {
	switch k {
	case Place:
		return "place"
	case Grant:
		return "grant"
	case Move:
		return "move"
	case Withdraw:
		return "withdraw"
	default:
		return fmt.Sprintf("order %d", int(k))
	}
}

// An Order is something the caller must do now.
type Order struct {
	Kind  OrderKind
	Build BuildID
	// Machine is where the build is from now on, "" after Withdraw.
	Machine MachineID
	// From is where it was, for Move and Withdraw.
	From MachineID
	// Why is for people.
	Why string
}

// A build is a Request with where it is.
type build struct {
	req         Request
	requirement *requirement
	class       *class
	caller      *caller
	system      *systemQueue
	seq         uint64 // age
	phase       Phase
	// machine is where it is, or where it ran; nil when queued.
	machine *machine
	index   int    // in its buildHeap, while queued
	turn    uint64 // counts placings, while placed
}

// placed tells whether b counts in its machine's placed.
func (b *build) placed() bool {
	return b.phase == Staging || b.phase == Staged || b.phase == Running
}

// A systemKey is a system, and the list of machines that builds for it go to.
type systemKey struct{ list, system string }

// A systemQueue counts the queued builds for one system and list.
type systemQueue struct {
	queued int
	refs   int // builds for the system, in any phase
}

// A Queue decides which machine runs which build. It is not safe for
// concurrent use. The orders a call returns belong to the caller.
type Queue struct {
	machines []*machine // in list order
	removed  []*machine // no longer listed, but something is on them
	byID     map[MachineID]*machine
	pools    map[string]*pool // by URI
	builds   map[BuildID]*build
	callers  map[string]*caller
	systems  map[systemKey]*systemQueue

	requirements     map[string]*requirement
	usedRequirements int // those with builds
	reaches          map[reachKey]*reach
	waiting          []*reach // those with queued builds, in no order that matters

	suspects int // machines that are suspect, listed or not

	open    int // machines with a free slot
	lastSeq uint64
	turns   uint64
	orders  []Order // of the event being worked on
}

// New returns a Queue without machines and builds.
func New() *Queue {
	return &Queue{
		byID:         make(map[MachineID]*machine),
		builds:       make(map[BuildID]*build),
		callers:      make(map[string]*caller),
		systems:      make(map[systemKey]*systemQueue),
		requirements: make(map[string]*requirement),
		reaches:      make(map[reachKey]*reach),
	}
}

// SetMachines makes ms the machines, in the order of the list. New ones are
// Connecting; ones known already keep their state and their builds and take
// over what changed: a build without a slot that its machine may not build any
// more is withdrawn, one with a slot stays. Ones no longer listed take no new
// builds and are forgotten when nothing is on them. IDs must differ.
func (q *Queue) SetMachines(ms []Machine) []Order {
	q.list(ms)
	q.fit()
	all := slices.Concat(q.machines, q.removed)
	for _, m := range all {
		q.refresh(m)
	}
	for _, m := range q.machines {
		for _, b := range slices.Clone(m.line) {
			if !b.class.reach.ok[m.index] {
				q.unplace(b)
				q.enqueue(b)
				q.order(Order{Kind: Withdraw, Build: b.req.ID, From: m.ID, Why: whyWithdraw})
			}
		}
	}
	return q.settle(all...)
}

// list sorts the machines into listed and removed ones, none counted in the
// classes or in q.open.
func (q *Queue) list(ms []Machine) {
	before := slices.Concat(q.machines, q.removed)
	for _, m := range before {
		m.index = -1
	}
	q.machines = make([]*machine, 0, len(ms))
	for i, conf := range ms {
		m := q.byID[conf.ID]
		if m == nil {
			m = &machine{index: -1}
			q.byID[conf.ID] = m
		}
		if m.index >= 0 {
			panic(fmt.Sprintf("scheduler: SetMachines with two machines %s", conf.ID))
		}
		m.configure(conf)
		m.index = i
		q.machines = append(q.machines, m)
	}
	q.removed = nil
	for _, m := range before {
		switch {
		case m.index >= 0:
		case m.own() > 0:
			q.removed = append(q.removed, m)
		default:
			q.forget(m)
		}
	}
	q.repool()
	q.open = 0
	for _, m := range slices.Concat(q.machines, q.removed) {
		m.place, m.reaches = noPlace, nil
	}
}

// forget drops m, which has nothing on it.
func (q *Queue) forget(m *machine) {
	q.suspects -= count(m.state == Suspect)
	delete(q.byID, m.ID)
}

// SetState tells that the machine is now in state, for reason (such as the last
// error; "" if there is none to tell). Builds on it stay until the caller says
// what became of them, except that those without a slot may be moved. A machine
// that is not known (any more) is ignored, for its owner may learn of a reload later.
func (q *Queue) SetState(id MachineID, state MachineState, reason string) []Order {
	m := q.byID[id]
	if m == nil {
		return nil
	}
	m.reason = reason
	if m.state == state {
		return nil
	}
	comes, doubted := -count(m.coming()), -count(m.state == Suspect)
	m.state = state
	comes, doubted = comes+count(m.coming()), doubted+count(m.state == Suspect)
	for _, r := range m.reaches {
		r.coming += comes
		r.suspects += doubted
	}
	q.suspects += doubted
	q.refresh(m)
	return q.settle(m)
}

// Enqueue takes on a build. Its ID must be new.
func (q *Queue) Enqueue(r Request) []Order {
	if q.builds[r.ID] != nil {
		panic(fmt.Sprintf("scheduler: Enqueue of known build %d", r.ID))
	}
	r.Features, r.Exclude = slices.Clone(r.Features), slices.Clone(r.Exclude)
	q.lastSeq++
	b := &build{req: r, seq: q.lastSeq}
	q.own(b, r.Caller)
	key := systemKey{r.List, r.System}
	b.system = q.systems[key]
	if b.system == nil {
		b.system = &systemQueue{}
		q.systems[key] = b.system
	}
	b.system.refs++
	q.require(b)
	q.builds[r.ID] = b
	q.enqueue(b)
	return q.settle()
}

// Staged tells that the build's inputs are on machine. It does nothing when the
// build has left that machine: the order is on its way.
func (q *Queue) Staged(id BuildID, on MachineID) []Order {
	b := q.known("Staged", id)
	if b.machine == nil || b.machine.ID != on {
		return nil
	}
	q.need("Staged", b, Staging)
	b.phase = Staged
	return q.settle(b.machine)
}

// Built tells that the running build's remote build has ended: its slot is
// free, and its outputs may travel.
func (q *Queue) Built(id BuildID) []Order {
	b := q.known("Built", id)
	q.need("Built", b, Running)
	m := b.machine
	q.unplace(b)
	b.phase, b.machine = Fetching, m
	return q.settle(m)
}

// Lost tells that the transport of the running build died, and nobody knows
// whether it still runs. Its slot is held until Release. Requeue or Remove says
// what becomes of the build.
func (q *Queue) Lost(id BuildID) []Order {
	b := q.known("Lost", id)
	q.need("Lost", b, Running)
	m := b.machine
	m.held++ // first, so that m is never empty in between
	q.unplace(b)
	b.phase, b.machine = Lost, m
	return q.settle(m)
}

// Release frees one slot that Lost holds on the machine: the leftover is known
// to be gone, or was waited for long enough.
func (q *Queue) Release(id MachineID) []Order {
	m := q.byID[id]
	if m == nil || m.held == 0 {
		panic(fmt.Sprintf("scheduler: Release of %s, which holds no slot", id))
	}
	m.held--
	q.refresh(m)
	return q.settle(m)
}

// Requeue tells that the build failed on a machine, by the machine's fault. It
// is queued again, as old as it was, and goes to that machine, and others with
// its URI, no more while one that is up or coming can take it. A build that has
// left that machine stays where it is, and only avoids it from now on.
//
// With rest it does not go to the machines it failed on at all, until EndRest: see
// Request.
func (q *Queue) Requeue(id BuildID, failed MachineID, rest string) []Order {
	b := q.known("Requeue", id)
	old := b.machine
	leaves := old != nil && old.ID == failed
	if leaves {
		if b.placed() {
			q.unplace(b)
		}
		b.phase, b.machine = Queued, nil
	} else if b.phase == Queued {
		q.dequeue(b)
	}
	b.req.Exclude = append(b.req.Exclude, failed)
	b.req.Rest = rest
	q.leaveClass(b)
	q.enterClass(b)
	if b.phase == Queued {
		q.enqueue(b)
	}
	if old == nil {
		return q.settle()
	}
	return q.settle(old)
}

// EndRest lets the build go again to machines it failed on, if no other can take it.
// It does nothing to a build that does not rest.
func (q *Queue) EndRest(id BuildID) []Order {
	b := q.known("EndRest", id)
	if b.req.Rest == "" {
		return nil
	}
	queued := b.phase == Queued
	if queued {
		q.dequeue(b)
	}
	b.req.Rest = ""
	q.leaveClass(b)
	q.enterClass(b)
	if queued {
		q.enqueue(b)
	}
	return q.settle()
}

// Remove tells that the build is done with: finished, failed or cancelled. What
// it holds is free, except a slot held by Lost.
func (q *Queue) Remove(id BuildID) []Order {
	b := q.known("Remove", id)
	m := b.machine
	switch {
	case b.placed():
		q.unplace(b)
	case b.phase == Queued:
		q.dequeue(b)
	}
	q.unrequire(b)
	delete(q.builds, id)
	q.disown(b)
	if b.system.refs--; b.system.refs == 0 {
		delete(q.systems, systemKey{b.req.List, b.req.System})
	}
	if m == nil {
		return q.settle()
	}
	return q.settle(m)
}

// known returns the build, for the call named.
func (q *Queue) known(call string, id BuildID) *build {
	b := q.builds[id]
	if b == nil {
		panic(fmt.Sprintf("scheduler: %s of unknown build %d", call, id))
	}
	return b
}

// need panics unless b is in the phase that call demands.
func (q *Queue) need(call string, b *build, phase Phase) {
	if b.phase != phase {
		panic(fmt.Sprintf("scheduler: %s of build %d, which is %s, not %s", call, b.req.ID, b.phase, phase))
	}
}

func sortedURIs(list []MachineID) []string {
	uris := make([]string, len(list))
	for i, id := range list {
		uris[i] = id.URI()
	}
	slices.Sort(uris)
	return slices.Compact(uris)
}
