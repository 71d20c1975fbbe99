package main

import (
	"fmt"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/hook"
)

// localStore is what Nix's displays call the store of this host.
const localStore = "local"

// activities shows the events of one build as activities in Nix's own display.
// Levels are such that "nix build" shows everything in its status line, and a
// plain nix-build prints only what the stock hook would.
type activities struct {
	log     *hook.Log
	drvPath string
	// machine is what the user was last told, at first in the reply.
	machine string

	waiting, placed hook.ActivityID
	copy            copyActivity
	moved           bool // was placed before
}

// A copyActivity is the copy of paths to or from the machine.
type copyActivity struct {
	all, path hook.ActivityID
	direction direction
	name      string // of path
	last      *dispatchv1.Transfer
	// credited is how many bytes the paths stopped so far were said to have had.
	credited uint64
}

type direction int

const (
	toMachine direction = iota
	fromMachine
)

func newActivities(log *hook.Log, drvPath, machine string) *activities {
	return &activities{log: log, drvPath: drvPath, machine: machine}
}

// event shows one event; logs and the end of the build are not for it.
func (a *activities) event(ev *dispatchv1.BuildEvent) {
	switch e := ev.GetEvent().(type) {
	case *dispatchv1.BuildEvent_Queued:
		a.stopAll()
		text := fmt.Sprintf("waiting for a machine to build '%s'", a.drvPath)
		if reason := e.Queued.GetReason(); reason != "" {
			text += ": " + nix.PlainText(reason)
		}
		a.waiting = a.log.Start(hook.Talkative, hook.BuildWaiting, text, 0)
	case *dispatchv1.BuildEvent_Placed:
		a.stopAll()
		a.place(nix.PlainText(e.Placed.GetMachine()), nix.PlainText(e.Placed.GetReason()))
	case *dispatchv1.BuildEvent_Copying:
		a.transfer(toMachine, e.Copying.GetTransfer())
	case *dispatchv1.BuildEvent_Building:
		a.endCopy(true)
	case *dispatchv1.BuildEvent_Fetching:
		a.transfer(fromMachine, e.Fetching.GetTransfer())
	}
}

// place tells the machine unless the user knows it.
func (a *activities) place(machine, reason string) {
	moved := a.moved
	a.moved = true
	if machine == a.machine {
		return
	}
	a.machine = machine
	text := fmt.Sprintf("building '%s' on '%s'", a.drvPath, machine)
	if moved && reason != "" {
		text += ": " + reason
	}
	a.placed = a.log.Start(hook.Info, hook.UnknownActivity, text, 0)
}

func (a *activities) transfer(dir direction, t *dispatchv1.Transfer) {
	if t == nil || t.GetPaths() == 0 {
		return
	}
	c := &a.copy
	if c.all != 0 && c.direction != dir {
		a.endCopy(true)
	}
	if c.all == 0 {
		c.direction = dir
		c.all = a.log.Start(hook.Info, hook.CopyPaths, a.copyText(dir, t.GetPaths()), a.placed)
		a.log.SetExpected(c.all, hook.CopyPath, t.GetBytes())
	} else if t.GetBytes() != c.last.GetBytes() {
		a.log.SetExpected(c.all, hook.CopyPath, t.GetBytes())
	}
	c.last = t
	a.transferPath(t)
	running := uint64(0)
	if c.path != 0 {
		running = 1
	}
	a.log.Progress(c.all, t.GetPathsDone(), t.GetPaths(), running)
}

func (a *activities) copyText(dir direction, paths uint64) string {
	noun, preposition := "paths", "to"
	if paths == 1 {
		noun = "path"
	}
	if dir == fromMachine {
		preposition = "from"
	}
	return fmt.Sprintf("copying %d %s %s '%s'", paths, noun, preposition, a.machine)
}

func (a *activities) transferPath(t *dispatchv1.Transfer) {
	c := &a.copy
	path := nix.PlainText(t.GetPath())
	if c.path != 0 && c.name != path {
		a.endPath(t.GetBytesDone() - min(t.GetBytesDone(), t.GetPathBytesDone()))
	}
	if path == "" {
		return
	}
	if c.path == 0 {
		from, to := localStore, a.machine
		text := fmt.Sprintf("copying path '%s' to '%s'", path, a.machine)
		if c.direction == fromMachine {
			from, to = to, from
			text = fmt.Sprintf("copying path '%s' from '%s'", path, a.machine)
		}
		c.path, c.name = a.log.Start(hook.Talkative, hook.CopyPath, text, c.all, path, from, to), path
	}
	a.log.Progress(c.path, t.GetPathBytesDone(), t.GetPathBytes(), 0)
}

// endPath stops the path under way when so many bytes of the whole copy are
// done. Nix adds up the bytes of the paths it was told of; the daemon does not
// tell of all, so this one is credited with those before it.
func (a *activities) endPath(bytesDone uint64) {
	c := &a.copy
	if bytesDone > c.credited {
		n := bytesDone - c.credited
		a.log.Progress(c.path, n, n, 0)
		c.credited = bytesDone
	}
	a.log.Stop(c.path)
	c.path = 0
}

// endCopy stops the copy under way. When it is complete its counts are made
// so first.
func (a *activities) endCopy(complete bool) {
	c := &a.copy
	switch {
	case c.path == 0:
	case complete:
		a.endPath(c.last.GetBytes())
	default:
		a.log.Stop(c.path)
	}
	if c.all != 0 {
		if complete {
			a.log.Progress(c.all, c.last.GetPaths(), c.last.GetPaths(), 0)
		}
		a.log.Stop(c.all)
	}
	*c = copyActivity{}
}

// stopAll stops whatever runs.
func (a *activities) stopAll() {
	a.endCopy(false)
	for _, id := range []*hook.ActivityID{&a.waiting, &a.placed} {
		if *id != 0 {
			a.log.Stop(*id)
			*id = 0
		}
	}
}
