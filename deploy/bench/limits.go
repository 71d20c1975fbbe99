package main

import (
	"context"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// The limit of dispatching has two parts, which no program can do without: what
// the asking Nix does for builds whose hook answers at once and whose outputs
// are imported from memory (nixAlone), and what the machines do for builds that
// come over connections and to remote processes that are there (machinesAlone).
const (
	nixAlone      = "Nix alone"
	machinesAlone = "machines alone"
)

// startImporter starts what barehook needs. It ends with the site.
func (s *site) startImporter(ctx context.Context) error {
	var out syncBuffer
	cmd := s.client.Command(context.WithoutCancel(ctx), "root", benchPrograms+"/bare", "importer")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return err
	}
	go cmd.Wait() //nolint:errcheck // killed with its host
	for !strings.Contains(out.String(), "ready") {
		select {
		case <-ctx.Done():
			return fmt.Errorf("bare importer: %w: %s", ctx.Err(), out.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// bareMachines builds n derivations nobody has on the machines, by "bare
// machines", and returns the seconds it took.
func (s *site) bareMachines(ctx context.Context, name string, n int) (float64, error) {
	out, err := s.client.Run(ctx, "nix-instantiate", "--expr", trivialBuilds(name, n))
	if err != nil {
		return 0, err
	}
	cmd := s.client.Command(ctx, "root", append([]string{benchPrograms + "/bare", "machines"}, s.names...)...)
	cmd.Stdin = strings.NewReader(out.Stdout)
	seconds, err := cmd.Output()
	if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // unwrapped
		return 0, fmt.Errorf("bare machines: %w: %s", err, exit.Stderr)
	}
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(strings.TrimSpace(string(seconds)), 64)
}

// sum adds a side that is the sum of others, round by round.
func (f *figure) sum(name string, parts ...string) {
	for n := range f.side(parts[0]).Values {
		total := 0.0
		for _, p := range parts {
			total += f.side(p).Values[n]
		}
		f.add(name, total)
	}
}
