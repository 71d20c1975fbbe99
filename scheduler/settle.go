package scheduler

import "slices"

// settle does all that can be done after an event: it grants slots on the
// machines touched by it, places queued builds, and moves builds to where a
// slot is free. It returns the event's orders.
//
// Grants come first, for a build that has a slot cannot be moved. Placing and
// moving bring no build whose inputs are there, so no grant can follow from them.
// Each move leaves fewer builds to be moved and each placement fewer queued, so
// it ends. Places for those whose turn it is come last: others may do.
func (q *Queue) settle(touched ...*machine) []Order {
	for _, m := range touched {
		for q.grantNext(m.pool) {
		}
	}
	if q.suspects > 0 {
		q.leaveSuspects()
	}
	for q.placeNext() || q.moveNext() || q.placeHungry() {
	}
	q.forgetRemoved()
	orders := q.orders
	q.orders = nil
	return orders
}

// leaveSuspects queues the builds again that have no slot yet on suspect machines and
// that others can take, at once or in time. They are as old as they were.
func (q *Queue) leaveSuspects() {
	for _, list := range [][]*machine{q.machines, q.removed} {
		for _, m := range list {
			if m.state != Suspect {
				continue
			}
			for _, b := range slices.Clone(m.line) {
				if b.class.well() > 0 {
					q.unplace(b)
					q.enqueue(b)
					q.order(Order{Kind: Withdraw, Build: b.req.ID, From: m.ID, Why: whySuspect})
				}
			}
		}
	}
}

func (q *Queue) order(o Order) { q.orders = append(q.orders, o) }

// grantNext gives a slot of the pool to the staged build whose turn it is among
// those that may have one, and tells whether there was one.
func (q *Queue) grantNext(p *pool) bool {
	var next *build
	for _, m := range p.machines {
		if len(m.line) == 0 || !m.grants() {
			continue
		}
		for _, b := range m.line {
			if b.phase == Staged && (next == nil || grantedBefore(b, next)) {
				next = b
			}
		}
	}
	if next == nil {
		return false
	}
	m := next.machine
	m.leaveLine(next)
	q.turns++
	next.run(q.turns)
	m.running++
	q.refresh(m)
	q.order(Order{Kind: Grant, Build: next.req.ID, Machine: m.ID, Why: whyGrant})
	return true
}

func grantedBefore(a, b *build) bool {
	switch {
	case a.req.Priority != b.req.Priority:
		return a.req.Priority > b.req.Priority
	case a.caller.running != b.caller.running:
		return a.caller.running < b.caller.running
	case a.caller.runningAt != b.caller.runningAt:
		return a.caller.runningAt < b.caller.runningAt
	default:
		return a.turn < b.turn
	}
}

// placeNext places the queued build that is next among those some machine has
// room for, and tells whether there was one.
func (q *Queue) placeNext() bool {
	var next *build
	for _, r := range q.waiting {
		if r.free[stagingPlace]+r.doubtful[stagingPlace] == 0 {
			continue
		}
		for _, c := range r.waiting {
			if (next == nil || before(c.heads.next(), next)) && c.free(stagingPlace) > 0 {
				next = c.heads.next()
			}
		}
	}
	return q.placeChosen(next, false)
}

// placeHungry does the same for the builds of callers that have none in line, where
// there is no room but a place for these.
func (q *Queue) placeHungry() bool {
	var next *build
	for _, r := range q.waiting {
		if r.free[turnPlace]+r.doubtful[turnPlace] == 0 {
			continue
		}
		for _, c := range r.waiting {
			if c.hungry.Len() > 0 && (next == nil || before(c.hungry.next(), next)) && c.free(turnPlace) > 0 {
				next = c.hungry.next()
			}
		}
	}
	return q.placeChosen(next, true)
}

func (q *Queue) placeChosen(b *build, turn bool) bool {
	if b == nil {
		return false
	}
	m, rule := b.class.choose(turn)
	why := rule.text(m)
	q.dequeue(b)
	q.place(b, m)
	q.order(Order{Kind: Place, Build: b.req.ID, Machine: m.ID, Why: why})
	return true
}

// moveNext moves a build to a machine with a free slot, and tells whether there
// was one to move. It comes from a machine that takes no builds, else from the
// one with the highest load/speedFactor; there the build that got least far
// goes, for it has the least to lose.
func (q *Queue) moveNext() bool {
	if !q.canMove() {
		return false
	}
	var from *machine
	for _, list := range [][]*machine{q.machines, q.removed} {
		for _, m := range list {
			if m.movable && (from == nil || leavesBefore(m, from)) && m.leastFar() != nil {
				from = m
			}
		}
	}
	if from == nil {
		return false
	}
	b := from.leastFar()
	to, _ := b.class.choose(false)
	q.unplace(b)
	q.place(b, to)
	q.order(Order{Kind: Move, Build: b.req.ID, Machine: to.ID, From: from.ID, Why: whyMove})
	return true
}

// canMove tells that some build may be moved, and that there is a free slot for it
// unless it has failed there.
func (q *Queue) canMove() bool {
	if q.open == 0 {
		return false
	}
	for _, r := range q.reaches {
		if r.movable > 0 && r.free[slotPlace]+r.doubtful[slotPlace] > 0 {
			return true
		}
	}
	return false
}

// leavesBefore tells whether builds are moved from a rather than from b, which
// comes before a in the list.
func leavesBefore(a, b *machine) bool {
	if a.takes() != b.takes() {
		return !a.takes()
	}
	return float64(a.load)/a.SpeedFactor > float64(b.load)/b.SpeedFactor
}

// leastFar returns the build to be moved from m: one whose inputs are not there
// yet, else of the lowest priority, else placed last; nil when there is no free
// slot for any.
func (m *machine) leastFar() *build {
	var least *build
	for _, b := range m.line {
		switch {
		case b.class.free(slotPlace) == 0:
		case least == nil,
			b.phase < least.phase,
			b.phase == least.phase && b.req.Priority <= least.req.Priority:
			least = b
		}
	}
	return least
}

// enqueue puts b, which is nowhere, into the queue.
func (q *Queue) enqueue(b *build) {
	b.phase, b.machine = Queued, nil
	c, r := b.class, b.class.reach
	c.push(b)
	if c.waiting < 0 {
		c.waiting = len(r.waiting)
		r.waiting = append(r.waiting, c)
	}
	if r.index < 0 {
		r.index = len(q.waiting)
		q.waiting = append(q.waiting, r)
	}
	b.system.queued++
}

// dequeue takes b out of the queue; then it is nowhere.
func (q *Queue) dequeue(b *build) {
	c, r := b.class, b.class.reach
	c.drop(b)
	if c.heads.Len() == 0 {
		last := r.waiting[len(r.waiting)-1]
		r.waiting[c.waiting] = last
		last.waiting = c.waiting
		r.waiting = r.waiting[:len(r.waiting)-1]
		c.waiting = -1
	}
	if len(r.waiting) == 0 {
		last := q.waiting[len(q.waiting)-1]
		q.waiting[r.index] = last
		last.index = r.index
		q.waiting = q.waiting[:len(q.waiting)-1]
		r.index = -1
	}
	b.system.queued--
}

// place puts b, which is nowhere, on m.
func (q *Queue) place(b *build, m *machine) {
	b.phase, b.machine = Staging, m
	q.turns++
	b.turn = q.turns
	m.placed++
	m.line = append(m.line, b)
	if m.movable {
		b.class.reach.movable++
	}
	b.caller.placedAt = q.turns
	b.count(1)
	q.refresh(m)
}

// unplace takes b, which is placed, from its machine; then it is nowhere.
func (q *Queue) unplace(b *build) {
	m := b.machine
	if b.phase == Running {
		m.running--
	} else {
		m.leaveLine(b)
	}
	m.placed--
	b.count(-1)
	b.machine = nil
	q.refresh(m)
}

// inLine tells whether b is on a machine and has no slot.
func (b *build) inLine() bool { return b.phase == Staging || b.phase == Staged }

func (m *machine) leaveLine(b *build) {
	i := slices.Index(m.line, b)
	m.line = slices.Delete(m.line, i, i+1)
	if m.movable {
		b.class.reach.movable--
	}
}

// refresh works out what m's state and counters mean for the machines of its
// pool, and keeps the counts of the reaches. It must follow every change of either.
func (q *Queue) refresh(m *machine) {
	m.pool.recount()
	for _, shares := range m.pool.machines {
		q.refreshOne(shares)
	}
}

// countPlace adds n to the counts that m's place belongs to.
func (m *machine) countPlace(n int) {
	for k := range placeKinds {
		if m.has(k) {
			for _, r := range m.reaches {
				r.places(m)[k] += n
			}
		}
	}
}

// offers is the best place that m has for another build by its state and its load.
func (m *machine) offers() placeKind {
	switch {
	case !m.takes():
		return noPlace
	case m.load < m.MaxJobs:
		return slotPlace
	case m.load < m.MaxJobs+m.Staging:
		return stagingPlace
	case m.load < m.MaxJobs+2*m.Staging:
		return turnPlace
	default:
		return noPlace
	}
}

func (q *Queue) refreshOne(m *machine) {
	m.load = m.slots() - m.pool.free(m, m.pool.own)
	if place, doubted := m.offers(), m.state == Suspect; m.place != place || m.doubted != doubted {
		m.countPlace(-1)
		q.open += count(place == slotPlace) - count(m.place == slotPlace)
		m.place, m.doubted = place, doubted
		m.countPlace(1)
	}
	movable := len(m.line) > 0 && (!m.takes() || m.load > m.MaxJobs)
	if m.movable != movable {
		m.movable = movable
		for _, b := range m.line {
			b.class.reach.movable += 2*count(movable) - 1
		}
	}
}

// forgetRemoved drops the machines that are no longer listed and have nothing
// on them any more.
func (q *Queue) forgetRemoved() {
	q.removed = slices.DeleteFunc(q.removed, func(m *machine) bool {
		if m.own() > 0 {
			return false
		}
		q.forget(m)
		q.leave(m)
		return true
	})
}
