package scheduler_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	. "nixdispatch/scheduler"
)

// A shape is a fleet and what is asked of it.
type shape struct {
	name string
	// machines makes n of them.
	machines func(n int) []Machine
	request  func(id BuildID) Request
}

var systems = []string{"x86_64-linux", "aarch64-linux"}

// fleet is n machines: two systems, some with features, 8 slots each.
func fleet(n int) []Machine {
	ms := make([]Machine, n)
	for i := range ms {
		ms[i] = Machine{
			ID: MachineID(fmt.Sprintf("ssh://m%d", i)), MaxJobs: 8, SpeedFactor: float64(1 + i%3),
			Systems: []string{systems[i%2]},
		}
		if i%4 < 2 {
			ms[i].SupportedFeatures = []string{"kvm", "big-parallel"}
		}
	}
	return ms
}

func fleetRequest(id BuildID) Request {
	return Request{
		ID:       id,
		System:   systems[id%2],
		Features: [][]string{nil, nil, {"kvm"}, {"big-parallel", "kvm"}}[id%7%4],
		Caller:   fmt.Sprintf("user%d", id%1000),
	}
}

var tenFeatures = strings.Fields("f0 f1 f2 f3 f4 f5 f6 f7 f8 f9")

// shapes are what may make an event slow, each by itself and all of them together.
var shapes = []shape{
	{"plain", fleet, fleetRequest},
	{"callers", fleet, func(id BuildID) Request {
		r := fleetRequest(id)
		r.Caller = fmt.Sprintf("user%d", id%50_000)
		return r
	}},
	{"features", featured, func(id BuildID) Request {
		r := fleetRequest(id)
		r.Features = nil
		for i, f := range tenFeatures { // 1024 requirements
			if id/2>>i&1 == 1 {
				r.Features = append(r.Features, f)
			}
		}
		r.Caller = fmt.Sprintf("user%d", id%7)
		return r
	}},
	{"lists", listed, func(id BuildID) Request {
		r := fleetRequest(id)
		r.List = listName(int(id % 33)) // a caller names one list
		r.Caller = fmt.Sprintf("user%d", id%(33*30))
		return r
	}},
	{"exclusions", fleet, func(id BuildID) Request {
		r := fleetRequest(id)
		if id%50 == 0 { // 2,000 builds have failed, on as many machines as there are
			r.Exclude = []MachineID{MachineID(fmt.Sprintf("ssh://m%d", id/50%997))}
		}
		return r
	}},
}

// featured is fleet, every machine with ten features.
func featured(n int) []Machine {
	ms := fleet(n)
	for i := range ms {
		ms[i].SupportedFeatures = tenFeatures
	}
	return ms
}

func listName(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("list%d", n)
}

// listed is fleet with the same hosts in 33 lists, some with fewer of the slots.
func listed(n int) []Machine {
	var ms []Machine
	for l := range 33 {
		for _, m := range fleet(max(4, n/33)) {
			m.List, m.ID = listName(l), MachineID(fmt.Sprintf("%s#%d", m.ID, l))
			m.MaxJobs -= l % 3
			ms = append(ms, m)
		}
	}
	return ms
}

// saturated returns a Queue with n machines that are up and full, and queued builds.
func (s shape) saturated(n, queued int) (q *Queue, running []BuildID, last BuildID) {
	q = New()
	q.SetMachines(s.machines(n))
	for _, m := range q.Machines() {
		q.SetState(m.ID, Up, "")
	}
	for waiting := 0; waiting < queued; {
		last++
		for _, o := range q.Enqueue(s.request(last)) {
			q.Staged(o.Build, o.Machine)
		}
		if b, _ := q.Build(last); b.Phase == Queued {
			waiting++
		}
	}
	for _, b := range q.Builds() {
		if b.Phase == Running {
			running = append(running, b.ID)
		}
	}
	return q, running, last
}

// saturated is that of the plain shape.
func saturated(n, queued int) (q *Queue, running []BuildID, last BuildID) {
	return shapes[0].saturated(n, queued)
}

// cpu returns the nanoseconds of CPU that the process has used, collector
// included. On a machine that does other things too, the time on the wall says little.
func cpu(b *testing.B) int64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

// BenchmarkEvents times the events of a saturated fleet.
func BenchmarkEvents(b *testing.B) {
	for _, s := range shapes {
		for _, machines := range []int{10, 100, 1000} {
			for _, queued := range []int{1000, 100_000} {
				if queued < 100_000 && s.name != "plain" {
					continue
				}
				name := fmt.Sprintf("%s/machines=%d/queued=%d", s.name, machines, queued)
				b.Run("life/"+name, func(b *testing.B) { s.benchmarkLife(b, machines, queued) })
				b.Run("cancel/"+name, func(b *testing.B) { s.benchmarkCancel(b, machines, queued) })
				b.Run("fail/"+name, func(b *testing.B) { s.benchmarkFail(b, machines, queued) })
				b.Run("flap/"+name, func(b *testing.B) { s.benchmarkFlap(b, machines, queued) })
			}
			name := fmt.Sprintf("%s/machines=%d", s.name, machines)
			b.Run("offer/"+name, func(b *testing.B) { s.benchmarkOffer(b, machines) })
			b.Run("idle/"+name, func(b *testing.B) { s.benchmarkIdle(b, machines) })
		}
	}
}

// perEvent reports the CPU since start for each of some events.
func perEvent(b *testing.B, start int64, events int) {
	b.ReportMetric(float64(cpu(b)-start)/float64(events), "cpu-ns/event")
}

// carryOut stages what is placed, and returns how many events that were.
func carryOut(q *Queue, orders []Order, granted func(BuildID)) (events int) {
	for len(orders) > 0 {
		o := orders[0]
		orders = orders[1:]
		switch o.Kind {
		case Grant:
			granted(o.Build)
		case Place, Move:
			orders = append(orders, q.Staged(o.Build, o.Machine)...)
			events++
		}
	}
	return events
}

// benchmarkLife submits a build and has another, which runs, end: 4 events, with the
// staging of the one that takes its place.
func (s shape) benchmarkLife(b *testing.B, machines, queued int) {
	q, running, last := s.saturated(machines, queued)
	events := 0
	start := cpu(b)
	for b.Loop() {
		last++
		q.Enqueue(s.request(last))
		done := running[0]
		running = running[1:]
		orders := append(q.Built(done), q.Remove(done)...)
		events += 3 + carryOut(q, orders, func(id BuildID) { running = append(running, id) })
	}
	perEvent(b, start, events)
}

// benchmarkCancel takes builds out of the middle of the queue, and submits others.
func (s shape) benchmarkCancel(b *testing.B, machines, queued int) {
	q, _, last := s.saturated(machines, queued)
	victims := rand.New(rand.NewPCG(1, 1)).Perm(int(last))
	start, n := cpu(b), 0
	for b.Loop() {
		for {
			victim := BuildID(victims[n%len(victims)] + 1)
			n++
			if v, known := q.Build(victim); known && v.Phase == Queued {
				q.Remove(victim)
				break
			}
		}
		last++
		q.Enqueue(s.request(last))
	}
	perEvent(b, start, 2*b.N)
}

// benchmarkFail has running builds fail by their machine's fault, and end where
// they are built then.
func (s shape) benchmarkFail(b *testing.B, machines, queued int) {
	q, running, last := s.saturated(machines, queued)
	events := 0
	start := cpu(b)
	for b.Loop() {
		victim := running[0]
		running = running[1:]
		at, _ := q.Build(victim)
		orders := q.Requeue(victim, at.Machine, "")
		orders = append(orders, q.Remove(victim)...)
		last++
		orders = append(orders, q.Enqueue(s.request(last))...)
		events += 3 + carryOut(q, dropped(orders, victim), func(id BuildID) { running = append(running, id) })
	}
	perEvent(b, start, events)
}

// dropped are the orders for other builds than one that is gone.
func dropped(orders []Order, gone BuildID) (others []Order) {
	for _, o := range orders {
		if o.Build != gone {
			others = append(others, o)
		}
	}
	return others
}

// benchmarkFlap takes one machine after the other down and up again. Its builds
// stay on it, as after a short break.
func (s shape) benchmarkFlap(b *testing.B, machines, queued int) {
	q, _, _ := s.saturated(machines, queued)
	ids := q.Machines()
	i := 0
	start := cpu(b)
	for b.Loop() {
		id := ids[i%len(ids)].ID
		q.SetState(id, Down, "link")
		q.SetState(id, Up, "")
		i++
	}
	perEvent(b, start, 2*b.N)
}

func (s shape) benchmarkOffer(b *testing.B, machines int) {
	q, _, last := s.saturated(machines, 1000)
	start := cpu(b)
	for b.Loop() {
		last++
		q.Offer(s.request(last), false)
	}
	perEvent(b, start, b.N)
}

// benchmarkIdle runs one build at a time through a fleet that has nothing else to do.
func (s shape) benchmarkIdle(b *testing.B, machines int) {
	q := New()
	q.SetMachines(s.machines(machines))
	for _, m := range q.Machines() {
		q.SetState(m.ID, Up, "")
	}
	id := BuildID(0)
	start := cpu(b)
	for b.Loop() {
		id++
		for _, o := range q.Enqueue(s.request(id)) {
			q.Staged(id, o.Machine)
		}
		q.Built(id)
		q.Remove(id)
	}
	perEvent(b, start, 4*b.N)
}
