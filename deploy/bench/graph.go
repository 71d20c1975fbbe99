package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"nixdispatch/deploy/fleet"
	"nixdispatch/deploy/graph"
)

const (
	graphWork = 20 * time.Minute
	graphSeed = 1
	// graphShrink makes outputs smaller than the packages: what is measured is the
	// order of things, not this computer's disk.
	graphShrink = 50
	// graphPart is how many of its derivations the stock hook builds, too: it would
	// take many minutes for all of them.
	graphPart = 250
)

// graphFleet are the machines of the row, as in deploy/simulate.
var graphFleet = []graph.Machine{{Slots: 4, Speed: 2}, {Slots: 4, Speed: 1}, {Slots: 2, Speed: 1}, {Slots: 1, Speed: 1}}

var graphRow = row{
	name: "graph",
	work: "1,000 packages' graph (deploy/graph), builds that sleep for durations drawn from a seed, 20 min in all, " +
		"on 4 machines that do it in 80 s if they have always something to do",
	needsFleet: true,
	run: func(ctx context.Context, b *bench) (_ []figure, err error) {
		g := graph.Packages()
		g.Draw(graphSeed, graphWork)
		cfg := siteConfig{client: fleet.HostConfig{Suite: fleet.Trixie}, machines: plainMachines(len(graphFleet))}
		for n, m := range graphFleet {
			cfg.machines[n].columns = fmt.Sprintf("x86_64-linux - %d %g", m.Slots, m.Speed)
		}
		s, err := b.newSite(ctx, cfg)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		for n, m := range graphFleet {
			if err := s.machines[n].WriteFile("/etc/machine-speed", fmt.Appendf(nil, "speed=%g\n", m.Speed), 0o644); err != nil {
				return nil, err
			}
		}
		whole := figure{Unit: "s", Goals: []goal{{Side: byHook, Of: limit, AtMost: 1.5}, {Side: byBuild, Of: limit, AtMost: 1.15}}}
		part := figure{Case: fmt.Sprintf("the first %d", graphPart), Unit: "s"}
		err = errors.Join(
			b.rounds(ctx, &whole, 1, graphLimit(g), s.graphBy(byHook, g, ourHook), s.graphBy(byBuild, g, "")),
			b.rounds(ctx, &part, 1, graphLimit(g[:graphPart]), s.graphBy(byHook, g[:graphPart], ourHook), s.graphBy(stock, g[:graphPart], stockHook)))
		return []figure{whole, part}, err
	},
}

// The two ways of ours to build a graph.
const (
	byHook  = "ours, nix-store with the hook"
	byBuild = "ours, nix-dispatch build"
)

// graphLimit is the time that no schedule can beat.
func graphLimit(g graph.Graph) measure {
	return measure{limit, func(context.Context, int) (float64, error) { return graph.Bound(graphFleet, g).Seconds(), nil }}
}

// graphBy builds the graph by Nix with a hook, or by nix-dispatch build.
func (s *site) graphBy(side string, g graph.Graph, hook string) measure {
	return measure{side, func(ctx context.Context, _ int) (float64, error) {
		drvs, err := s.instantiate(ctx, graphExpr(g, fmt.Sprint(side, len(g))))
		if err != nil {
			return 0, err
		}
		command := []string{programs + "/nix-dispatch", "build"}
		if hook != "" {
			command = append([]string{"nix-store", "--realise", "--quiet"}, hookOption(hook)...)
		}
		return s.timed(ctx, append(command, drvs...)...)
	}}
}

// graphExpr is an expression for the derivations that no other needs; salt makes
// all of them new.
func graphExpr(g graph.Graph, salt string) string {
	var x strings.Builder
	fmt.Fprintf(&x, `let mk = name: ms: bytes: inputs: derivation {
		inherit name ms bytes inputs; salt = %q; system = "x86_64-linux"; builder = "/bin/sh";
		args = [ "-c" ''
			PATH=/usr/bin:/bin
			. /etc/machine-speed
			ms=$((ms / speed))
			sleep $((ms / 1000)).$(printf %%03d $((ms %% 1000)))
			{ echo "$inputs"; head -c $bytes /dev/zero; } >$out
		'' ];
	};
`, salt)
	needed := make([]bool, len(g))
	for i, d := range g {
		fmt.Fprintf(&x, "p%d = mk %q %d %d [", i, d.Name, d.Work.Milliseconds(), d.Size/graphShrink)
		for _, input := range d.Inputs {
			fmt.Fprintf(&x, " p%d", input)
			needed[input] = true
		}
		x.WriteString(" ];\n")
	}
	x.WriteString("in [")
	for i, n := range needed {
		if !n {
			fmt.Fprintf(&x, " p%d", i)
		}
	}
	x.WriteString(" ]\n")
	return x.String()
}

// instantiate writes the graph's derivations into the client's store, and returns
// those that no other needs.
func (s *site) instantiate(ctx context.Context, expr string) ([]string, error) {
	const file = "/root/graph.nix"
	if err := s.client.WriteFile(file, []byte(expr), 0o644); err != nil {
		return nil, err
	}
	out, err := s.client.Run(ctx, "nix-instantiate", file)
	if err != nil {
		return nil, err
	}
	return strings.Fields(out.Stdout), nil
}

// timed runs a program on the client and returns the seconds it took.
func (s *site) timed(ctx context.Context, argv ...string) (float64, error) {
	started := time.Now()
	_, err := s.client.Run(ctx, argv...)
	return time.Since(started).Seconds(), err
}
