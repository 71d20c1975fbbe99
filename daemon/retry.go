package daemon

import (
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
)

// How long a build keeps away from a machine on which it failed: from the first to the
// last, growing. Until then it does not go there even if no other machine can take it,
// so that the machine's trouble has time to pass.
const (
	restMin = 2 * time.Second
	restMax = 30 * time.Second
	// pauseMin and pauseMax are the same after an attempt that does not count. Besides,
	// it waits until the machine is connected.
	pauseMin = 100 * time.Millisecond
	pauseMax = 5 * time.Second
)

// retry puts a build back into the queue after a machine failed it. It keeps away from
// the machine for the duration of rest.
func (d *Daemon) retry(b *build, fault *machineError, rest time.Duration) {
	e := b.event()
	e.Event = &dispatchv1.BuildEvent_Queued{Queued: &dispatchv1.Queued{Reason: fault.Error()}}
	note := firstLine(nix.PlainText(fault.Error())) + "; the build is tried again"
	if !connectionFailed(fault) { // else the time when the machine is back is not known
		note += ", there not before " + restEnd(rest)
	}
	b.feed.note(note)
	b.feed.post(e)
	b.queued = time.Now()
	d.dispatcher.requeue(b, b.at, rest)
}

// restEnd is when a rest that begins now ends, for people.
func restEnd(rest time.Duration) string { return time.Now().Add(rest).Format(time.TimeOnly) }

// requeue gives a build another try, elsewhere until it has rested.
func (d *dispatcher) requeue(b *build, failed scheduler.MachineID, rest time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if b.place.machine == failed {
		b.setPlaceLocked(placement{})
	}
	b.stopRestLocked()
	words := ""
	if rest > 0 {
		words = "until " + restEnd(rest)
		d.endRestLocked(b, rest)
	}
	d.carryOutLocked(d.queue.Requeue(b.id, failed, words))
}

// endRestLocked ends a build's rest in time.
func (d *dispatcher) endRestLocked(b *build, rest time.Duration) {
	var timer *time.Timer
	timer = time.AfterFunc(rest, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if b.rest == timer { // else it has ended, or another rest has begun
			b.rest = nil
			d.carryOutLocked(d.queue.EndRest(b.id))
		}
	})
	b.rest = timer
}

func (b *build) stopRestLocked() {
	if b.rest != nil {
		b.rest.Stop()
		b.rest = nil
	}
}
