package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"nixdispatch/deploy/fleet"
)

// manyNames is the number of machines in the rows memory and idle: as many
// connections, to as many names of manyHosts real hosts.
const (
	manyNames = 100
	manyHosts = 4
	// settling is what the daemon is given after its start, to have asked all
	// machines all it wants to know and to have collected its garbage.
	settling = 90 * time.Second
	// idleWatch is how long it is watched then: the longest of its periods several times.
	idleWatch = 2 * time.Minute
)

var idleRow = row{
	name: "idle",
	work: fmt.Sprintf("%d machines connected (%d names of %d hosts, a connection each), nothing to build: "+
		"CPU of the daemon in 2 minutes, in percent of a core", manyNames, manyNames/manyHosts, manyHosts),
	needsFleet: true,
	run: func(ctx context.Context, b *bench) (_ []figure, err error) {
		s, err := b.newSite(ctx, manyMachines())
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		if err := pause(ctx, settling); err != nil {
			return nil, err
		}
		before, err := s.cpu()
		if err != nil {
			return nil, err
		}
		started := time.Now()
		if err := pause(ctx, idleWatch); err != nil {
			return nil, err
		}
		after, err := s.cpu()
		if err != nil {
			return nil, err
		}
		f := figure{Unit: "%", Goals: []goal{{Side: ours, AtMost: 0.5}}}
		f.add(ours, 100*(after-before).Seconds()/time.Since(started).Seconds())
		return []figure{f}, nil
	},
}

// manyMachines is a site whose machines stand in the list under many names.
func manyMachines() siteConfig {
	cfg := siteConfig{client: fleet.HostConfig{Suite: fleet.Trixie}, machines: plainMachines(manyHosts)}
	for n := range cfg.machines {
		cfg.machines[n].names = manyNames / manyHosts
	}
	return cfg
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// daemonDir is the running daemon's directory in this computer's /proc.
func (s *site) daemonDir() (string, error) {
	space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", s.client.PID()))
	if err != nil {
		return "", err
	}
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return "", err
	}
	for _, name := range names {
		dir := filepath.Dir(name)
		comm, _ := os.ReadFile(name) // it may have ended
		own, _ := os.Readlink(filepath.Join(dir, "ns/pid"))
		if string(bytes.TrimSpace(comm)) == "nix-dispatchd" && own == space {
			return dir, nil
		}
	}
	return "", errors.New("nix-dispatchd does not run on the client")
}

// cpu is what the daemon has used so far, all its threads together, to the nanosecond.
func (s *site) cpu() (time.Duration, error) {
	dir, err := s.daemonDir()
	if err != nil {
		return 0, err
	}
	threads, err := filepath.Glob(filepath.Join(dir, "task/[0-9]*/schedstat"))
	if err != nil || len(threads) == 0 {
		return 0, errors.Join(err, errors.New("no threads of nix-dispatchd found"))
	}
	var sum time.Duration
	for _, name := range threads {
		ns, err := strconv.ParseInt(firstWord(name), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}

// peakMemory is the most memory that the daemon has had resident, in MiB.
func (s *site) peakMemory() (float64, error) {
	dir, err := s.daemonDir()
	if err != nil {
		return 0, err
	}
	text, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 64)
			return kib / 1024, err
		}
	}
	return 0, errors.New("no VmHWM in /proc")
}
