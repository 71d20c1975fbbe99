package buildhook

import (
	"fmt"

	"nixdispatch/proto/hookcall"
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
	moved           bool // the next placing is not the first
}

// A copyActivity is the copy of paths to or from the machine.
type copyActivity struct {
	all, path hook.ActivityID
	direction direction
	name      string // of path
	last      *hookcall.Transfer
	// credited is how many bytes the paths stopped so far were said to have had.
	credited uint64
}

type direction int

const (
	toMachine direction = iota
	fromMachine
)

func newActivities(log *hook.Log, drvPath, machine string) *activities {
	return &activities{log: log, drvPath: drvPath, machine: machine, moved: machine != hook.NeutralMachine}
}

// event shows one event; logs and the end of the build are not for it.
func (a *activities) event(m hookcall.Message) {
	switch e := m.(type) {
	case hookcall.Queued:
		a.stopAll()
		text := fmt.Sprintf("waiting for a machine to build '%s'", a.drvPath)
		if e.Reason != "" {
			text += ": " + nix.PlainText(e.Reason)
		}
		a.waiting = a.log.Start(hook.Talkative, hook.BuildWaiting, text, 0)
	case hookcall.Placed:
		a.stopAll()
		a.place(nix.PlainText(e.Machine), nix.PlainText(e.Reason))
	case hookcall.Copying:
		a.transfer(toMachine, e.Transfer)
	case hookcall.Building:
		a.endCopy(true)
	case hookcall.Fetching:
		a.transfer(fromMachine, e.Transfer)
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

func (a *activities) transfer(dir direction, t *hookcall.Transfer) {
	if t == nil || t.Paths == 0 {
		return
	}
	c := &a.copy
	if c.all != 0 && c.direction != dir {
		a.endCopy(true)
	}
	if c.all == 0 {
		c.direction = dir
		c.all = a.log.Start(hook.Info, hook.CopyPaths, a.copyText(dir, t.Paths), a.placed)
		a.log.SetExpected(c.all, hook.CopyPath, t.Bytes)
	} else if t.Bytes != c.last.Bytes {
		a.log.SetExpected(c.all, hook.CopyPath, t.Bytes)
	}
	c.last = t
	a.transferPath(t)
	running := uint64(0)
	if c.path != 0 {
		running = 1
	}
	a.log.Progress(c.all, t.PathsDone, t.Paths, running)
	if t.PathsDone == t.Paths && t.BytesDone == t.Bytes {
		a.endCopy(true)
	}
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

func (a *activities) transferPath(t *hookcall.Transfer) {
	c := &a.copy
	path := nix.PlainText(t.Path)
	if c.path != 0 && c.name != path {
		a.endPath(t.BytesDone - min(t.BytesDone, t.PathBytesDone))
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
	a.log.Progress(c.path, t.PathBytesDone, t.PathBytes, 0)
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
		a.endPath(c.last.Bytes)
	default:
		a.log.Stop(c.path)
	}
	if c.all != 0 {
		if complete {
			a.log.Progress(c.all, c.last.Paths, c.last.Paths, 0)
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
