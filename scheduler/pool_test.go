package scheduler_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	. "nixdispatch/scheduler"
)

// TestSlotsOfAURIAreNumbered checks the sharing of slots against what it is made
// for: the running builds of a URI can be given different slot numbers, each
// below its machine's max-jobs, and a build waits for its slot only when there
// is no such way to give it one.
func TestSlotsOfAURIAreNumbered(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 7))
		q := New()
		slots := make(map[MachineID]int)
		var ms []Machine
		for i := range 1 + r.IntN(4) {
			m := Machine{ID: MachineID(fmt.Sprintf("ssh://mac#%d", i)), Systems: []string{fmt.Sprint(i)}, MaxJobs: 1 + r.IntN(6), Staging: 9}
			slots[m.ID] = m.MaxJobs
			ms = append(ms, m)
		}
		q.SetMachines(ms)
		for _, m := range ms {
			q.SetState(m.ID, Up, "")
		}
		for id := BuildID(1); id < 60; id++ {
			for _, o := range q.Enqueue(Request{ID: id, System: fmt.Sprint(r.IntN(len(ms)))}) {
				q.Staged(o.Build, o.Machine)
			}
			if builds := in(q, Running); r.IntN(2) == 0 && len(builds) > 0 {
				for _, o := range q.Built(builds[r.IntN(len(builds))].ID) {
					if o.Kind == Place {
						q.Staged(o.Build, o.Machine)
					}
				}
			}
			var taken []int
			for _, b := range in(q, Running) {
				taken = append(taken, slots[b.Machine])
			}
			if !numbered(taken) {
				t.Fatalf("seed %d: max-jobs %v, builds on machines with %v slots run at once", seed, slots, taken)
			}
			for _, b := range in(q, Staged) {
				if numbered(append(slices.Clone(taken), slots[b.Machine])) {
					t.Fatalf("seed %d: max-jobs %v: a build on %s waits, while those running have %v", seed, slots, b.Machine, taken)
				}
			}
		}
	}
}

// numbered tells whether builds that may each use the slots below a number can
// all have one of their own: the one confined to the fewest takes the first.
func numbered(below []int) bool {
	below = slices.Sorted(slices.Values(below))
	for slot, limit := range below {
		if slot >= limit {
			return false
		}
	}
	return true
}

// in returns the builds that are in a phase.
func in(q *Queue, p Phase) []BuildStatus {
	return slices.DeleteFunc(q.Builds(), func(b BuildStatus) bool { return b.Phase != p })
}
