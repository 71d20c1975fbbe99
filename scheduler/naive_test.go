package scheduler_test

import (
	"slices"

	. "nixdispatch/scheduler"
)

// naive is the whole scheduler once more, with nothing but lists that are
// searched from end to end and sorted when an order is needed. It follows the
// package comment, not the package.
type naive struct {
	listed  []*naiveMachine
	removed []*naiveMachine
	builds  []*naiveBuild // in the order they came
	orders  []Order
	turn    int // counts placings
}

type naiveMachine struct {
	Machine
	state MachineState
	held  int
}

type naiveBuild struct {
	Request
	phase  Phase
	on     *naiveMachine
	placed int // the turn at which it was placed
}

func (n *naive) machine(id MachineID) *naiveMachine {
	for _, m := range slices.Concat(n.listed, n.removed) {
		if m.ID == id {
			return m
		}
	}
	return nil
}

func (n *naive) build(id BuildID) *naiveBuild {
	i := slices.IndexFunc(n.builds, func(b *naiveBuild) bool { return b.ID == id })
	if i < 0 {
		return nil
	}
	return n.builds[i]
}

// on counts the builds on m that are in one of phases.
func (n *naive) on(m *naiveMachine, phases ...Phase) int {
	count := 0
	for _, b := range n.builds {
		if b.on == m && slices.Contains(phases, b.phase) {
			count++
		}
	}
	return count
}

func (n *naive) load(m *naiveMachine) int { return n.on(m, Staging, Staged, Running) + m.held }

func (n *naive) relativeLoad(m *naiveMachine) float64 { return float64(n.load(m)) / m.SpeedFactor }

func (n *naive) takes(m *naiveMachine) bool { return slices.Contains(n.listed, m) && m.state == Up }

func (n *naive) slotFree(m *naiveMachine) bool { return n.takes(m) && n.load(m) < m.MaxJobs }

func (n *naive) placeFree(m *naiveMachine) bool {
	return n.takes(m) && m.MaxJobs > 0 && n.load(m) < m.MaxJobs+m.Staging
}

// could tells whether m could ever build r.
func could(m Machine, r Request) bool {
	supported := slices.Concat(m.SupportedFeatures, m.MandatoryFeatures)
	for _, f := range r.Features {
		if !slices.Contains(supported, f) {
			return false
		}
	}
	for _, f := range m.MandatoryFeatures {
		if !slices.Contains(r.Features, f) {
			return false
		}
	}
	return m.MaxJobs > 0 && (r.System == "builtin" || slices.Contains(m.Systems, r.System))
}

// eligible returns the listed machines that r may go to, whatever is on them.
func (n *naive) eligible(r Request) []*naiveMachine {
	var all, rest []*naiveMachine
	hope := false
	for _, m := range n.listed {
		if !could(m.Machine, r) {
			continue
		}
		all = append(all, m)
		if !slices.Contains(r.Exclude, m.ID) {
			rest = append(rest, m)
			hope = hope || m.state == Up || m.state == Connecting
		}
	}
	if hope {
		return rest
	}
	return all
}

// best sorts those of r's machines that have what is asked for by the choice rule.
func (n *naive) best(r Request, has func(*naiveMachine) bool) *naiveMachine {
	machines := slices.DeleteFunc(n.eligible(r), func(m *naiveMachine) bool { return !has(m) })
	if len(machines) == 0 {
		return nil
	}
	// Stable, so that what is equal stays in list order.
	slices.SortStableFunc(machines, func(a, b *naiveMachine) int {
		if la, lb := n.relativeLoad(a), n.relativeLoad(b); la != lb {
			return order(la, lb)
		}
		if a.SpeedFactor != b.SpeedFactor {
			return order(b.SpeedFactor, a.SpeedFactor)
		}
		return n.load(a) - n.load(b)
	})
	return machines[0]
}

func order(a, b float64) int {
	if a < b {
		return -1
	}
	return 1
}

func (n *naive) choose(r Request) *naiveMachine {
	if m := n.best(r, n.slotFree); m != nil {
		return m
	}
	return n.best(r, n.placeFree)
}

// queue returns the queued builds in their order.
func (n *naive) queue() []*naiveBuild {
	var queued []*naiveBuild
	placed := map[string]int{}
	for _, b := range n.builds {
		switch b.phase {
		case Queued:
			queued = append(queued, b)
		case Staging, Staged, Running:
			placed[b.Caller]++
		}
	}
	slices.SortStableFunc(queued, func(a, b *naiveBuild) int {
		if a.Priority != b.Priority {
			return b.Priority - a.Priority
		}
		return placed[a.Caller] - placed[b.Caller]
	})
	return queued
}

// line returns the builds on m that have no slot, in the order of their placing.
func (n *naive) line(m *naiveMachine) []*naiveBuild {
	var line []*naiveBuild
	for _, b := range n.builds {
		if b.on == m && (b.phase == Staging || b.phase == Staged) {
			line = append(line, b)
		}
	}
	slices.SortFunc(line, func(a, b *naiveBuild) int { return a.placed - b.placed })
	return line
}

func (n *naive) settle() []Order {
	for _, m := range slices.Concat(n.listed, n.removed) {
		n.grant(m)
	}
	for n.place() || n.move() {
	}
	n.removed = slices.DeleteFunc(n.removed, func(m *naiveMachine) bool { return n.load(m) == 0 })
	orders := n.orders
	n.orders = nil
	return orders
}

func (n *naive) grant(m *naiveMachine) {
	ready := slices.DeleteFunc(n.line(m), func(b *naiveBuild) bool { return b.phase != Staged })
	slices.SortStableFunc(ready, func(a, b *naiveBuild) int { return b.Priority - a.Priority })
	for _, b := range ready {
		if (m.state == Up || m.state == Draining) && n.on(m, Running)+m.held < m.MaxJobs {
			b.phase = Running
			n.orders = append(n.orders, Order{Kind: Grant, Build: b.ID, Machine: m.ID})
		}
	}
}

func (n *naive) put(b *naiveBuild, m *naiveMachine) {
	n.turn++
	b.phase, b.on, b.placed = Staging, m, n.turn
}

func (n *naive) place() bool {
	for _, b := range n.queue() {
		if m := n.choose(b.Request); m != nil {
			n.put(b, m)
			n.orders = append(n.orders, Order{Kind: Place, Build: b.ID, Machine: m.ID})
			return true
		}
	}
	return false
}

func (n *naive) move() bool {
	sources := slices.Concat(n.listed, n.removed)
	slices.SortStableFunc(sources, func(a, b *naiveMachine) int {
		if n.takes(a) != n.takes(b) {
			if n.takes(b) {
				return -1
			}
			return 1
		}
		if la, lb := n.relativeLoad(a), n.relativeLoad(b); la != lb {
			return order(lb, la)
		}
		return 0
	})
	for _, m := range sources {
		if n.takes(m) && n.load(m) <= m.MaxJobs {
			continue
		}
		line := n.line(m)
		slices.Reverse(line) // the last placed first
		slices.SortStableFunc(line, func(a, b *naiveBuild) int {
			if a.phase != b.phase {
				return int(a.phase - b.phase)
			}
			return a.Priority - b.Priority
		})
		for _, b := range line {
			if to := n.best(b.Request, n.slotFree); to != nil {
				n.put(b, to)
				n.orders = append(n.orders, Order{Kind: Move, Build: b.ID, Machine: to.ID, From: m.ID})
				return true
			}
		}
	}
	return false
}

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
		if !slices.Contains(n.listed, m) && n.load(m) > 0 {
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

func (n *naive) Requeue(id BuildID, failed MachineID) []Order {
	b := n.build(id)
	b.Exclude = append(slices.Clone(b.Exclude), failed)
	if b.on != nil && b.on.ID == failed {
		b.phase, b.on = Queued, nil
	}
	return n.settle()
}

func (n *naive) Remove(id BuildID) []Order {
	n.builds = slices.DeleteFunc(n.builds, func(b *naiveBuild) bool { return b.ID == id })
	return n.settle()
}

// Offer is the table of replies, read from top to bottom.
func (n *naive) Offer(r Request, amWilling bool) (Reply, MachineID) {
	matching, alive, slots, queued, local := 0, 0, 0, 0, 0
	for _, m := range n.listed {
		if could(m.Machine, r) {
			matching++
			if m.state == Up || m.state == Connecting {
				alive++
				slots += m.MaxJobs
			}
		}
	}
	for _, b := range n.queue() {
		if b.System == r.System {
			queued++
			if b.CouldBuildLocally {
				local++
			}
		}
	}
	here := r.CouldBuildLocally
	if m := n.best(r, n.slotFree); m != nil {
		return Accept, m.ID
	}
	switch {
	case matching == 0:
		return Decline, ""
	case alive == 0 && here:
		return Decline, ""
	case alive == 0 && queued < max(512, 4*slots):
		return AcceptQueued, ""
	case alive == 0:
		return Postpone, ""
	case here && amWilling:
		return Decline, ""
	case here && local < slots:
		return AcceptQueued, ""
	case here:
		return Postpone, ""
	case queued < max(512, 4*slots):
		return AcceptQueued, ""
	default:
		return Postpone, ""
	}
}
