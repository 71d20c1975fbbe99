package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"nixdispatch/deploy/fleet"
)

const (
	bigStreams   = 16
	bigBytes     = 1 << 30
	queuedBuilds = 10_000
)

var memoryRow = row{
	name:       "memory",
	work:       "the daemon's peak resident memory",
	needsFleet: true,
	run: func(ctx context.Context, b *bench) ([]figure, error) {
		var figures []figure
		for _, c := range []struct {
			name  string
			most  float64 // MiB
			sites siteConfig
			do    func(ctx context.Context, s *site) error
		}{
			{fmt.Sprintf("%d machines idle", manyNames), 64, manyMachines(),
				func(ctx context.Context, _ *site) error { return pause(ctx, settling) }},
			{fmt.Sprintf("%d outputs of 1 GiB at once", bigStreams), 150,
				siteConfig{client: fleet.HostConfig{Suite: fleet.Trixie}, machines: plainMachines(4)}, streamMany},
			{fmt.Sprintf("%d builds queued", queuedBuilds), 250,
				siteConfig{client: fleet.HostConfig{Suite: fleet.Trixie}, machines: plainMachines(1)}, queueMany},
		} {
			f := figure{Case: c.name, Unit: "MiB", Goals: []goal{{Side: ours, AtMost: c.most}}}
			value, err := b.memory(ctx, c.sites, c.do)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.name, err)
			}
			f.add(ours, value)
			b.say("   %s: %s", c.name, quantity(value, f.Unit))
			figures = append(figures, f)
		}
		return figures, nil
	},
}

// memory is the daemon's peak over its start and what is done.
func (b *bench) memory(ctx context.Context, cfg siteConfig, do func(context.Context, *site) error) (_ float64, err error) {
	s, err := b.newSite(ctx, cfg)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := do(ctx, s); err != nil {
		return 0, err
	}
	return s.peakMemory()
}

// streamMany has as many large outputs come in at once as there are slots. On the
// machines they are holes, here they are written.
func streamMany(ctx context.Context, s *site) error {
	_, err := s.timed(ctx, "nix-build", "--no-out-link", "--quiet", "--option", "build-hook", ourHook, "--expr", fmt.Sprintf(
		`builtins.genList (i: derivation {
			name = "big-${toString i}"; system = "x86_64-linux"; builder = "/bin/sh";
			args = [ "-c" "PATH=/bin; truncate -s %d $out" ];
		}) %d`, bigBytes, bigStreams))
	return err
}

// queueMany has one call ask for many builds, of which few can run, until all
// wait that can.
func queueMany(ctx context.Context, s *site) error {
	drvs, err := s.instantiate(ctx, fmt.Sprintf(
		`[ (derivation { name = "all"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo > $out" ];
			inputs = builtins.genList (i: derivation {
				name = "wait-${toString i}"; system = "x86_64-linux"; builder = "/bin/sh";
				args = [ "-c" "PATH=/bin; sleep 1000; echo ${toString i} > $out" ];
			}) %d; }) ]`, queuedBuilds))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	cmd := s.client.Command(ctx, "root", append([]string{programs + "/nix-dispatch", "build"}, drvs...)...)
	var out syncBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		st, err := s.status(ctx)
		if err == nil && len(st.Builds) >= queuedBuilds {
			return nil // the client ends with its host
		}
		select {
		case err := <-ended:
			return fmt.Errorf("nix-dispatch build ended: %w\n%s", err, tail(out.String(), 2000))
		case <-ctx.Done():
			return fmt.Errorf("%d of %d builds are in progress: %w", len(st.Builds), queuedBuilds, errors.Join(ctx.Err(), err))
		case <-time.After(time.Second):
		}
	}
}
