package main

import (
	"container/heap"
	"time"
)

// A clock is virtual time: it stands still while something happens and jumps to
// when the next thing does. What happens at the same time happens in the order in
// which it was set, so a simulation always runs in the same way.
type clock struct {
	now    time.Duration
	alarms alarmHeap
	seq    uint64
}

// An alarm is something set to happen.
type alarm struct {
	at  time.Duration
	seq uint64
	do  func() // nil once called off
}

// after sets do to happen in d.
func (c *clock) after(d time.Duration, do func()) *alarm {
	c.seq++
	a := &alarm{at: c.now + max(0, d), seq: c.seq, do: do}
	heap.Push(&c.alarms, a)
	return a
}

// off keeps the alarm, which may be nil, from happening.
func (a *alarm) off() {
	if a != nil {
		a.do = nil
	}
}

// run lets happen what is set, and what that sets, until nothing is.
func (c *clock) run() {
	for len(c.alarms) > 0 {
		a := heap.Pop(&c.alarms).(*alarm)
		if a.do != nil {
			c.now = a.at
			a.do()
		}
	}
}

// An alarmHeap has the next alarm on top.
type alarmHeap []*alarm

func (h alarmHeap) Len() int { return len(h) }
func (h alarmHeap) Less(i, j int) bool {
	return h[i].at < h[j].at || h[i].at == h[j].at && h[i].seq < h[j].seq
}
func (h alarmHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }

// Push is for container/heap.
func (h *alarmHeap) Push(x any) { *h = append(*h, x.(*alarm)) }

// Pop is for container/heap.
func (h *alarmHeap) Pop() any {
	last := len(*h) - 1
	a := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return a
}
