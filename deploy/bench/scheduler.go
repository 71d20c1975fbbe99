package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
)

var schedulerRow = row{
	name: "scheduler",
	work: "CPU for one event of the scheduler, collector included, with 100,000 builds queued: the lives of builds " +
		"(life), builds failed by their machine (fail), builds cancelled (cancel), machines that go down and come back (flap), " +
		"with callers of a few requirements (plain), 1,024 requirements (features), 33 lists of the same hosts (lists), 2,000 builds " +
		"that have failed before (exclusions)",
	run: func(ctx context.Context, b *bench) ([]figure, error) {
		// Many events each, so that what the filling of the queue leaves to the collector
		// weighs little.
		cmd := exec.CommandContext(ctx, "go", "test", "-run", "^$", "-timeout", "20m", "-benchtime", "5000x",
			"-bench", "^BenchmarkEvents$/^(life|fail|cancel|flap)$/^(plain|features|lists|exclusions)$/^machines=(10|100|1000)$/^queued=100000$",
			"nixdispatch/scheduler")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("go test -bench: %w\n%s%s", err, tail(string(out), 2000), tail(stderr.String(), 2000))
		}
		return schedulerFigures(out)
	},
}

// eventLine is a line of BenchmarkEvents.
var eventLine = regexp.MustCompile(`^BenchmarkEvents/(\w+)/(\w+)/machines=(\d+)/queued=\d+\S*\s.*?([\d.]+) cpu-ns/event`)

// schedulerFigures makes a figure of each kind of event and shape, with a side for
// each number of machines.
func schedulerFigures(out []byte) ([]figure, error) {
	var figures []figure
	lines := bufio.NewScanner(bytes.NewReader(out))
	byCase := make(map[string]int)
	for lines.Scan() {
		m := eventLine.FindStringSubmatch(lines.Text())
		if m == nil {
			continue
		}
		ns, err := strconv.ParseFloat(m[4], 64)
		if err != nil {
			return nil, err
		}
		name := m[1] + ", " + m[2]
		i, known := byCase[name]
		if !known {
			i = len(figures)
			byCase[name] = i
			figures = append(figures, figure{Case: name, Unit: "us", Goals: []goal{{Side: "1000 machines", AtMost: 20}}})
		}
		figures[i].add(m[3]+" machines", ns/1000)
	}
	if len(figures) == 0 {
		return nil, fmt.Errorf("no figures in what go test printed:\n%s", tail(string(out), 2000))
	}
	return figures, lines.Err()
}
