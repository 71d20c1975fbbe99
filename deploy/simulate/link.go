package main

import (
	"cmp"
	"slices"
	"time"
)

// A link is one direction of the way to a machine. What travels on it at a time
// shares its bandwidth equally.
type link struct {
	clock     *clock
	bandwidth float64 // bytes a second
	flows     []*flow // by left
	since     time.Duration
	next      *alarm
	carried   int64 // bytes, in all
}

// A flow is what one build has on a link.
type flow struct {
	left float64 // bytes
	done func()
}

// send sets done to happen when size bytes have travelled.
func (l *link) send(size int64, done func()) {
	l.advance()
	l.carried += size
	f := &flow{float64(size), done}
	at, _ := slices.BinarySearchFunc(l.flows, f, func(a, b *flow) int {
		return cmp.Or(cmp.Compare(a.left, b.left), -1) // behind its equals
	})
	l.flows = slices.Insert(l.flows, at, f)
	l.set()
}

// advance works out how far the flows have come.
func (l *link) advance() {
	each := (l.clock.now - l.since).Seconds() * l.bandwidth / float64(max(1, len(l.flows)))
	for _, f := range l.flows {
		f.left -= each
	}
	l.since = l.clock.now
}

// set sets the alarm for the first flow's end.
func (l *link) set() {
	l.next.off()
	if len(l.flows) == 0 {
		return
	}
	seconds := max(0, l.flows[0].left) * float64(len(l.flows)) / l.bandwidth
	l.next = l.clock.after(time.Duration(seconds*float64(time.Second)), func() {
		l.advance()
		first := l.flows[0]
		l.flows = l.flows[1:]
		l.set()
		first.done()
	})
}
