package main

import (
	"cmp"
	"slices"
	"time"
)

// poll is after how long Nix offers again what a hook has put off (poll-interval).
const poll = 5 * time.Second

// A hook answers Nix's clients.
type hook interface {
	// ask offers the derivation. answer is called once, after the time for which the
	// client waits. When a job that was accepted ends, the hook calls built.
	ask(j *job, amWilling bool, answer func(reply), built func())
}

// A reply is a hook's.
type reply int

const (
	accept reply = iota
	decline
	postpone
)

// A nixClient is Nix's own loop, which does one thing after the other: it offers
// the derivations that are ready to the hook, sorted by name, and only when all of
// them have been offered does it look at what has ended (src/libstore/build/worker.cc).
type nixClient struct {
	*world
	*client
	hook hook

	busy     bool
	batch    []*job
	awake    []*job // of the next batch
	ended    []*job // whose end it has not looked at
	putOff   []*job
	starved  []*job // that wait for a slot of its own
	own      int    // builds of its own
	lastWoke time.Duration
	timer    *alarm
}

// newNixClient has the client's graph built by Nix with a hook.
func (w *world) newNixClient(c *client, h hook) {
	n := &nixClient{world: w, client: c, hook: h, lastWoke: -1}
	c.ready = func(derivations []int) {
		n.wake(derivations)
		n.loop()
	}
}

func (n *nixClient) wake(derivations []int) {
	for _, d := range derivations {
		n.awake = append(n.awake, n.job(n.client, d))
	}
}

// loop goes on with what is to be done next. It is called whenever the client has
// nothing under way.
func (n *nixClient) loop() {
	n.timer.off()
	n.busy = true
	if len(n.batch) == 0 {
		n.batch, n.awake = n.awake, nil
		slices.SortStableFunc(n.batch, func(a, b *job) int {
			return cmp.Compare(a.graph[a.derivation].Name, b.graph[b.derivation].Name)
		})
	}
	if len(n.batch) > 0 {
		next := n.batch[0]
		n.batch = n.batch[1:]
		n.after(n.Loop/2, func() { n.offer(next) })
		return
	}
	n.input()
}

// input looks at what has ended, or waits for something to end.
func (n *nixClient) input() {
	if len(n.putOff) == 0 {
		n.lastWoke = -1
	} else if n.lastWoke < 0 {
		n.lastWoke = n.now
	}
	if n.lastWoke >= 0 && n.now >= n.lastWoke+poll {
		n.lastWoke = n.now
		n.awake = append(n.awake, n.putOff...)
		n.putOff = nil
	}
	switch {
	case len(n.ended) > 0:
		n.after(time.Duration(len(n.ended))*n.Loop/2, n.loop)
		for _, j := range n.ended {
			n.wake(n.done(j))
		}
		n.ended = nil
	case len(n.awake) > 0:
		n.loop()
	default:
		n.busy = false
		if n.lastWoke >= 0 {
			n.timer = n.after(n.lastWoke+poll-n.now, n.loop)
		}
	}
}

func (n *nixClient) offer(j *job) {
	n.hook.ask(j, n.own < n.slots, func(r reply) {
		switch {
		case r == postpone:
			n.putOff = append(n.putOff, j)
		case r == decline && n.own < n.slots:
			n.buildHere(j)
		case r == decline:
			n.starved = append(n.starved, j)
		}
		n.loop()
	}, func() { n.end(j) })
}

// buildHere builds the derivation on the client itself.
func (n *nixClient) buildHere(j *job) {
	n.own++
	j.record.Taken, j.record.Started = n.now, n.now
	n.after(j.work(), func() {
		n.own--
		j.record.Ended, j.record.Done = n.now, n.now
		n.awake = append(n.awake, n.starved...)
		n.starved = nil
		n.end(j)
	})
}

func (n *nixClient) end(j *job) {
	n.ended = append(n.ended, j)
	if !n.busy {
		n.loop()
	}
}
