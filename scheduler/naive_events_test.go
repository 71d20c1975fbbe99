package scheduler_test

import (
	"slices"

	. "nixdispatch/scheduler"
)

func (n *naive) SetMachines(ms []Machine) []Order {
	old := slices.Concat(n.listed, n.removed)
	n.listed, n.removed = nil, nil
	for _, conf := range ms {
		m := &naiveMachine{}
		if i := slices.IndexFunc(old, func(o *naiveMachine) bool { return o.ID == conf.ID }); i >= 0 {
			m = old[i]
		}
		if conf.SpeedFactor == 0 {
			conf.SpeedFactor = 1
		}
		if conf.Staging == 0 {
			conf.Staging = max(1, conf.MaxJobs/2)
		}
		conf.Staging = max(0, conf.Staging)
		m.Machine = conf
		n.listed = append(n.listed, m)
	}
	for _, m := range old {
		if !slices.Contains(n.listed, m) && n.own(m) > 0 {
			n.removed = append(n.removed, m)
		}
	}
	for _, m := range n.listed {
		for _, b := range n.line(m) {
			if !could(m.Machine, b.Request) {
				b.phase, b.on = Queued, nil
				n.orders = append(n.orders, Order{Kind: Withdraw, Build: b.ID, From: m.ID})
			}
		}
	}
	return n.settle()
}

func (n *naive) SetState(id MachineID, state MachineState) []Order {
	if m := n.machine(id); m != nil {
		m.state = state
	}
	return n.settle()
}

func (n *naive) Enqueue(r Request) []Order {
	n.builds = append(n.builds, &naiveBuild{Request: r})
	return n.settle()
}

func (n *naive) Staged(id BuildID, on MachineID) []Order {
	if b := n.build(id); b.on != nil && b.on.ID == on {
		b.phase = Staged
	}
	return n.settle()
}

func (n *naive) Built(id BuildID) []Order {
	n.build(id).phase = Fetching
	return n.settle()
}

func (n *naive) Lost(id BuildID) []Order {
	b := n.build(id)
	b.phase = Lost
	b.on.held++
	return n.settle()
}

func (n *naive) Release(id MachineID) []Order {
	n.machine(id).held--
	return n.settle()
}

func (n *naive) EndRest(id BuildID) []Order {
	n.build(id).Rest = ""
	return n.settle()
}

func (n *naive) Requeue(id BuildID, failed MachineID, rest string) []Order {
	b := n.build(id)
	b.Exclude = append(slices.Clone(b.Exclude), failed)
	b.Rest = rest
	if b.on != nil && b.on.ID == failed {
		b.phase, b.on = Queued, nil
	}
	return n.settle()
}

func (n *naive) Remove(id BuildID) []Order {
	caller := n.build(id).Caller
	n.builds = slices.DeleteFunc(n.builds, func(b *naiveBuild) bool { return b.ID == id })
	n.forget(caller)
	return n.settle()
}

// forget makes a caller without builds a new one.
func (n *naive) forget(caller string) {
	if n.of(caller, Queued, Staging, Staged, Running, Fetching, Lost) == 0 {
		delete(n.placedAt, caller)
		delete(n.runningAt, caller)
	}
}

func (n *naive) Join(id BuildID, caller string, priority int) []Order {
	b := n.build(id)
	b.Priority = max(b.Priority, priority)
	own := b.Caller
	waits := b.phase == Queued || b.phase == Staging || b.phase == Staged
	mine, theirs := n.of(own, Staging, Staged, Running), n.of(caller, Staging, Staged, Running)
	if b.phase != Queued {
		mine--
	}
	if waits && theirs < mine {
		b.Caller = caller
		n.forget(own)
	}
	return n.settle()
}
