package main

import (
	"fmt"
	"slices"
	"time"

	"nixdispatch/deploy/graph"
)

// The rules by which a graph can be built.
var ruleNames = []string{"stock", "hook", "build"}

// A result is what came of one simulation.
type result struct {
	Rule string `json:"rule"`
	Seed uint64 `json:"seed"`
	// Bound is the time that no schedule can beat; see graph.Bound.
	Bound seconds `json:"bound_seconds"`
	// Makespan is when the last client had all it wanted; Mean is when one of
	// them had, in the mean.
	Makespan seconds `json:"makespan_seconds"`
	Mean     seconds `json:"mean_client_seconds"`
	// Ratio is Makespan divided by Bound.
	Ratio float64 `json:"ratio"`
	// Busy is the part of the fleet's speed that builds used until Makespan.
	Busy float64 `json:"busy"`
	// Sent and Fetched are bytes to and from machines.
	Sent    int64 `json:"sent_bytes"`
	Fetched int64 `json:"fetched_bytes"`
	// Local counts derivations that clients built themselves.
	Local int `json:"local_builds"`

	records []record
}

// seconds are a duration that JSON and tables show as a number of them.
type seconds float64

func inSeconds(d time.Duration) seconds { return seconds(d.Seconds()) }

// simulate has the graph built once by each rule and seed.
func (cfg config) simulate() ([]result, error) {
	var results []result
	for _, rule := range cfg.rules {
		if !slices.Contains(ruleNames, rule) {
			return nil, fmt.Errorf("there is no rule %q, only %q", rule, ruleNames)
		}
	}
	if len(cfg.fleet()) == 0 {
		return nil, fmt.Errorf("no machine builds for %s without required features", cfg.system)
	}
	for seed := cfg.seed; seed < cfg.seed+uint64(cfg.seeds); seed++ {
		graphs := drawn(cfg.graph, cfg.clients, seed, cfg.work)
		for _, rule := range cfg.rules {
			r, err := cfg.simulateRule(rule, graphs)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", rule, err)
			}
			r.Seed = seed
			results = append(results, r)
		}
	}
	return results, nil
}

func (cfg config) simulateRule(rule string, graphs []graph.Graph) (result, error) {
	w := newWorld(cfg.machines, graphs, cfg.slots, cfg.costs)
	switch rule {
	case "stock":
		h := newStockHook(w, cfg.system)
		for _, c := range w.clients {
			w.newNixClient(c, h)
		}
	case "hook":
		d := newDispatcher(w, cfg.system)
		for _, c := range w.clients {
			w.newNixClient(c, d)
		}
	case "build":
		d := newDispatcher(w, cfg.system)
		for _, c := range w.clients {
			d.newBuilder(c)
		}
	}
	w.start()
	w.run()
	local := graph.Machine{Slots: cfg.slots * cfg.clients, Speed: 1}
	return w.result(rule, graph.Bound(append(cfg.fleet(), local), graphs...))
}

// fleet are the machines that could build anything.
func (cfg config) fleet() []graph.Machine {
	var fleet []graph.Machine
	for _, m := range cfg.machines {
		if eligible(m, cfg.system) {
			fleet = append(fleet, graph.Machine{Slots: m.MaxJobs, Speed: m.SpeedFactor})
		}
	}
	return fleet
}

// result sums up what has happened.
func (w *world) result(rule string, bound time.Duration) (result, error) {
	r := result{Rule: rule, Bound: inSeconds(bound), records: w.records}
	var end, ends, used time.Duration
	for _, c := range w.clients {
		if c.left > 0 {
			return r, fmt.Errorf("%d derivations of %s were never built", c.left, c.name)
		}
		end, ends = max(end, c.end), ends+c.end
	}
	var speed float64
	for _, m := range w.machines {
		speed += float64(m.line.MaxJobs) * m.line.SpeedFactor
		r.Sent += m.up.carried
		r.Fetched += m.down.carried
	}
	for _, rec := range w.records {
		if rec.Machine == "" {
			r.Local++
			continue
		}
		used += w.clients[rec.Client].graph[rec.Derivation].Work
	}
	r.Makespan, r.Mean = inSeconds(end), inSeconds(ends/time.Duration(len(w.clients)))
	if bound > 0 {
		r.Ratio = float64(end) / float64(bound)
	}
	if end > 0 {
		r.Busy = used.Seconds() / (speed * end.Seconds())
	}
	return r, nil
}
