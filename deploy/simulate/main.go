// Command simulate tells how long graphs of derivations take to build on a fleet of
// machines, by Nix's own hook and through nix-dispatch, against the time that no
// schedule can beat. Nothing is built: time is virtual, and a second is worth hours.
// What decides is the real scheduler, so a change of its rules is judged at once.
//
//	go run ./deploy/simulate
//	go run ./deploy/simulate -machines /etc/nix/machines -work 8h -clients 3 -bandwidth 100 -rtt 20ms -json
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"nixdispatch/deploy/graph"
	"nixdispatch/proto/nix"
)

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// defaultMachines are four unequal ones.
const defaultMachines = `ssh://big    x86_64-linux - 4 2
ssh://medium x86_64-linux - 4 1
ssh://small  x86_64-linux - 2 1
ssh://old    x86_64-linux - 1 1
`

// A config is what the command line asks for.
type config struct {
	graph    graph.Graph
	machines []nix.Machine
	rules    []string
	clients  int
	slots    int // local ones of each client
	seed     uint64
	seeds    int
	work     time.Duration
	system   string
	costs    costs
}

// run returns the exit status: 0, 1 for what cannot be simulated, 2 for bad usage.
func run(args []string, stdout, stderr io.Writer) int {
	cfg, asJSON, err := parseArgs(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintln(stderr, "simulate:", err)
		return 2
	}
	results, err := cfg.simulate()
	if err != nil {
		fmt.Fprintln(stderr, "simulate:", err)
		return 1
	}
	if asJSON {
		err = writeJSON(stdout, cfg, results)
	} else {
		err = writeTable(stdout, cfg, results)
	}
	if err != nil {
		fmt.Fprintln(stderr, "simulate:", err)
		return 1
	}
	return 0
}

func parseArgs(args []string, stderr io.Writer) (cfg config, asJSON bool, err error) {
	flags := flag.NewFlagSet("simulate", flag.ContinueOnError)
	flags.SetOutput(stderr)
	graphFile := flags.String("graph", "", "the graph, a `FILE` of the form of deploy/graph/README.md (default: the one there)")
	machinesFile := flags.String("machines", "", "a `FILE` of machines as Nix reads it; a build takes its work divided by the speed factor (default: four unequal ones)")
	rules := flags.String("rules", strings.Join(ruleNames, ","), "who has the graph built, a `LIST`: Nix with its own hook (stock), with nix-dispatch's (hook), nix-dispatch build (build)")
	flags.IntVar(&cfg.clients, "clients", 1, "how many build the graph at once, each with durations of its own")
	flags.IntVar(&cfg.slots, "local", 0, "max-jobs of each client's Nix")
	flags.Uint64Var(&cfg.seed, "seed", 1, "from which durations are drawn")
	flags.IntVar(&cfg.seeds, "seeds", 1, "from how many seeds, counting up: a row for each")
	flags.DurationVar(&cfg.work, "work", 20*time.Minute, "what one graph's builds take together, one after the other on a machine of speed factor 1")
	flags.StringVar(&cfg.system, "system", "x86_64-linux", "the derivations' system")
	bandwidth := flags.Float64("bandwidth", 1000, "each machine's, each way, in `MBIT/S`")
	cfg.costs = defaultCosts
	flags.DurationVar(&cfg.costs.RoundTrip, "rtt", cfg.costs.RoundTrip, "round trip to each machine")
	flags.BoolVar(&asJSON, "json", false, "write JSON")
	if err := flags.Parse(args); err != nil {
		return cfg, false, err
	}
	cfg.costs.Bandwidth = *bandwidth * 1e6 / 8
	cfg.rules = strings.Split(*rules, ",")
	switch {
	case flags.NArg() > 0:
		return cfg, false, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case cfg.clients < 1 || cfg.seeds < 1 || cfg.slots < 0 || cfg.work <= 0 || *bandwidth <= 0 || cfg.costs.RoundTrip < 0:
		return cfg, false, errors.New("a number is too small")
	}
	if cfg.graph, err = readGraph(*graphFile); err != nil {
		return cfg, false, err
	}
	cfg.machines, err = readMachines(*machinesFile, cfg.system)
	return cfg, asJSON, err
}

func readGraph(file string) (graph.Graph, error) {
	if file == "" {
		return graph.Packages(), nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	g, err := graph.Parse(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return g, nil
}

func readMachines(file, system string) ([]nix.Machine, error) {
	text := defaultMachines
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		text = string(data)
	}
	machines, errs := nix.ParseMachines(text, nix.MachinesOptions{
		DefaultSystems: []string{system}, File: file, ReadFile: os.ReadFile,
	})
	if len(errs) > 0 {
		return nil, errs[0]
	}
	return machines, nil
}
