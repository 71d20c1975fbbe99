package scheduler_test

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	. "nixdispatch/scheduler"
)

// A course runs builds of known lengths through a Queue, in a time of its own.
type course struct {
	q      *Queue
	now    time.Duration
	next   []happening
	upload map[BuildID]time.Duration
	length map[BuildID]time.Duration
	began  map[BuildID]time.Duration // when each got its slot
}

// A happening is something to do at a time.
type happening struct {
	at time.Duration
	do func() []Order
}

func newCourse(machines []Machine) *course {
	c := &course{
		q: New(), upload: make(map[BuildID]time.Duration),
		length: make(map[BuildID]time.Duration), began: make(map[BuildID]time.Duration),
	}
	c.q.SetMachines(machines)
	for _, m := range machines {
		c.q.SetState(m.ID, Up, "")
	}
	return c
}

// enqueue has a build come in at a time.
func (c *course) enqueue(at time.Duration, r Request, upload, length time.Duration) {
	c.upload[r.ID], c.length[r.ID] = upload, length
	c.next = append(c.next, happening{at, func() []Order { return c.q.Enqueue(r) }})
}

// run does all that happens until there is nothing more, or the build has its slot.
func (c *course) run(until BuildID) {
	for len(c.next) > 0 {
		slices.SortStableFunc(c.next, func(a, b happening) int { return cmp.Compare(a.at, b.at) })
		h := c.next[0]
		c.next = c.next[1:]
		c.now = h.at
		for _, o := range h.do() {
			id, on := o.Build, o.Machine
			switch o.Kind {
			case Place, Move:
				c.next = append(c.next, happening{c.now + c.upload[id], func() []Order { return c.q.Staged(id, on) }})
			case Grant:
				c.began[id] = c.now
				c.next = append(c.next, happening{c.now + c.length[id], func() []Order {
					return append(c.q.Built(id), c.q.Remove(id)...)
				}})
			}
		}
		if _, ok := c.began[until]; ok {
			return
		}
	}
}

// TestQueueOfOneDelaysAnotherByOneBuild has one user queue 200 builds, and another
// ask for a single one some time later: it begins as soon as its inputs are there
// and the length of one build, with its upload, has passed, whatever the machines.
func TestQueueOfOneDelaysAnotherByOneBuild(t *testing.T) {
	const longest = time.Minute
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 7))
		some := func(most time.Duration) time.Duration { return time.Duration(r.Int64N(int64(most))) + 1 }
		var machines []Machine
		for n := range 1 + r.IntN(2) {
			machines = append(machines, Machine{
				ID: MachineID(fmt.Sprint("ssh://m", n)), Systems: []string{"x"}, MaxJobs: 1 + r.IntN(3),
				Staging: []int{-1, 0, 1, 4}[r.IntN(4)], SpeedFactor: 1 + float64(r.IntN(3)),
			})
		}
		c := newCourse(machines)
		for id := range BuildID(200) {
			c.enqueue(0, Request{ID: id, System: "x", Caller: "alice"}, some(longest/10), longest*7/10+some(longest/5))
		}
		const single BuildID = 1000
		asked, upload := some(3*longest), some(longest/10)
		c.enqueue(asked, Request{ID: single, System: "x", Caller: "bob"}, upload, longest)
		c.run(single)
		if began, ok := c.began[single]; !ok || began > asked+upload+longest {
			t.Errorf("seed %d: asked at %s, upload %s, began %s (%t) on %+v", seed, asked, upload, began, ok, machines)
		}
	}
}

// TestTurnsAreEven has users who all have more than enough to build, of equal
// length: none ever gets two slots more than another.
func TestTurnsAreEven(t *testing.T) {
	const users = 3
	c := newCourse([]Machine{{ID: "ssh://m", Systems: []string{"x"}, MaxJobs: 4}})
	for id := range BuildID(users * 40) {
		// One after the other, so that the first has filled the machine before the last asks.
		user := int(id) / 40
		c.enqueue(time.Duration(user)*time.Millisecond, Request{ID: id, System: "x", Caller: fmt.Sprint(user)}, 0, time.Second)
	}
	c.run(1 << 62)
	// By the second, from when all have asked until the first runs out.
	for second := time.Second; second < 20*time.Second; second += time.Second {
		got := make([]int, users)
		for id, at := range c.began {
			if at >= time.Second && at < second+time.Second {
				got[int(id)/40]++
			}
		}
		if slices.Max(got)-slices.Min(got) > 1 {
			t.Errorf("slots got by the users in the first %s: %v", second, got)
		}
	}
}
