package main

import (
	"context"
	"errors"
	"fmt"

	"nixdispatch/deploy/fleet"
)

const (
	dispatchBuilds = 100
	dispatchRounds = 3
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
		Goals: []goal{{Side: ours, Of: stock, AtMost: 0.1}},
	}
	for _, hook := range []string{ourHook, stockHook} {
		if _, err := s.buildMany(ctx, "warm-"+hook[len(hook)-4:], 8, hook); err != nil {
			return f, err
		}
	}
	return f, b.rounds(ctx, &f, dispatchRounds, s.dispatchBy(ours, ourHook), s.dispatchBy(stock, stockHook))
}

func (s *site) dispatchBy(side, hook string) measure {
	return measure{side, func(ctx context.Context, round int) (float64, error) {
		return s.buildMany(ctx, fmt.Sprintf("%s-%d", side, round), dispatchBuilds, hook)
	}}
}

// buildMany builds n derivations nobody has, all on machines, and returns the
// seconds it took.
func (s *site) buildMany(ctx context.Context, name string, n int, hook string) (float64, error) {
	expr := fmt.Sprintf(`builtins.genList (i: derivation {
		name = "%s-${toString i}"; system = "x86_64-linux"; builder = "/bin/sh";
		args = [ "-c" "echo ${toString i} > $out" ];
	}) %d`, name, n)
	took, paths, err := s.nixBuild(ctx, expr, hookOption(hook)...)
	if err == nil && len(paths) != n {
		err = fmt.Errorf("nix-build printed %d paths instead of %d", len(paths), n)
	}
	return took.Seconds(), err
}
