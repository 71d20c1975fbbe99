package scheduler_test

import (
	"fmt"
	"syscall"
	"testing"

	. "nixdispatch/scheduler"
)

// A fleet of n machines: two systems, some with features, 8 slots each.
func fleet(n int) []Machine {
	ms := make([]Machine, n)
	for i := range ms {
		ms[i] = Machine{
			ID: MachineID(fmt.Sprintf("ssh://m%d", i)), MaxJobs: 8, SpeedFactor: float64(1 + i%3),
			Systems: []string{[]string{"x86_64-linux", "aarch64-linux"}[i%2]},
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
		System:   []string{"x86_64-linux", "aarch64-linux"}[id%2],
		Features: [][]string{nil, nil, {"kvm"}, {"big-parallel", "kvm"}}[id%7%4],
		Caller:   fmt.Sprintf("user%d", id%1000),
	}
}

// saturated returns a Queue with n machines that are up and full, and queued builds.
func saturated(n, queued int) (q *Queue, running []BuildID, last BuildID) {
	q = New()
	q.SetMachines(fleet(n))
	for _, m := range q.Machines() {
		q.SetState(m.ID, Up, "")
	}
	for waiting := 0; waiting < queued; {
		last++
		for _, o := range q.Enqueue(fleetRequest(last)) {
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

// cpu returns the nanoseconds of CPU that the process has used, collector
// included. On a machine that does other things too, the time on the wall says little.
func cpu(b *testing.B) int64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

// BenchmarkEvents times the events of a saturated fleet. One operation is the
// whole life of a build: submit, staged, built and removed, which is 4 events;
// beside it machines going down and coming back.
func BenchmarkEvents(b *testing.B) {
	for _, machines := range []int{10, 100, 1000} {
		for _, queued := range []int{1000, 100_000} {
			name := fmt.Sprintf("machines=%d/queued=%d", machines, queued)
			b.Run("life/"+name, func(b *testing.B) { benchmarkLife(b, machines, queued) })
			b.Run("flap/"+name, func(b *testing.B) { benchmarkFlap(b, machines, queued) })
		}
		b.Run(fmt.Sprintf("offer/machines=%d", machines), func(b *testing.B) {
			q, _, last := saturated(machines, 1000)
			for b.Loop() {
				last++
				q.Offer(fleetRequest(last), false)
			}
		})
		b.Run(fmt.Sprintf("idle/machines=%d", machines), func(b *testing.B) { benchmarkIdle(b, machines) })
	}
}

func benchmarkLife(b *testing.B, machines, queued int) {
	q, running, last := saturated(machines, queued)
	events := 0
	start := cpu(b)
	for b.Loop() {
		last++
		q.Enqueue(fleetRequest(last))
		done := running[0]
		running = running[1:]
		orders := append(q.Built(done), q.Remove(done)...)
		events += 3
		for len(orders) > 0 {
			o := orders[0]
			orders = orders[1:]
			switch o.Kind {
			case Grant:
				running = append(running, o.Build)
			case Place, Move:
				orders = append(orders, q.Staged(o.Build, o.Machine)...)
				events++
			}
		}
	}
	b.ReportMetric(float64(cpu(b)-start)/float64(events), "cpu-ns/event")
}

// benchmarkFlap takes one machine after the other down and up again. Its builds
// stay on it, as after a short break.
func benchmarkFlap(b *testing.B, machines, queued int) {
	q, _, _ := saturated(machines, queued)
	i := 0
	start := cpu(b)
	for b.Loop() {
		id := MachineID(fmt.Sprintf("ssh://m%d", i%machines))
		q.SetState(id, Down, "link")
		q.SetState(id, Up, "")
		i++
	}
	b.ReportMetric(float64(cpu(b)-start)/float64(2*b.N), "cpu-ns/event")
}

// benchmarkIdle runs one build at a time through a fleet that has nothing else to do.
func benchmarkIdle(b *testing.B, machines int) {
	q := New()
	q.SetMachines(fleet(machines))
	for _, m := range q.Machines() {
		q.SetState(m.ID, Up, "")
	}
	id := BuildID(0)
	start := cpu(b)
	for b.Loop() {
		id++
		for _, o := range q.Enqueue(fleetRequest(id)) {
			q.Staged(id, o.Machine)
		}
		q.Built(id)
		q.Remove(id)
	}
	b.ReportMetric(float64(cpu(b)-start)/float64(4*b.N), "cpu-ns/event")
}
