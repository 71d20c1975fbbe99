// Package graph holds graphs of derivations for simulation and benchmarks: who
// needs whom, how large the outputs are, how long the builds take, and how fast
// machines can have built them at best.
package graph

import (
	"bufio"
	_ "embed"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Derivation is one node of a Graph.
type Derivation struct {
	Name string
	// Inputs are the places in the Graph of those it needs, all before its own.
	Inputs []int
	// Size is the size of its output in bytes.
	Size int64
	// Work is how long its build takes on a machine with speed factor 1.
	Work time.Duration
}

// A Graph is derivations, each after all that it needs.
type Graph []Derivation

// Parse reads a graph: a derivation a line, with tabs between its name, the size of
// its output in KiB, and the names of its inputs, separated by commas, which stand
// on earlier lines. No Work is set.
func Parse(r io.Reader) (Graph, error) {
	var g Graph
	place := make(map[string]int)
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		d, err := parseLine(lines.Text(), place)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		place[d.Name] = len(g)
		g = append(g, d)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("line %d: %w", len(g)+1, err)
	}
	return g, nil
}

// maxKiB bounds a size, so that no sum of sizes overflows.
const maxKiB = 1 << 40

func parseLine(line string, place map[string]int) (Derivation, error) {
	fields := strings.Split(line, "\t")
	if len(fields) != 3 || fields[0] == "" {
		return Derivation{}, fmt.Errorf("%q is not a name, a size and inputs with tabs between them", line)
	}
	d := Derivation{Name: fields[0]}
	if _, known := place[d.Name]; known {
		return d, fmt.Errorf("%q stands there twice", d.Name)
	}
	kib, err := strconv.ParseInt(fields[1], 10, 64)
	if err != nil || kib < 0 || kib > maxKiB {
		return d, fmt.Errorf("%q: size %q is not a number of KiB", d.Name, fields[1])
	}
	d.Size = kib << 10
	for input := range strings.SplitSeq(fields[2], ",") {
		if input == "" {
			continue
		}
		i, known := place[input]
		if !known {
			return d, fmt.Errorf("%q needs %q, which is on no earlier line", d.Name, input)
		}
		d.Inputs = append(d.Inputs, i)
	}
	return d, nil
}

//go:embed packages-1000.tsv
var packages string

// Packages returns the graph that README.md tells of, a copy of the caller's own.
func Packages() Graph {
	g, err := Parse(strings.NewReader(packages))
	if err != nil {
		panic("graph: packages-1000.tsv: " + err.Error())
	}
	return g
}

// spread is the standard deviation of the logarithm of a build's duration: of a
// thousand builds the longest takes a hundred times as long as the median, as is
// usual for packages.
const spread = 1.2

// Draw sets the Work of every derivation to a duration drawn from seed, all of them
// together about total.
func (g Graph) Draw(seed uint64, total time.Duration) {
	random := rand.New(rand.NewPCG(seed, 0))
	weights, sum := make([]float64, len(g)), 0.0
	for i := range g {
		weights[i] = math.Exp(spread * random.NormFloat64())
		sum += weights[i]
	}
	for i := range g {
		g[i].Work = time.Duration(weights[i] / sum * float64(total))
	}
}

// Work is that of all derivations.
func (g Graph) Work() time.Duration {
	var sum time.Duration
	for _, d := range g {
		sum += d.Work
	}
	return sum
}

// Path is the work of the longest chain of derivations each of which needs the one before.
func (g Graph) Path() time.Duration {
	if len(g) == 0 {
		return 0
	}
	return slices.Max(g.paths())
}

// paths has, for each derivation, the work of the longest chain that ends with it.
func (g Graph) paths() []time.Duration {
	ends := make([]time.Duration, len(g))
	for i, d := range g {
		for _, input := range d.Inputs {
			ends[i] = max(ends[i], ends[input])
		}
		ends[i] += d.Work
	}
	return ends
}

// A Machine is what builds: Slots builds at a time, each Speed times as fast as
// Work says.
type Machine struct {
	Slots int
	Speed float64
}

// Bound is the time below which no schedule can build all graphs, however little
// copying and deciding cost: that of the longest path on the fastest machine, or of
// all the work on all slots, whichever is longer.
func Bound(machines []Machine, graphs ...Graph) time.Duration {
	var slots, fastest float64
	for _, m := range machines {
		if m.Slots > 0 {
			slots += float64(m.Slots) * m.Speed
			fastest = max(fastest, m.Speed)
		}
	}
	var path, work time.Duration
	for _, g := range graphs {
		path = max(path, g.Path())
		work += g.Work()
	}
	return max(time.Duration(float64(path)/fastest), time.Duration(float64(work)/slots))
}
