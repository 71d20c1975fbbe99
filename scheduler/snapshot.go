package scheduler

import (
	"cmp"
	"slices"
)

// A Snapshot is all there is to see of a Queue. It is the caller's own.
type Snapshot struct {
	Machines []MachineStatus // in list order, then those removed from the list
	Builds   []BuildStatus   // by ID
	Queued   []SystemStatus  // by system, those with queued builds
}

// A MachineStatus tells what is on a machine.
type MachineStatus struct {
	ID     MachineID
	List   string
	State  MachineState
	Reason string // as given to SetState
	// Removed tells that it is no longer listed and goes when it is empty.
	Removed bool
	Slots   int // max-jobs
	Staging int // staging places beside them
	Running int // slots with a running build
	Placed  int // builds staging, staged and running
	Held    int // slots held after a lost transport
}

// A BuildStatus tells where a build is.
type BuildStatus struct {
	ID    BuildID
	Phase Phase
	// Unplaceable tells of a queued build that no machine of its list can ever build it.
	Unplaceable bool
	// Why says in a line why a queued build waits, as its Explanation does; Builds sets it.
	Why string
	// Machine is where it is; for a fetching or lost build where it ran; "" when queued.
	Machine  MachineID
	System   string
	Caller   string
	Priority int
}

// A SystemStatus counts the queued builds for a system.
type SystemStatus struct {
	System string
	Queued int
	// Unplaceable counts those of them that no machine of their list can ever build.
	Unplaceable int
}

// Snapshot returns all there is to see.
func (q *Queue) Snapshot() Snapshot {
	return Snapshot{Machines: q.Machines(), Builds: q.Builds(), Queued: q.QueuedBySystem()}
}

// Machines returns the machines in list order, then those removed from the list.
func (q *Queue) Machines() []MachineStatus {
	list := make([]MachineStatus, 0, len(q.machines)+len(q.removed))
	for _, m := range slices.Concat(q.machines, q.removed) {
		list = append(list, MachineStatus{
			ID: m.ID, List: m.List, State: m.state, Reason: m.reason, Removed: m.index < 0,
			Slots: m.MaxJobs, Staging: m.Staging,
			Running: m.running, Placed: m.placed, Held: m.held,
		})
	}
	return list
}

// Builds returns all builds, by ID.
func (q *Queue) Builds() []BuildStatus {
	list := make([]BuildStatus, 0, len(q.builds))
	why := make(map[*reach]string) // of those that do not rest
	for _, b := range q.builds {
		s := b.status()
		switch r := b.class.reach; {
		case b.phase != Queued:
		case b.class.rests:
			s.Why = b.class.why(b.req.Rest)
		default:
			if why[r] == "" {
				why[r] = b.class.why("")
			}
			s.Why = why[r]
		}
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b BuildStatus) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

// Build returns where the build is; false if the Queue knows none such.
func (q *Queue) Build(id BuildID) (BuildStatus, bool) {
	b := q.builds[id]
	if b == nil {
		return BuildStatus{}, false
	}
	return b.status(), true
}

// why tells why builds that are queued in c, and rest as told, wait.
func (c *class) why(rest string) string {
	t := c.reach.tally()
	if c.rests && t.coming > 0 && c.others() == 0 {
		return "waits " + printable(rest) + ": it failed on all matching machines that are up"
	}
	return t.situation().text(t)
}

func (b *build) status() BuildStatus {
	s := BuildStatus{
		ID: b.req.ID, Phase: b.phase,
		System: b.req.System, Caller: b.req.Caller, Priority: b.req.Priority,
		Unplaceable: b.phase == Queued && len(b.class.reach.machines) == 0,
	}
	if b.machine != nil {
		s.Machine = b.machine.ID
	}
	return s
}

// QueuedBySystem returns the systems that have queued builds, by name. It
// costs no time for each build.
func (q *Queue) QueuedBySystem() []SystemStatus {
	queued, unplaceable := make(map[string]int), make(map[string]int)
	for _, r := range q.waiting {
		if len(r.machines) > 0 {
			continue
		}
		for _, c := range r.waiting {
			for _, cq := range c.heads.queues {
				unplaceable[r.system] += len(cq.builds)
			}
		}
	}
	for key, s := range q.systems {
		if s.queued > 0 {
			queued[key.system] += s.queued
		}
	}
	var list []SystemStatus
	for name, n := range queued {
		list = append(list, SystemStatus{System: name, Queued: n, Unplaceable: unplaceable[name]})
	}
	slices.SortFunc(list, func(a, b SystemStatus) int { return cmp.Compare(a.System, b.System) })
	return list
}
