package main

import (
	"fmt"

	"nixdispatch/scheduler"
)

// A dispatcher is nix-dispatchd: the real scheduler, told what happens in virtual
// time. It serves as a hook and builds whole graphs.
type dispatcher struct {
	*world
	system string
	queue  *scheduler.Queue
	byID   map[scheduler.MachineID]*site
	jobs   map[scheduler.BuildID]*order
	last   scheduler.BuildID
	events int
}

// A site is a machine and the inputs on their way there.
type site struct {
	*machine
	claimed map[path]*upload
	waiting []*upload // for others' paths
}

// An order is a job that the dispatcher has taken.
type order struct {
	*job
	id    scheduler.BuildID
	copy  *upload // of its inputs, where it is
	built func()
}

func newDispatcher(w *world, system string) *dispatcher {
	d := &dispatcher{
		world: w, system: system, queue: scheduler.New(),
		byID: make(map[scheduler.MachineID]*site), jobs: make(map[scheduler.BuildID]*order),
	}
	var machines []scheduler.Machine
	for i, m := range w.machines {
		id := scheduler.MachineID(fmt.Sprintf("%s#%d", m.line.StoreURI, i))
		d.byID[id] = &site{machine: m, claimed: make(map[path]*upload)}
		machines = append(machines, scheduler.Machine{
			ID: id, Systems: m.line.SystemTypes, MaxJobs: m.line.MaxJobs, SpeedFactor: m.line.SpeedFactor,
			SupportedFeatures: m.line.SupportedFeatures, MandatoryFeatures: m.line.MandatoryFeatures,
		})
	}
	d.queue.SetMachines(machines)
	for _, m := range machines {
		d.queue.SetState(m.ID, scheduler.Up, "")
	}
	return d
}

// request is what the daemon asks the scheduler for.
func (d *dispatcher) request(j *job) scheduler.Request {
	return scheduler.Request{ID: d.last + 1, System: d.system, Caller: j.name}
}

// ask answers as the daemon's hook does: at once, whether or not a slot is free.
func (d *dispatcher) ask(j *job, amWilling bool, answer func(reply), built func()) {
	r := d.request(j)
	r.CouldBuildLocally = j.slots > 0
	decision := d.queue.Offer(r, amWilling)
	replies := map[scheduler.Reply]reply{scheduler.Decline: decline, scheduler.Postpone: postpone}
	said := replies[decision.Reply] // accept, whether queued or not
	if said == accept {
		d.submit(j, r, built)
	}
	d.after(d.Answer, func() { answer(said) })
}

func (d *dispatcher) submit(j *job, r scheduler.Request, built func()) {
	d.last++
	d.jobs[r.ID] = &order{job: j, id: r.ID, built: built}
	d.carryOut(d.queue.Enqueue(r))
}

// carryOut does what the scheduler demands, as the daemon would.
func (d *dispatcher) carryOut(orders []scheduler.Order) {
	d.events++
	for _, o := range orders {
		b := d.jobs[o.Build]
		switch o.Kind {
		case scheduler.Place, scheduler.Move:
			b.copy.abandon()
			b.record.Taken = d.now
			b.record.Machine = o.Machine.URI()
			b.copy = &upload{d: d, order: b, to: d.byID[o.Machine], id: o.Machine}
			d.after(d.Process+d.RoundTrip, b.copy.claim)
		case scheduler.Grant:
			d.grant(b)
		case scheduler.Withdraw:
			b.copy.abandon()
		}
	}
}

func (d *dispatcher) grant(b *order) {
	m := b.copy.to.machine
	d.build(b.job, m, func() {
		d.carryOut(d.queue.Built(b.id))
		d.fetch(b.job, m, func() {
			delete(d.jobs, b.id)
			d.carryOut(d.queue.Remove(b.id))
			b.built()
		})
	})
}

// An upload brings a job's inputs to a machine, each path once: what others
// bring is waited for.
type upload struct {
	d     *dispatcher
	order *order
	to    *site
	id    scheduler.MachineID
	mine  []path // claimed and not sent
	over  bool
}

// claim takes the paths that nobody brings, and goes on.
func (u *upload) claim() {
	if u.over {
		return
	}
	for _, p := range u.order.lacking(u.to.machine) {
		if u.to.claimed[p] == nil {
			u.to.claimed[p] = u
			u.mine = append(u.mine, p)
		}
	}
	u.next()
}

func (u *upload) next() {
	switch {
	case u.over:
	case len(u.mine) > 0:
		p := u.mine[0]
		u.to.up.send(u.d.size(p), func() { u.sent(p) })
	case len(u.order.lacking(u.to.machine)) > 0:
		u.to.waiting = append(u.to.waiting, u)
	default:
		u.d.carryOut(u.d.queue.Staged(u.order.id, u.id))
	}
}

func (u *upload) sent(p path) {
	u.to.paths[p] = true
	delete(u.to.claimed, p)
	if !u.over {
		u.mine = u.mine[1:]
	}
	u.to.wake()
	u.next()
}

// wake has those that wait look anew.
func (s *site) wake() {
	waiting := s.waiting
	s.waiting = nil
	for _, u := range waiting {
		u.claim()
	}
}

// abandon gives up what is claimed and not under way, for the job has left.
func (u *upload) abandon() {
	if u == nil {
		return
	}
	u.over = true
	for i, p := range u.mine {
		if i > 0 { // the first is under way
			delete(u.to.claimed, p)
		}
	}
	u.mine = nil
	u.to.wake()
}

// newBuilder has the client's graph built as nix-dispatch build does: every
// derivation is submitted as soon as its inputs are there. The whole graph is
// known, so that the builds that many others wait for go first.
func (d *dispatcher) newBuilder(c *client) {
	c.ready = func(derivations []int) {
		for _, i := range derivations {
			j := d.job(c, i)
			r := d.request(j)
			r.Chain = c.chains[i]
			d.submit(j, r, func() { c.ready(d.done(j)) })
		}
	}
}
