package scheduler_test

import (
	"cmp"
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
	turn    int // counts placings and grants
	// When each caller last placed a build, and last got a slot.
	placedAt, runningAt map[string]int
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

func (n *naive) own(m *naiveMachine) int { return n.on(m, Staging, Staged, Running) + m.held }

func (n *naive) busy(m *naiveMachine) int { return n.on(m, Running) + m.held }

// sharers are the machines with m's URI.
func (n *naive) sharers(m *naiveMachine) []*naiveMachine {
	return slices.DeleteFunc(slices.Concat(n.listed, n.removed), func(o *naiveMachine) bool { return o.ID.URI() != m.ID.URI() })
}

// slots is how many of its URI's slots m may use.
func (n *naive) slots(m *naiveMachine) int {
	most := 0
	for _, o := range n.sharers(m) {
		if slices.Contains(n.listed, o) {
			most = max(most, o.MaxJobs)
		}
	}
	if most > 0 {
		return min(most, m.MaxJobs)
	}
	return m.MaxJobs
}

// free tries every number k: the first k slots of a URI are for m, if it may use
// no more, and no more than k builds can be confined to them.
func (n *naive) free(m *naiveMachine, count func(*naiveMachine) int) int {
	most := 0
	for _, o := range n.sharers(m) {
		most = max(most, n.slots(o))
	}
	free := n.slots(m) - count(m)
	for k := n.slots(m); k <= most; k++ {
		left := k
		for _, o := range n.sharers(m) {
			if n.slots(o) <= k {
				left -= count(o)
			}
		}
		free = min(free, left)
	}
	return free
}

func (n *naive) load(m *naiveMachine) int { return n.slots(m) - n.free(m, n.own) }

func (n *naive) relativeLoad(m *naiveMachine) float64 { return float64(n.load(m)) / m.SpeedFactor }

func (n *naive) takes(m *naiveMachine) bool { return slices.Contains(n.listed, m) && isUp(m) }

func isUp(m *naiveMachine) bool { return m.state == Up || m.state == Suspect }

func isWell(m *naiveMachine) bool { return m.state == Up || m.state == Connecting }

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
	return m.List == r.List && m.MaxJobs > 0 && (r.System == "builtin" || slices.Contains(m.Systems, r.System))
}

// eligible returns the listed machines that r may go to, whatever is on them.
func (n *naive) eligible(r Request) []*naiveMachine {
	list := n.unfailed(r)
	if slices.ContainsFunc(list, isWell) {
		list = slices.DeleteFunc(list, func(m *naiveMachine) bool { return m.state == Suspect })
	}
	return list
}

// unfailed leaves out those that r failed on, if it may.
func (n *naive) unfailed(r Request) []*naiveMachine {
	var all, rest []*naiveMachine
	hope := false
	for _, m := range n.listed {
		if !could(m.Machine, r) {
			continue
		}
		all = append(all, m)
		if !slices.ContainsFunc(r.Exclude, func(id MachineID) bool { return id.URI() == m.ID.URI() }) {
			rest = append(rest, m)
			hope = hope || isUp(m) || m.state == Connecting
		}
	}
	if hope || r.Rest != "" {
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

// chooseByTurn chooses for a build that has no place in choose's way.
func (n *naive) chooseByTurn(r Request) *naiveMachine {
	for _, b := range n.builds {
		if b.Caller == r.Caller && (b.phase == Staging || b.phase == Staged) && (b.Priority >= r.Priority || r.Priority <= 0) {
			return nil
		}
	}
	return n.best(r, func(m *naiveMachine) bool {
		return n.takes(m) && m.MaxJobs > 0 && n.load(m) < m.MaxJobs+2*m.Staging
	})
}

// of counts the builds of a caller that are in one of phases.
func (n *naive) of(caller string, phases ...Phase) int {
	count := 0
	for _, b := range n.builds {
		if b.Caller == caller && slices.Contains(phases, b.phase) {
			count++
		}
	}
	return count
}

// queue returns the queued builds in their order.
func (n *naive) queue() []*naiveBuild {
	queued := slices.DeleteFunc(slices.Clone(n.builds), func(b *naiveBuild) bool { return b.phase != Queued })
	slices.SortStableFunc(queued, func(a, b *naiveBuild) int {
		return cmp.Or(
			b.Priority-a.Priority,
			n.of(a.Caller, Staging, Staged, Running)-n.of(b.Caller, Staging, Staged, Running),
			n.placedAt[a.Caller]-n.placedAt[b.Caller],
			a.Since.Compare(b.Since),
			b.Chain-a.Chain)
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
		for n.grant(n.sharers(m)) {
		}
	}
	n.leaveSuspects()
	for n.place(n.choose) || n.move() || n.place(n.chooseByTurn) {
	}
	n.removed = slices.DeleteFunc(n.removed, func(m *naiveMachine) bool { return n.own(m) == 0 })
	orders := n.orders
	n.orders = nil
	return orders
}

// leaveSuspects withdraws what has no slot on suspect machines and may go elsewhere.
func (n *naive) leaveSuspects() {
	for _, m := range slices.Concat(n.listed, n.removed) {
		if m.state != Suspect {
			continue
		}
		for _, b := range n.line(m) {
			if slices.ContainsFunc(n.eligible(b.Request), isWell) {
				b.phase, b.on = Queued, nil
				n.orders = append(n.orders, Order{Kind: Withdraw, Build: b.ID, From: m.ID})
			}
		}
	}
}

// grant gives a slot to one of the builds on machines with the same URI.
func (n *naive) grant(machines []*naiveMachine) bool {
	var ready []*naiveBuild
	for _, m := range machines {
		if (isUp(m) || m.state == Draining || m.state == Parked) && n.free(m, n.busy) > 0 {
			ready = append(ready, n.line(m)...)
		}
	}
	ready = slices.DeleteFunc(ready, func(b *naiveBuild) bool { return b.phase != Staged })
	slices.SortFunc(ready, func(a, b *naiveBuild) int {
		return cmp.Or(
			b.Priority-a.Priority,
			n.of(a.Caller, Running)-n.of(b.Caller, Running),
			n.runningAt[a.Caller]-n.runningAt[b.Caller],
			a.placed-b.placed)
	})
	if len(ready) == 0 {
		return false
	}
	ready[0].phase = Running
	n.turn++
	n.runningAt[ready[0].Caller] = n.turn
	n.orders = append(n.orders, Order{Kind: Grant, Build: ready[0].ID, Machine: ready[0].on.ID})
	return true
}

func (n *naive) put(b *naiveBuild, m *naiveMachine) {
	n.turn++
	b.phase, b.on, b.placed = Staging, m, n.turn
	n.placedAt[b.Caller] = n.turn
}

func (n *naive) place(choose func(Request) *naiveMachine) bool {
	for _, b := range n.queue() {
		if m := choose(b.Request); m != nil {
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

// Offer is the table of replies, read from top to bottom.
func (n *naive) Offer(r Request, amWilling bool) (Reply, MachineID) {
	matching, alive, up, slots, queued, local := 0, 0, 0, 0, 0, 0
	most := map[string]int{}
	for _, m := range n.listed {
		if could(m.Machine, r) {
			matching++
			if isUp(m) || m.state == Connecting {
				alive++
				if isUp(m) {
					up++
				}
				uri := m.ID.URI()
				most[uri] = max(most[uri], m.MaxJobs)
			}
		}
	}
	for _, s := range most {
		slots += s
	}
	for _, b := range n.queue() {
		if b.System == r.System && b.List == r.List && b.Caller == r.Caller {
			queued++
			if b.CouldBuildLocally {
				local++
			}
		}
	}
	here, limit := r.CouldBuildLocally, max(512, 4*slots)
	if m := n.best(r, n.slotFree); m != nil {
		return Accept, m.ID
	}
	switch {
	case matching == 0:
		return Decline, ""
	case alive == 0 && here:
		return Decline, ""
	case alive == 0 && queued < limit:
		return AcceptQueued, ""
	case alive == 0:
		return Postpone, ""
	case here && amWilling:
		return Decline, ""
	case here && up == 0:
		return Postpone, ""
	case here && local < slots:
		return AcceptQueued, ""
	case here:
		return Postpone, ""
	case queued < limit:
		return AcceptQueued, ""
	default:
		return Postpone, ""
	}
}
