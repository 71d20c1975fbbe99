package scheduler

import "slices"

// A caller is one whose builds share a turn.
type caller struct {
	name string
	// placed and running count its builds in these phases: the fewest go first. Among
	// equals, the one goes first that placed a build, or got a slot, longest ago.
	placed, running     int
	placedAt, runningAt uint64
	line                []inLine // its builds in line; one or a few elements
	queued              []*callerQueue
	refs                int // builds of this caller, in any phase
}

// inLine counts builds of a priority that are in line.
type inLine struct{ priority, builds int }

// hungry tells whether a place is kept for a build of u's of the priority: it has
// none in line or, if the priority is a raised one, only lower ones.
func (u *caller) hungry(priority int) bool {
	for _, l := range u.line {
		if l.priority >= priority || priority <= 0 {
			return false
		}
	}
	return true
}

// addLine changes the number of u's builds of a priority that are in line.
func (u *caller) addLine(priority, n int) {
	i := slices.IndexFunc(u.line, func(l inLine) bool { return l.priority == priority })
	if i < 0 {
		i = len(u.line)
		u.line = append(u.line, inLine{priority: priority})
	}
	if u.line[i].builds += n; u.line[i].builds == 0 {
		u.line = slices.Delete(u.line, i, i+1)
	}
}

// queues counts u's queued builds for a system and list, and those of them that could
// be built locally. It takes time for each class of u's queued builds, not for each build.
func (u *caller) queues(list, system string) (builds, local int) {
	if u == nil {
		return 0, 0
	}
	for _, cq := range u.queued {
		if cq.class.reach.list == list && cq.class.reach.system == system {
			builds += len(cq.builds)
			local += cq.local
		}
	}
	return builds, local
}

// own makes b a build of the caller of that name.
func (q *Queue) own(b *build, name string) {
	u := q.callers[name]
	if u == nil {
		u = &caller{name: name}
		q.callers[name] = u
	}
	u.refs++
	b.caller = u
}

// disown ends what own began.
func (q *Queue) disown(b *build) {
	u := b.caller
	if u.refs--; u.refs == 0 {
		delete(q.callers, u.name)
	}
}

// count adds n, 1 or -1, to what its caller has in the phase that b is in, and
// gives the caller the turn that follows from it.
func (b *build) count(n int) {
	u := b.caller
	u.placed += n
	if b.phase == Running {
		u.running += n
	} else {
		u.addLine(b.req.Priority, n)
	}
	for _, cq := range u.queued {
		cq.sort()
	}
}

// run makes b, which is in line, one that has its slot from the turn given on.
func (b *build) run(turn uint64) {
	u := b.caller
	b.phase = Running
	u.running++
	u.runningAt = turn
	u.addLine(b.req.Priority, -1)
	for _, cq := range u.queued {
		cq.feed()
	}
}

// Join tells that another caller wants the build, too, with a priority of its own.
// The build has the higher priority of both and, unless it has its slot already, is
// the caller's that has fewer placed builds.
func (q *Queue) Join(id BuildID, name string, priority int) []Order {
	b := q.known("Join", id)
	priority = max(priority, b.req.Priority)
	before := 0
	if u := q.callers[name]; u != nil {
		before = u.placed
	}
	waits := b.phase == Queued || b.inLine()
	others := b.caller.placed - count(b.inLine())
	if !waits || before >= others {
		name = b.caller.name
	}
	if priority == b.req.Priority && name == b.caller.name {
		return nil
	}
	if b.phase == Queued {
		q.dequeue(b)
	} else if b.placed() {
		b.count(-1)
	}
	q.disown(b)
	q.own(b, name)
	b.req.Caller, b.req.Priority = name, priority
	if b.phase == Queued {
		q.enqueue(b)
	} else if b.placed() {
		b.count(1)
	}
	return q.settle()
}
