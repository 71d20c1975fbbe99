package scheduler

import (
	"math"
	"slices"
)

// A pool is the machines with one store URI, which share its slots.
type pool struct {
	// machines are those listed, in list order, then those removed.
	machines []*machine
	// most is the largest max-jobs of those listed; 0 if none is.
	most int
	// bounds are the numbers of slots that machines may use, each once, ascending;
	// own and busy count, for each of them, what all machines with as many have.
	bounds    []int
	own, busy []int
}

// own is the number of slots spoken for by m's own builds.
func (m *machine) own() int { return m.placed + m.held }

// busy is the number of slots that m's own builds have or had.
func (m *machine) busy() int { return m.running + m.held }

// slots is how many of its URI's slots m may use: a machine that is listed no
// more lives within what the URI has now.
func (m *machine) slots() int {
	if m.index < 0 && m.pool.most > 0 {
		return min(m.MaxJobs, m.pool.most)
	}
	return m.MaxJobs
}

// recount counts own and busy anew.
func (p *pool) recount() {
	clear(p.own)
	clear(p.busy)
	for _, m := range p.machines {
		p.own[m.bound] += m.own()
		p.busy[m.bound] += m.busy()
	}
}

// free is how many more builds m can have in slots, each in one below its own
// machine's number of slots, when machines have as many as counts, p.own or p.busy,
// says; negative when there are too many already.
//
// Builds can all have a slot if, for every number k, no more than k of them are
// confined to the first k slots.
func (p *pool) free(m *machine, counts []int) int {
	free, confined := math.MaxInt, 0
	for i, k := range p.bounds {
		confined += counts[i]
		if i >= m.bound {
			free = min(free, k-confined)
		}
	}
	return free
}

// sum adds up what count says of the machines of a pool.
func (p *pool) sum(count func(*machine) int) int {
	n := 0
	for _, m := range p.machines {
		n += count(m)
	}
	return n
}

// repool sorts all machines into their pools.
func (q *Queue) repool() {
	q.pools = make(map[string]*pool, len(q.machines)+len(q.removed))
	for _, list := range [][]*machine{q.machines, q.removed} {
		for _, m := range list {
			p := q.pools[m.ID.URI()]
			if p == nil {
				p = new(pool)
				q.pools[m.ID.URI()] = p
			}
			m.pool = p
			p.machines = append(p.machines, m)
			if m.index >= 0 {
				p.most = max(p.most, m.MaxJobs)
			}
		}
	}
	for _, p := range q.pools {
		p.bound()
	}
}

// bound works out the bounds.
func (p *pool) bound() {
	for _, m := range p.machines {
		p.bounds = append(p.bounds, m.slots())
	}
	slices.Sort(p.bounds)
	p.bounds = slices.Compact(p.bounds)
	p.own, p.busy = make([]int, len(p.bounds)), make([]int, len(p.bounds))
	for _, m := range p.machines {
		m.bound, _ = slices.BinarySearch(p.bounds, m.slots())
	}
}

// leave takes m, which has nothing on it, out of its pool. That frees no slot.
func (q *Queue) leave(m *machine) {
	p := m.pool
	i := slices.Index(p.machines, m)
	p.machines = slices.Delete(p.machines, i, i+1)
	if len(p.machines) == 0 {
		delete(q.pools, m.ID.URI())
	}
}
