package scheduler

import (
	"container/heap"
	"slices"
	"strconv"
)

// A class is all builds with the same requirement: list of machines, system,
// features and the machines they failed on. What machines they may go to is worked out once for
// the class, so no event looks at each queued build.
type class struct {
	list     string
	system   string
	features []string // sorted
	exclude  []string // URIs, sorted

	match    []bool     // by machine index: could ever run these builds
	matching int        // how many of them do
	ok       []bool     // by machine index: match, less the exclusions in force
	machines []*machine // those that are ok, in list order

	// Counts over machines, kept by Queue.refresh.
	open    int // eligible machines with a free slot
	room    int // eligible machines with a free slot or staging place
	spare   int // eligible machines with room, or a place for a caller with no build in line
	movable int // builds of this class that may be moved away from where they are

	queues  map[*caller]*callerQueue
	heads   queueHeap // the queues, the one whose first build is next on top
	hungry  queueHeap // those of them whose caller has no build in line for the first one
	waiting int       // index in Queue.waiting, -1 when nothing is queued
	refs    int       // builds of this class, in any phase
}

// A callerQueue holds the queued builds of one class and one caller.
type callerQueue struct {
	class  *class
	caller *caller
	builds buildHeap
	at     [2]int // its index in class.heads and class.hungry, -1 where it is not in
}

// before is the order of the queue.
func before(a, b *build) bool {
	switch {
	case a.req.Priority != b.req.Priority:
		return a.req.Priority > b.req.Priority
	case a.caller.placed != b.caller.placed:
		return a.caller.placed < b.caller.placed
	case a.caller.placedAt != b.caller.placedAt:
		return a.caller.placedAt < b.caller.placedAt
	case a.req.Chain != b.req.Chain:
		return a.req.Chain > b.req.Chain
	default:
		return a.seq < b.seq
	}
}

// A buildHeap has the build that is next on top.
type buildHeap []*build

func (h buildHeap) Len() int           { return len(h) }
func (h buildHeap) Less(i, j int) bool { return before(h[i], h[j]) }
func (h buildHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

// Push is for container/heap.
func (h *buildHeap) Push(x any) {
	b := x.(*build)
	b.index = len(*h)
	*h = append(*h, b)
}

// Pop is for container/heap.
func (h *buildHeap) Pop() any {
	last := len(*h) - 1
	b := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return b
}

// A queueHeap has the queue whose first build is next on top.
type queueHeap struct {
	queues []*callerQueue
	which  int // the index in callerQueue.at
}

func (h *queueHeap) Len() int { return len(h.queues) }
func (h *queueHeap) Less(i, j int) bool {
	return before(h.queues[i].builds[0], h.queues[j].builds[0])
}
func (h *queueHeap) Swap(i, j int) {
	h.queues[i], h.queues[j] = h.queues[j], h.queues[i]
	h.queues[i].at[h.which], h.queues[j].at[h.which] = i, j
}

// Push is for container/heap.
func (h *queueHeap) Push(x any) {
	cq := x.(*callerQueue)
	cq.at[h.which] = len(h.queues)
	h.queues = append(h.queues, cq)
}

// Pop is for container/heap.
func (h *queueHeap) Pop() any {
	last := len(h.queues) - 1
	cq := h.queues[last]
	h.queues[last] = nil
	h.queues = h.queues[:last]
	cq.at[h.which] = -1
	return cq
}

// set has cq in the heap or not, at its place.
func (h *queueHeap) set(cq *callerQueue, in bool) {
	switch i := cq.at[h.which]; {
	case in && i >= 0:
		heap.Fix(h, i)
	case in:
		heap.Push(h, cq)
	case i >= 0:
		heap.Remove(h, i)
	}
}

// next returns the build that is next among those in the heap, which must not be
// empty.
func (h *queueHeap) next() *build { return h.queues[0].builds[0] }

// sort puts cq where it belongs now that its first build or its caller has changed.
func (cq *callerQueue) sort() {
	cq.class.heads.set(cq, true)
	cq.feed()
}

// feed puts cq among the hungry, or not, now that what its caller has in line has
// changed.
func (cq *callerQueue) feed() {
	cq.class.hungry.set(cq, cq.caller.hungry(cq.builds[0].req.Priority))
}

// push queues b, which is of class c.
func (c *class) push(b *build) {
	cq := c.queues[b.caller]
	if cq == nil {
		cq = &callerQueue{class: c, caller: b.caller, at: [2]int{-1, -1}}
		c.queues[b.caller] = cq
		b.caller.queued = append(b.caller.queued, cq)
	}
	heap.Push(&cq.builds, b)
	cq.sort()
}

// drop takes b, which is queued in c, out of the queue.
func (c *class) drop(b *build) {
	cq := c.queues[b.caller]
	if len(cq.builds) > 1 {
		heap.Remove(&cq.builds, b.index)
		cq.sort()
		return
	}
	c.heads.set(cq, false)
	c.hungry.set(cq, false)
	delete(c.queues, b.caller)
	i := slices.Index(b.caller.queued, cq)
	b.caller.queued = slices.Delete(b.caller.queued, i, i+1)
}

// fit works out anew which machines c's builds may go to.
func (c *class) fit(machines []*machine) {
	c.match, c.matching = make([]bool, len(machines)), 0
	for i, m := range machines {
		c.match[i] = m.List == c.list && m.mismatch(c.system, c.features) == Eligible
		c.matching += count(c.match[i])
	}
	c.applyExclusions(machines)
}

// applyExclusions takes the machines its builds failed on out of c, as long as
// another machine that is up or coming can take them.
func (c *class) applyExclusions(machines []*machine) {
	others := false
	for i, m := range machines {
		others = others || c.match[i] && m.coming() && !c.excludes(m.ID.URI())
	}
	c.ok = make([]bool, len(machines))
	c.machines, c.open, c.room, c.spare = nil, 0, 0, 0
	for i, m := range machines {
		if !c.match[i] || others && c.excludes(m.ID.URI()) {
			continue
		}
		c.ok[i] = true
		c.machines = append(c.machines, m)
		c.open += count(m.open)
		c.room += count(m.room)
		c.spare += count(m.spare)
	}
}

func (c *class) excludes(uri string) bool {
	_, found := slices.BinarySearch(c.exclude, uri)
	return found
}

func count(b bool) int {
	if b {
		return 1
	}
	return 0
}

// maxIdleClasses bounds the classes kept though no build is of them. Keeping
// some saves working out the machines for each of many equal builds.
const maxIdleClasses = 256

// class returns the class of builds such as r.
func (q *Queue) class(r Request) *class {
	features, exclude := sortedSet(r.Features), sortedURIs(r.Exclude)
	key := classKey(r.List, r.System, features, exclude)
	if c := q.byKey[key]; c != nil {
		return c
	}
	if len(q.classes) >= 2*q.usedClasses+maxIdleClasses {
		q.dropIdleClasses()
	}
	c := &class{
		list: r.List, system: r.System, features: features, exclude: exclude,
		queues: make(map[*caller]*callerQueue), hungry: queueHeap{which: 1}, waiting: -1,
	}
	c.fit(q.machines)
	q.byKey[key] = c
	q.classes = append(q.classes, c)
	return c
}

func (q *Queue) dropIdleClasses() {
	q.classes = slices.DeleteFunc(q.classes, func(c *class) bool {
		if c.refs == 0 {
			delete(q.byKey, classKey(c.list, c.system, c.features, c.exclude))
		}
		return c.refs == 0
	})
}

// use makes b a build of class c.
func (q *Queue) use(b *build, c *class) {
	if c.refs == 0 {
		q.usedClasses++
	}
	c.refs++
	b.class = c
}

// unuse takes b out of its class.
func (q *Queue) unuse(b *build) {
	b.class.refs--
	if b.class.refs == 0 {
		q.usedClasses--
	}
}

// classKey is different for different requirements, whatever bytes are in them.
func classKey(list, system string, features, exclude []string) string {
	key := make([]byte, 0, 64)
	add := func(s string) {
		key = strconv.AppendInt(key, int64(len(s)), 10)
		key = append(key, ':')
		key = append(key, s...)
	}
	add(list)
	add(system)
	for _, f := range features {
		add(f)
	}
	key = append(key, '-')
	for _, uri := range exclude {
		add(uri)
	}
	return string(key)
}
