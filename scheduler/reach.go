package scheduler

import (
	"slices"
	"strconv"
)

// A requirement is what builds ask of machines: a list, a system and features.
type requirement struct {
	list     string
	system   string
	features []string // sorted
	reach    *reach
	refs     int // builds with it, in any phase
}

// A reach is the machines that match a requirement, shared by all requirements
// for a list and system that the same machines match: there are few, however many
// requirements there are. Whatever happens to a machine is noted in its reaches.
type reach struct {
	list     string
	system   string
	ok       []bool     // by machine index
	machines []*machine // those that are ok, in list order

	coming   int    // those of machines that are coming
	suspects int    // those of them that are suspect
	free     places // of those that are not suspect; kept by Queue.refresh
	doubtful places // of those that are; kept there, too
	movable  int    // builds that may be moved away from where they are; kept there, too

	requirements []*requirement
	plain        *class               // the builds that have failed on no machine
	failed       map[failedKey]*class // the others
	waiting      []*class             // those with queued builds, in no order that matters
	index        int                  // in Queue.waiting, -1 when nothing is queued
}

// places counts machines that have a place of a kind, or a better one.
type places [placeKinds]int

// places is where m's place counts.
func (r *reach) places(m *machine) *places {
	if m.doubted {
		return &r.doubtful
	}
	return &r.free
}

// A reachKey tells reaches apart.
type reachKey struct{ list, system, set string }

// A failedKey tells the classes of a reach apart whose builds failed on a machine.
type failedKey struct {
	exclude string
	rests   bool
}

// maxIdleRequirements bounds the requirements kept though no build has them. Keeping
// some saves working out the machines for each of many equal builds.
const maxIdleRequirements = 256

// requirement returns that of builds such as r.
func (q *Queue) requirement(r Request) *requirement {
	features := sortedSet(r.Features)
	key := joined(append([]string{r.List, r.System}, features...))
	if n := q.requirements[key]; n != nil {
		return n
	}
	if len(q.requirements) >= 2*q.usedRequirements+maxIdleRequirements {
		q.dropIdleRequirements()
	}
	n := &requirement{list: r.List, system: r.System, features: features}
	q.join(n, n.match(q.machines))
	q.requirements[key] = n
	return n
}

// class returns the class of builds such as r, which is new if no build is of it.
func (q *Queue) class(r Request) *class { return q.requirement(r).reach.class(r) }

// class returns the class of those builds of r that are such as req.
func (r *reach) class(req Request) *class {
	if len(req.Exclude) == 0 {
		return r.plain
	}
	uris, rests := sortedURIs(req.Exclude), req.Rest != ""
	if c := r.failed[failedKey{joined(uris), rests}]; c != nil {
		return c
	}
	return newClass(r, uris, rests)
}

// match tells, by machine index, which machines could ever run builds with n.
func (n *requirement) match(machines []*machine) []bool {
	ok := make([]bool, len(machines))
	for i, m := range machines {
		ok[i] = m.List == n.list && m.mismatch(n.system, n.features) == Eligible
	}
	return ok
}

// join has n share the reach of the machines that are ok.
func (q *Queue) join(n *requirement, ok []bool) {
	key := reachKey{n.list, n.system, bits(ok)}
	r := q.reaches[key]
	if r == nil {
		r = &reach{list: n.list, system: n.system, failed: make(map[failedKey]*class), index: -1}
		r.plain = newClass(r, nil, false)
		r.set(ok, q.machines)
		q.reaches[key] = r
	}
	r.requirements = append(r.requirements, n)
	n.reach = r
}

// set makes the machines that are ok those of r, which is in the list of none.
func (r *reach) set(ok []bool, machines []*machine) {
	r.ok, r.machines, r.coming, r.suspects, r.free, r.doubtful = ok, nil, 0, 0, places{}, places{}
	for i, m := range machines {
		if !ok[i] {
			continue
		}
		r.machines = append(r.machines, m)
		m.reaches = append(m.reaches, r)
		r.coming += count(m.coming())
		r.suspects += count(m.state == Suspect)
		for k := range placeKinds {
			r.places(m)[k] += count(m.has(k))
		}
	}
	for _, c := range r.failed {
		c.fit()
	}
}

// fit works out anew which machines match, now that they have changed and are in
// no reach. Of the
// requirements that shared a reach the first keeps it; builds whose requirement
// has got another follow it. They are looked for only then.
func (q *Queue) fit() {
	old := q.reaches
	q.reaches = make(map[reachKey]*reach, len(old))
	var strays []*requirement
	for _, r := range old {
		first, rest := r.requirements[0], r.requirements[1:]
		ok := first.match(q.machines)
		key := reachKey{r.list, r.system, bits(ok)}
		if q.reaches[key] != nil {
			strays = append(strays, r.requirements...)
			continue
		}
		r.set(ok, q.machines)
		r.requirements = []*requirement{first}
		q.reaches[key] = r
		strays = append(strays, rest...)
	}
	moved := false
	for _, n := range strays {
		was := n.reach
		q.join(n, n.match(q.machines))
		moved = moved || n.reach != was && n.refs > 0
	}
	if !moved {
		return
	}
	for _, b := range q.builds {
		if b.class.reach != b.requirement.reach {
			q.reclass(b)
		}
	}
}

// reclass makes b one of the class that it is of by its requirement and the
// machines that it failed on.
func (q *Queue) reclass(b *build) {
	queued := b.phase == Queued
	if queued {
		q.dequeue(b)
	}
	old := b.class
	q.leaveClass(b)
	q.enterClass(b)
	if b.inLine() && b.machine.movable {
		old.reach.movable--
		b.class.reach.movable++
	}
	if queued {
		q.enqueue(b)
	}
}

// enterClass makes b one of its class.
func (q *Queue) enterClass(b *build) {
	b.class = b.requirement.reach.class(b.req)
	b.class.refs++
	if len(b.class.exclude) > 0 {
		b.class.reach.failed[b.class.key()] = b.class
	}
}

// leaveClass ends what enterClass began.
func (q *Queue) leaveClass(b *build) {
	c := b.class
	if c.refs--; c.refs == 0 && len(c.exclude) > 0 {
		delete(c.reach.failed, c.key())
	}
}

func (c *class) key() failedKey { return failedKey{joined(c.exclude), c.rests} }

// require gives b its requirement and its class.
func (q *Queue) require(b *build) {
	n := q.requirement(b.req)
	if n.refs == 0 {
		q.usedRequirements++
	}
	n.refs++
	b.requirement = n
	q.enterClass(b)
}

// unrequire ends what require began.
func (q *Queue) unrequire(b *build) {
	q.leaveClass(b)
	if b.requirement.refs--; b.requirement.refs == 0 {
		q.usedRequirements--
	}
}

// dropIdleRequirements forgets the requirements that no build has, and the reaches
// that are theirs alone.
func (q *Queue) dropIdleRequirements() {
	idle := func(n *requirement) bool { return n.refs == 0 }
	for key, n := range q.requirements {
		if idle(n) {
			delete(q.requirements, key)
		}
	}
	gone := func(r *reach) bool { return len(r.requirements) == 0 }
	for key, r := range q.reaches {
		if r.requirements = slices.DeleteFunc(r.requirements, idle); gone(r) {
			delete(q.reaches, key)
		}
	}
	for _, m := range q.machines {
		m.reaches = slices.DeleteFunc(m.reaches, gone)
	}
}

// joined makes one string of many, a different one for different ones, whatever
// bytes are in them.
func joined(list []string) string {
	key := make([]byte, 0, 64)
	for _, s := range list {
		key = strconv.AppendInt(key, int64(len(s)), 10)
		key = append(key, ':')
		key = append(key, s...)
	}
	return string(key)
}

// bits makes a string of truth values.
func bits(list []bool) string {
	set := make([]byte, (len(list)+7)/8)
	for i, b := range list {
		if b {
			set[i/8] |= 1 << (i % 8)
		}
	}
	return string(set)
}
