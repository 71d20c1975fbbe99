package main

import (
	"fmt"
	"math/rand/v2"
	"time"

	"nixdispatch/deploy/graph"
	"nixdispatch/proto/nix"
)

// costs are the times that everything takes but building and copying.
type costs struct {
	// Bandwidth of each machine's link, each way, in bytes a second.
	Bandwidth float64
	// RoundTrip to each machine.
	RoundTrip time.Duration
	// Loop is what Nix's client takes for one derivation, half of it when it starts
	// and half when it has ended. It does nothing else meanwhile.
	Loop time.Duration
	// Answer is how long it waits for nix-dispatch's hook, or for Nix's own if that
	// connects to no machine.
	Answer time.Duration
	// Connect is what Nix's own hook takes to connect to a machine before it answers,
	// beside connectTrips round trips.
	Connect time.Duration
	// Process is what it takes to start a remote process.
	Process time.Duration
}

// defaultCosts were measured with Nix 2.26 on two cores; see docs/performance.md.
var defaultCosts = costs{
	Bandwidth: 1e9 / 8,
	RoundTrip: time.Millisecond,
	Loop:      10 * time.Millisecond,
	Answer:    8 * time.Millisecond,
	Connect:   140 * time.Millisecond,
	Process:   25 * time.Millisecond,
}

// connectTrips are the round trips of ssh's handshake and Nix's.
const connectTrips = 10

// A world is what a simulation begins with and where it takes place.
type world struct {
	clock
	costs
	machines []*machine
	clients  []*client
	records  []record
}

// A machine builds the derivations that it is given and keeps their outputs.
type machine struct {
	line  nix.Machine
	up    *link
	down  *link
	paths map[path]bool // that it has
}

// A path is the output of a client's derivation; no two clients build the same.
type path struct {
	client     int
	derivation int
}

// A client has one graph built.
type client struct {
	index int
	name  string
	slots int // max-jobs: builds of its own at a time, where Nix is the client
	graph graph.Graph
	// closures has, for each derivation, all that it needs, in their order.
	closures [][]int
	users    [][]int // by derivation: those that need it
	chains   []int   // by derivation: how many need it in the longest chain
	missing  []int   // by derivation: how many inputs are yet to be built
	left     int     // derivations yet to be built
	end      time.Duration
	// ready is told of derivations whose inputs are there.
	ready func(derivations []int)
}

// A job is a derivation of a client that is being built.
type job struct {
	*client
	derivation int
	record     record
}

// A record is what became of one derivation; times count from the simulation's start.
type record struct {
	Client     int
	Derivation int
	Machine    string // "" for the client's own
	// Ready is when its inputs were built, Taken when it took a slot or, with
	// nix-dispatch, a machine's staging place, Started when its build began and
	// Ended when that ended, and Done when its output was with the client.
	Ready, Taken, Started, Ended, Done time.Duration
}

func newWorld(lines []nix.Machine, graphs []graph.Graph, slots int, c costs) *world {
	w := &world{costs: c}
	for _, line := range lines {
		w.machines = append(w.machines, &machine{
			line:  line,
			up:    &link{clock: &w.clock, bandwidth: c.Bandwidth},
			down:  &link{clock: &w.clock, bandwidth: c.Bandwidth},
			paths: make(map[path]bool),
		})
	}
	for i, g := range graphs {
		c := newClient(i, g)
		c.slots = slots
		w.clients = append(w.clients, c)
	}
	return w
}

func newClient(index int, g graph.Graph) *client {
	c := &client{
		index: index, name: fmt.Sprintf("client%d", index), graph: g,
		closures: make([][]int, len(g)), users: make([][]int, len(g)), missing: make([]int, len(g)),
		chains: make([]int, len(g)), left: len(g),
	}
	for i, d := range g {
		needs := make([]bool, i)
		for _, input := range d.Inputs {
			c.users[input] = append(c.users[input], i)
			needs[input] = true
			for _, p := range c.closures[input] {
				needs[p] = true
			}
		}
		c.missing[i] = len(d.Inputs)
		for p, needed := range needs {
			if needed {
				c.closures[i] = append(c.closures[i], p)
			}
		}
	}
	for i := len(g) - 1; i >= 0; i-- {
		for _, input := range g[i].Inputs {
			c.chains[input] = max(c.chains[input], c.chains[i]+1)
		}
	}
	return c
}

// start tells every client of the derivations that need nothing.
func (w *world) start() {
	for _, c := range w.clients {
		var ready []int
		for i, missing := range c.missing {
			if missing == 0 {
				ready = append(ready, i)
			}
		}
		c.ready(ready)
	}
}

// job begins with a derivation whose inputs are there.
func (w *world) job(c *client, derivation int) *job {
	return &job{c, derivation, record{Client: c.index, Derivation: derivation, Ready: w.now}}
}

// done ends a job whose output its client has, and returns the derivations that
// only waited for it.
func (w *world) done(j *job) []int {
	w.records = append(w.records, j.record)
	if j.left--; j.left == 0 {
		j.end = w.now
	}
	var ready []int
	for _, user := range j.users[j.derivation] {
		if j.missing[user]--; j.missing[user] == 0 {
			ready = append(ready, user)
		}
	}
	return ready
}

func (j *job) work() time.Duration { return j.graph[j.derivation].Work }

func (j *job) output() path { return path{j.index, j.derivation} }

// lacking are the inputs that m has not, in their order.
func (j *job) lacking(m *machine) []path {
	var lacking []path
	for _, input := range j.closures[j.derivation] {
		if p := (path{j.index, input}); !m.paths[p] {
			lacking = append(lacking, p)
		}
	}
	return lacking
}

func (w *world) size(p path) int64 { return w.clients[p.client].graph[p.derivation].Size }

// build runs the job's build on m, and then done.
func (w *world) build(j *job, m *machine, done func()) {
	j.record.Started = w.now
	w.after(w.RoundTrip+time.Duration(float64(j.work())/m.line.SpeedFactor), func() {
		j.record.Ended = w.now
		m.paths[j.output()] = true
		done()
	})
}

// fetch brings the job's output from m, and then done.
func (w *world) fetch(j *job, m *machine, done func()) {
	w.after(w.RoundTrip, func() {
		m.down.send(w.size(j.output()), func() {
			j.record.Done = w.now
			done()
		})
	})
}

// drawn returns n graphs that differ in their durations.
func drawn(g graph.Graph, n int, seed uint64, total time.Duration) []graph.Graph {
	graphs := make([]graph.Graph, n)
	seeds := rand.New(rand.NewPCG(seed, 1))
	for i := range graphs {
		graphs[i] = append(graph.Graph(nil), g...)
		graphs[i].Draw(seeds.Uint64(), total)
	}
	return graphs
}
