package scheduler

import (
	"fmt"
	"slices"
)

// A Reply is what the build hook answers to an offered build.
type Reply int

// The replies.
const (
	// Accept takes the build, and names the machine it goes to.
	Accept Reply = iota
	// AcceptQueued takes the build under a neutral name: it gets its machine later.
	AcceptQueued
	// Decline leaves the build to the caller's own Nix.
	Decline
	// Postpone asks the caller to offer the build again later.
	Postpone
)

// String returns the reply in the words of the hook protocol.
func (r Reply) String() string {
	switch r {
	case Accept:
		return "accept"
	case AcceptQueued:
		return "accept queued"
	case Decline:
		return "decline"
	case Postpone:
		return "postpone"
	default:
		return fmt.Sprintf("reply %d", int(r))
	}
}

// A Situation is a row of the table of replies.
type Situation int

// The situations. "Full" means that matching machines are up or coming (on
// their first connection attempt) and none has a free slot.
const (
	// SlotFree: a matching machine has a free slot. Accept.
	SlotFree Situation = iota
	// Impossible: no machine could ever run it. Decline.
	Impossible
	// FullLocalFree: full, and a local slot is free for it. Decline: the local
	// machine shares the load, as with the stock hook.
	FullLocalFree
	// ComingLocal: the matching machines are on their first connection attempt, none
	// is up, and it could be built locally, where no slot is free. Postpone: it would
	// be bound to machines that may not come.
	ComingLocal
	// FullLocalBusy: full, and no local slot is free for it, though it could be built
	// locally. AcceptQueued while fewer such builds of the caller's than remote slots are
	// queued, so that no remote slot idles through the seconds a postponed caller waits.
	FullLocalBusy
	// FullLocalQueued: as before, and as many of the caller's are queued. Postpone.
	FullLocalQueued
	// Full, and it cannot be built locally. AcceptQueued.
	Full
	// FullQueue: as before or as NoneUp, and max(512, 4 times the slots) of the caller's
	// are queued. Postpone.
	FullQueue
	// NoneUpLocal: matching machines exist, none is up or coming (though some may be
	// parked), and it can be built locally. Decline.
	NoneUpLocal
	// NoneUp: as before, and it cannot be built locally. AcceptQueued; how long it
	// waits for a machine is the caller's to bound (see Stranded).
	NoneUp
)

// A Decision is the reply to an offered build.
type Decision struct {
	Reply     Reply
	Situation Situation
	// Machine is the one that Enqueue would place the build on now; set with Accept only.
	Machine MachineID
	// Why is for people, one line. Explain has the reason for each machine.
	Why string
}

// minQueued is the number of builds of a caller's for one system that may be queued
// however few slots there are; queuedPerSlot is how many for each slot otherwise. More
// would only grow the memory of both daemons: the slots are busy anyway.
const (
	minQueued     = 512
	queuedPerSlot = 4
)

// Offer tells what to reply to a caller that offers r. amWilling is the
// caller's word that one of its local slots is free. Offer changes nothing;
// Enqueue right after an Accept places the build on the machine it named.
//
// Queued builds are counted for r's caller, list and system, and slots for the list and
// system: neither builds that could not use the same machines keep each other out, nor
// do those of different callers. A caller with nothing queued is always taken.
func (q *Queue) Offer(r Request, amWilling bool) Decision {
	c := q.class(r)
	if c.free(slotPlace) > 0 {
		m, rule := c.choose(false)
		return Decision{Reply: Accept, Situation: SlotFree, Machine: m.ID, Why: rule.text(m)}
	}
	t := c.reach.tally()
	switch {
	case t.matching == 0:
		return t.decide(Decline, Impossible)
	case t.coming == 0 && r.CouldBuildLocally:
		return t.decide(Decline, NoneUpLocal)
	case r.CouldBuildLocally && amWilling:
		return t.decide(Decline, FullLocalFree)
	case r.CouldBuildLocally && t.up == 0:
		return t.decide(Postpone, ComingLocal)
	}
	queued, local := q.callers[r.Caller].queues(r.List, r.System)
	switch {
	case r.CouldBuildLocally && local < t.slots:
		return t.decide(AcceptQueued, FullLocalBusy)
	case r.CouldBuildLocally:
		return t.decide(Postpone, FullLocalQueued)
	case queued >= max(minQueued, queuedPerSlot*t.slots):
		return t.decide(Postpone, FullQueue)
	case t.coming == 0:
		return t.decide(AcceptQueued, NoneUp)
	default:
		return t.decide(AcceptQueued, Full)
	}
}

func (t tally) decide(reply Reply, s Situation) Decision {
	return Decision{Reply: reply, Situation: s, Why: s.text(t)}
}

// A tally counts the machines of a reach.
type tally struct {
	matching int // all of them
	up       int
	coming   int // up, or on the first connection attempt
	parked   int
	suspect  int
	slots    int // of those coming
}

func (r *reach) tally() tally {
	t := tally{matching: len(r.machines)}
	for _, m := range r.machines {
		t.parked += count(m.state == Parked)
		t.suspect += count(m.state == Suspect)
		if m.coming() {
			t.coming++
			t.up += count(m.up())
			t.slots += r.moreSlots(m)
		}
	}
	return t
}

// moreSlots is how many slots of its URI m adds to those of the machines of r
// that are listed before it.
func (r *reach) moreSlots(m *machine) int {
	most := 0
	for _, other := range m.pool.machines {
		if other.index >= 0 && other.index < m.index && r.ok[other.index] && other.coming() {
			most = max(most, other.MaxJobs)
		}
	}
	return max(0, m.MaxJobs-most)
}

// Stranded returns the queued builds that no machine could take even if all
// were idle: none that matches is up or coming. They are in the order of their
// IDs. The caller bounds how long they wait. It costs time for each queued
// build that is stranded, not for the others.
func (q *Queue) Stranded() []BuildID {
	var ids []BuildID
	for _, r := range q.waiting {
		if r.coming > 0 {
			continue
		}
		for _, c := range r.waiting {
			for _, cq := range c.heads.queues {
				for _, b := range cq.builds {
					ids = append(ids, b.req.ID)
				}
			}
		}
	}
	slices.Sort(ids)
	return ids
}

// Hopes returns the machines that the stranded builds wait for, in list order: those
// that could ever run one of them. It costs no time for each build.
func (q *Queue) Hopes() []MachineID {
	hoped := make(map[*machine]bool)
	for _, r := range q.waiting {
		if r.coming > 0 {
			continue
		}
		for _, m := range r.machines {
			hoped[m] = true
		}
	}
	var ids []MachineID
	for _, m := range q.machines {
		if hoped[m] {
			ids = append(ids, m.ID)
		}
	}
	return ids
}
