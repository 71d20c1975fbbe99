package scheduler

import (
	"container/heap"
	"slices"
)

// A class is all builds that may go to the same machines: those of a reach, less
// the ones they failed on. So no event looks at each queued build.
type class struct {
	reach    *reach
	exclude  []string   // URIs, sorted
	excluded []*machine // those of the reach that have one of them
	rests    bool       // whether they keep away from these come what may

	queues  map[*caller]*callerQueue
	heads   queueHeap // the queues, the one whose first build is next on top
	hungry  queueHeap // those of them whose caller has no build in line for the first one
	waiting int       // index in reach.waiting, -1 when nothing is queued
	refs    int       // builds of this class, in any phase
}

// A callerQueue holds the queued builds of one class and one caller.
type callerQueue struct {
	class  *class
	caller *caller
	builds buildHeap
	local  int    // the builds that could be built locally
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
	case !a.req.Since.Equal(b.req.Since):
		return a.req.Since.Before(b.req.Since)
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
	cq.local += count(b.req.CouldBuildLocally)
	cq.sort()
}

// drop takes b, which is queued in c, out of the queue.
func (c *class) drop(b *build) {
	cq := c.queues[b.caller]
	if len(cq.builds) > 1 {
		heap.Remove(&cq.builds, b.index)
		cq.local -= count(b.req.CouldBuildLocally)
		cq.sort()
		return
	}
	c.heads.set(cq, false)
	c.hungry.set(cq, false)
	delete(c.queues, b.caller)
	i := slices.Index(b.caller.queued, cq)
	b.caller.queued = slices.Delete(b.caller.queued, i, i+1)
}

// newClass returns the class of builds that may go to r's machines but those with
// the URIs in exclude, which are sorted.
func newClass(r *reach, exclude []string, rests bool) *class {
	c := &class{
		reach: r, exclude: exclude, rests: rests,
		queues: make(map[*caller]*callerQueue), hungry: queueHeap{which: 1}, waiting: -1,
	}
	c.fit()
	return c
}

// fit works out anew which machines c excludes.
func (c *class) fit() {
	c.excluded = nil
	if len(c.exclude) == 0 {
		return
	}
	for _, m := range c.reach.machines {
		if _, found := slices.BinarySearch(c.exclude, m.ID.URI()); found {
			c.excluded = append(c.excluded, m)
		}
	}
}

// avoids tells whether c's builds keep away from the machines that they failed on:
// they do while they rest, and as long as another that is up or coming can take them.
func (c *class) avoids() bool {
	return len(c.excluded) > 0 && (c.rests || c.others() > 0)
}

// others counts the machines that are up or coming and that c's builds have not
// failed on.
func (c *class) others() int {
	others := c.reach.coming
	for _, m := range c.excluded {
		others -= count(m.coming())
	}
	return others
}

// ok tells whether m is one of the machines that c's builds may go to now.
func (c *class) ok(m *machine) bool {
	return m.index >= 0 && c.reach.ok[m.index] && !(slices.Contains(c.excluded, m) && c.avoids()) &&
		!(m.state == Suspect && c.doubts())
}

// free counts the machines that have a place of a kind, or a better one, for c's builds.
func (c *class) free(k placeKind) int {
	doubts := c.doubts()
	n := c.reach.free[k]
	if !doubts {
		n += c.reach.doubtful[k]
	}
	if n > 0 && c.avoids() {
		for _, m := range c.excluded {
			n -= count(m.has(k) && !(doubts && m.doubted))
		}
	}
	return n
}

// doubts tells whether c's builds keep away from suspect machines: they do as long
// as another that is up or coming can take them.
func (c *class) doubts() bool { return c.reach.suspects > 0 && c.well() > 0 }

// well counts the machines that are up or coming, not suspect, and may be given c's
// builds.
func (c *class) well() int {
	well := c.reach.coming - c.reach.suspects
	if c.avoids() {
		for _, m := range c.excluded {
			well -= count(m.coming() && m.state != Suspect)
		}
	}
	return well
}

func count(b bool) int {
	if b {
		return 1
	}
	return 0
}
