package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"nixdispatch/deploy/fleet"
)

const (
	dispatchBuilds = 100
	dispatchRounds = 5
	// stockSample is how many builds the stock hook is given in their place: it
	// takes one after the other, and each takes as long as the one before.
	stockSample = 20
)

var dispatchRow = row{
	name:       "dispatch",
	work:       "100 independent builds that take no time, 4 machines with 4 slots each, by nix-build through the hook",
	needsFleet: true,
	run: func(ctx context.Context, b *bench) ([]figure, error) {
		var figures []figure
		for _, suite := range []string{fleet.Trixie, fleet.Sid} {
			f, err := b.dispatch(ctx, suite)
			if err != nil {
				return nil, err
			}
			figures = append(figures, f)
		}
		return figures, nil
	},
}

func (b *bench) dispatch(ctx context.Context, suite string) (_ figure, err error) {
	s, err := b.newSite(ctx, siteConfig{client: fleet.HostConfig{Suite: suite}, machines: plainMachines(4)})
	if err != nil {
		return figure{}, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	f := figure{
		Case: "Nix " + s.client.NixVersion(), Unit: "s",
		Goals: []goal{{Side: ours, Of: stock, AtMost: 0.1}, {Side: ours, Of: limit, AtMost: 1.3}},
	}
	return f, s.dispatchRounds(ctx, &f, dispatchRounds)
}

// distanceRounds are few: the stock hook takes its time.
const distanceRounds = 3

// roundTrip is that of rows about distance.
const roundTrip = 50 * time.Millisecond

func farAway() *fleet.ProxyConfig { return &fleet.ProxyConfig{Delay: roundTrip / 2} }

var distanceRow = row{
	name:       "distance",
	work:       "dispatch, with a round trip of 50 ms to the machines",
	needsFleet: true,
	run: func(ctx context.Context, b *bench) (_ []figure, err error) {
		machines := plainMachines(4)
		for n := range machines {
			machines[n].far = farAway()
		}
		s, err := b.newSite(ctx, siteConfig{machines: machines})
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		f := figure{
			Case: "Nix " + s.client.NixVersion(), Unit: "s",
			Goals: []goal{{Side: ours, Of: stock, AtMost: 0.04}},
		}
		err = s.dispatchRounds(ctx, &f, distanceRounds)
		return []figure{f}, err
	},
}

// dispatchRounds measures all sides of dispatching.
func (s *site) dispatchRounds(ctx context.Context, f *figure, rounds int) error {
	if err := s.startImporter(ctx); err != nil {
		return err
	}
	for n, hook := range []string{ourHook, stockHook, bareHook} {
		if _, err := s.buildMany(ctx, fmt.Sprintf("warm-%d", n), 8, hook); err != nil {
			return err
		}
	}
	f.Note = fmt.Sprintf("The stock hook's time is that of %d builds, times %d", stockSample, dispatchBuilds/stockSample)
	err := s.b.rounds(ctx, f, rounds,
		s.dispatchBy(ours, ourHook), s.dispatchBy(stock, stockHook), s.dispatchBy(nixAlone, bareHook),
		measure{machinesAlone, func(ctx context.Context, round int) (float64, error) {
			return s.bareMachines(ctx, fmt.Sprintf("machines-%d", round), dispatchBuilds)
		}})
	if err == nil {
		f.sum(limit, nixAlone, machinesAlone)
	}
	return err
}

// dispatchBy measures all builds, or what a sample of them says of all.
func (s *site) dispatchBy(side, hook string) measure {
	builds := dispatchBuilds
	if hook == stockHook {
		builds = stockSample
	}
	return measure{side, func(ctx context.Context, round int) (float64, error) {
		seconds, err := s.buildMany(ctx, fmt.Sprintf("%s-%d", strings.ReplaceAll(side, " ", "-"), round), builds, hook)
		return seconds * dispatchBuilds / float64(builds), err
	}}
}

// trivialBuilds is an expression for n independent builds that take no time.
func trivialBuilds(name string, n int) string {
	return fmt.Sprintf(`builtins.genList (i: derivation {
		name = "%s-${toString i}"; system = "x86_64-linux"; builder = "/bin/sh";
		args = [ "-c" "echo ${toString i} > $out" ];
	}) %d`, name, n)
}

// buildMany builds n derivations nobody has, all on machines, and returns the
// seconds it took.
func (s *site) buildMany(ctx context.Context, name string, n int, hook string) (float64, error) {
	took, paths, err := s.nixBuild(ctx, trivialBuilds(name, n), hookOption(hook)...)
	if err == nil && len(paths) != n {
		err = fmt.Errorf("nix-build printed %d paths instead of %d", len(paths), n)
	}
	return took.Seconds(), err
}
