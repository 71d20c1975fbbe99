package scheduler_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	. "nixdispatch/scheduler"
)

// world turns bytes into events for a Queue, a second Queue and the naive
// implementation, and compares and checks them after each.
type world struct {
	t      *testing.T
	bytes  []byte
	q      *Queue
	twin   *Queue
	naive  *naive
	listed []Machine
	lastID BuildID
	log    []string
}

func newWorld(t *testing.T, bytes []byte) *world {
	return &world{t: t, bytes: bytes, q: New(), twin: New(), naive: &naive{placedAt: map[string]int{}, runningAt: map[string]int{}}}
}

// n returns a number below limit, drawn from the bytes; 0 when they are used up.
func (w *world) n(limit int) int {
	if len(w.bytes) == 0 || limit == 0 {
		return 0
	}
	b := w.bytes[0]
	w.bytes = w.bytes[1:]
	return int(b) % limit
}

func pick[T any](w *world, list ...T) T { return list[w.n(len(list))] }

func (w *world) machineID() MachineID { return machineID(w.n(7)) }

// machineID names seven machines, some of which share a URI.
func machineID(i int) MachineID {
	return []MachineID{"ssh://m0", "ssh://m1", "ssh://m2", "ssh://m2#2", "ssh://m2#3", "ssh://m1#2", "ssh://m6"}[i]
}

func (w *world) machines() []Machine {
	var ms []Machine
	for i := range 7 {
		if w.n(4) == 0 {
			continue
		}
		ms = append(ms, Machine{
			ID:                machineID(i),
			List:              pick(w, "", "", "", "other"),
			Systems:           pick(w, []string{"x"}, []string{"x", "y"}, []string{"y"}),
			SupportedFeatures: pick(w, nil, nil, []string{"kvm"}, []string{"big", "kvm"}),
			MandatoryFeatures: pick(w, nil, nil, nil, []string{"bench"}, []string{"bench", "kvm"}),
			MaxJobs:           pick(w, 1, 2, 3, 5, 0),
			SpeedFactor:       pick(w, 1, 2, 0.5, 3, 0),
			Staging:           pick(w, 0, -1, 1, 2),
		})
	}
	// Another order of the list is another choice among equals.
	if len(ms) > 1 && w.n(2) == 1 {
		slices.Reverse(ms)
	}
	return ms
}

func (w *world) request(id BuildID) Request {
	return Request{
		ID:                id,
		List:              pick(w, "", "", "", "other"),
		System:            pick(w, "x", "x", "y", "builtin", "z"),
		Features:          pick(w, nil, nil, []string{"kvm"}, []string{"kvm", "big"}, []string{"bench"}, []string{"kvm", "bench", "kvm"}),
		Caller:            pick(w, "alice", "bob", "carol"),
		Priority:          pick(w, 0, 0, 0, 1, -1),
		Since:             time.Unix(pick(w, int64(0), 0, 0, 5, 9), 0),
		Chain:             pick(w, 0, 0, 2, 7),
		CouldBuildLocally: w.n(2) == 1,
	}
}

// some returns a build that is in one of phases; false if none is.
func (w *world) some(phases ...Phase) (BuildStatus, bool) {
	builds := slices.DeleteFunc(w.q.Builds(), func(b BuildStatus) bool { return !slices.Contains(phases, b.Phase) })
	if len(builds) == 0 {
		return BuildStatus{}, false
	}
	return builds[w.n(len(builds))], true
}

// event applies one event to all three.
func (w *world) event() {
	switch w.n(18) {
	case 0:
		w.listed = w.machines()
		w.did(fmt.Sprintf("SetMachines(%+v)", w.listed),
			w.q.SetMachines(w.listed), w.twin.SetMachines(w.listed), w.naive.SetMachines(w.listed))
	case 1, 2:
		id, state := w.machineID(), pick(w, Up, Up, Up, Down, Draining, Connecting, Parked, Suspect, Suspect)
		w.did(fmt.Sprintf("SetState(%s, %s)", id, state),
			w.q.SetState(id, state, ""), w.twin.SetState(id, state, ""), w.naive.SetState(id, state))
	case 3, 4, 5, 6:
		w.lastID++
		w.enqueue(w.request(w.lastID))
	case 7, 8, 9:
		if b, ok := w.some(Staging); ok {
			w.staged(b.ID, b.Machine)
		}
	case 10, 11:
		if b, ok := w.some(Running); ok {
			w.did(fmt.Sprintf("Built(%d)", b.ID), w.q.Built(b.ID), w.twin.Built(b.ID), w.naive.Built(b.ID))
		}
	case 12:
		if b, ok := w.some(Queued, Staging, Staged, Running, Fetching, Lost); ok {
			w.did(fmt.Sprintf("Remove(%d)", b.ID), w.q.Remove(b.ID), w.twin.Remove(b.ID), w.naive.Remove(b.ID))
		}
	case 13:
		if b, ok := w.some(Queued, Staging, Staged, Running, Fetching, Lost); ok {
			failed := b.Machine
			if failed == "" || w.n(3) == 0 {
				failed = w.machineID()
			}
			rest := pick(w, "", "until noon")
			w.did(fmt.Sprintf("Requeue(%d, %s, %q)", b.ID, failed, rest), w.q.Requeue(b.ID, failed, rest),
				w.twin.Requeue(b.ID, failed, rest), w.naive.Requeue(b.ID, failed, rest))
		}
	case 17:
		if b, ok := w.some(Queued, Staging, Staged, Running, Fetching, Lost); ok {
			w.did(fmt.Sprintf("EndRest(%d)", b.ID), w.q.EndRest(b.ID), w.twin.EndRest(b.ID), w.naive.EndRest(b.ID))
		}
	case 14:
		w.lostOrRelease()
	case 16:
		if b, ok := w.some(Queued, Staging, Staged, Running, Fetching, Lost); ok {
			caller, priority := pick(w, "alice", "bob", "carol"), pick(w, 0, 0, 1, -1)
			w.did(fmt.Sprintf("Join(%d, %s, %d)", b.ID, caller, priority), w.q.Join(b.ID, caller, priority),
				w.twin.Join(b.ID, caller, priority), w.naive.Join(b.ID, caller, priority))
		}
	case 15:
		// An upload that ended on a machine the build has left.
		if b, ok := w.some(Queued, Staging, Staged, Running); ok {
			if id := w.machineID(); id != b.Machine {
				w.staged(b.ID, id)
			}
		}
	}
}

func (w *world) enqueue(r Request) {
	amWilling := w.n(2) == 1
	explained := w.q.Explain(r)
	decision := w.q.Offer(r, amWilling)
	reply, machine := w.naive.Offer(r, amWilling)
	if decision.Reply != reply || decision.Machine != machine {
		w.fatalf("Offer(%+v, %v) = %s %s, want %s %s", r, amWilling, decision.Reply, decision.Machine, reply, machine)
	}
	got := w.q.Enqueue(r)
	w.did(fmt.Sprintf("Enqueue(%+v)", r), got, w.twin.Enqueue(r), w.naive.Enqueue(r))
	var placed MachineID
	if len(got) > 0 && got[0].Kind == Place && got[0].Build == r.ID {
		placed = got[0].Machine
	}
	if explained.Chosen != placed || reply == Accept && machine != placed {
		w.fatalf("Explain chose %q and Offer %q, but the build was placed on %q", explained.Chosen, machine, placed)
	}
}

func (w *world) staged(id BuildID, on MachineID) {
	w.did(fmt.Sprintf("Staged(%d, %s)", id, on),
		w.q.Staged(id, on), w.twin.Staged(id, on), w.naive.Staged(id, on))
}

func (w *world) lostOrRelease() {
	if w.n(2) == 0 {
		if b, ok := w.some(Running); ok {
			w.did(fmt.Sprintf("Lost(%d)", b.ID), w.q.Lost(b.ID), w.twin.Lost(b.ID), w.naive.Lost(b.ID))
		}
		return
	}
	for _, m := range w.q.Machines() {
		if m.Held > 0 {
			w.did(fmt.Sprintf("Release(%s)", m.ID),
				w.q.Release(m.ID), w.twin.Release(m.ID), w.naive.Release(m.ID))
			return
		}
	}
}

// did compares the orders an event was answered with, and checks what is then.
func (w *world) did(event string, got, twin, want []Order) {
	w.log = append(w.log, event)
	if diff := cmp.Diff(twin, got); diff != "" {
		w.fatalf("the same events gave other orders (-twin +got):\n%s", diff)
	}
	plain := slices.Clone(got)
	for i := range plain {
		if plain[i].Why == "" {
			w.fatalf("order without a reason: %+v", plain[i])
		}
		plain[i].Why = ""
	}
	if diff := cmp.Diff(want, plain); diff != "" {
		w.fatalf("orders differ from the naive implementation's (-naive +got):\n%s", diff)
	}
	w.check(got)
}

func (w *world) fatalf(format string, args ...any) {
	w.t.Helper()
	for _, e := range w.log {
		w.t.Log(e)
	}
	w.t.Fatalf(format, args...)
}

// check asserts what must hold whatever happened before. It looks at the
// Queue's own account of itself and at the naive implementation's builds.
func (w *world) check(orders []Order) {
	w.t.Helper()
	snap := w.q.Snapshot()
	if len(snap.Builds) != len(w.naive.builds) {
		w.fatalf("%d builds, want %d", len(snap.Builds), len(w.naive.builds))
	}
	granted := make(map[MachineID]bool)
	for _, o := range orders {
		granted[o.Machine] = granted[o.Machine] || o.Kind == Grant
	}
	for _, m := range snap.Machines {
		n := w.naive.machine(m.ID)
		want := MachineStatus{
			ID: m.ID, List: n.List, State: n.state, Removed: slices.Contains(w.naive.removed, n), Slots: n.MaxJobs, Staging: n.Staging,
			Running: w.naive.on(n, Running), Placed: w.naive.on(n, Staging, Staged, Running), Held: n.held,
		}
		if diff := cmp.Diff(want, m); diff != "" {
			w.fatalf("machine (-naive +got):\n%s", diff)
		}
		if granted[m.ID] && (m.Running+m.Held > m.Slots || w.naive.free(n, w.naive.busy) < 0) {
			w.fatalf("granted a slot beyond max-jobs: %+v", m)
		}
	}
	for _, o := range orders {
		if o.Kind == Place || o.Kind == Move {
			m := w.naive.machine(o.Machine)
			if r := w.naive.build(o.Build).Request; !could(m.Machine, r) || !w.naive.takes(m) {
				w.fatalf("%s of %+v on unfit %+v", o.Kind, r, m)
			}
			if w.naive.own(m) > m.MaxJobs+2*m.Staging {
				w.fatalf("%s on %s beyond its places", o.Kind, o.Machine)
			}
		}
	}
	for _, b := range snap.Builds {
		n := w.naive.build(b.ID)
		if b.Phase != n.phase || (n.on != nil && b.Machine != n.on.ID) {
			w.fatalf("build %+v, want %s on %v", b, n.phase, n.on)
		}
		if e, _ := w.q.ExplainBuild(b.ID); b.Phase == Queued && (b.Why != e.Why || w.q.Possible(n.Request) == b.Unplaceable) {
			w.fatalf("build %+v is explained by %q, situation %d", b, e.Why, e.Situation)
		}
		if b.Phase == Queued && w.naive.choose(n.Request) != nil {
			w.fatalf("build %d is queued though a machine has a place for it", b.ID)
		}
		if b.Phase == Queued && w.naive.chooseByTurn(n.Request) != nil {
			w.fatalf("build %d is queued though it is its caller's turn and a machine has a place for that", b.ID)
		}
	}
}

func run(t *testing.T, bytes []byte) *world {
	w := newWorld(t, bytes)
	w.listed = w.machines()
	w.did("SetMachines", w.q.SetMachines(w.listed), w.twin.SetMachines(w.listed), w.naive.SetMachines(w.listed))
	for len(w.bytes) > 0 {
		w.event()
	}
	// Whatever happened, nothing is left when all builds are removed and all slots released.
	for _, b := range w.q.Builds() {
		w.did("Remove", w.q.Remove(b.ID), w.twin.Remove(b.ID), w.naive.Remove(b.ID))
	}
	for _, m := range w.q.Machines() {
		for range m.Held {
			w.did("Release", w.q.Release(m.ID), w.twin.Release(m.ID), w.naive.Release(m.ID))
		}
	}
	for _, m := range w.q.Machines() {
		if m.Removed || m.Running != 0 || m.Placed != 0 || m.Held != 0 {
			w.fatalf("left over at the end: %+v", m)
		}
	}
	return w
}

func FuzzQueue(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(randomBytes(seed, 400))
	}
	f.Fuzz(func(t *testing.T, bytes []byte) {
		run(t, bytes[:min(len(bytes), 4096)])
	})
}

func TestQueueDoesAsTheNaiveImplementation(t *testing.T) {
	for seed := range uint64(30) {
		run(t, randomBytes(seed, 1200))
	}
}

func randomBytes(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	bytes := make([]byte, n)
	for i := range bytes {
		bytes[i] = byte(r.Uint32())
	}
	return bytes
}
