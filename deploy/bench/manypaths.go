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
	smallPaths  = 2000
	smallRounds = 3
	// countedTrip is a round trip so long that it can be counted by the clock.
	countedTrip = 500 * time.Millisecond
)

var manyPathsRow = row{
	name:       "many paths",
	work:       "a build that takes no time and needs 2,000 small paths that the machine lacks, against nix copy of them",
	needsFleet: true,
	run: func(ctx context.Context, b *bench) (_ []figure, err error) {
		machines := plainMachines(2)
		machines[1].far = &fleet.ProxyConfig{Delay: countedTrip / 2}
		for n, feature := range []string{"near", "far"} {
			machines[n].SystemFeatures = []string{feature}
			machines[n].columns = "x86_64-linux - 4 1 - " + feature
		}
		s, err := b.newSite(ctx, siteConfig{machines: machines})
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		paths, err := s.addSmall(ctx)
		if err != nil {
			return nil, err
		}
		near := figure{Case: "no delay", Unit: "s", Goals: []goal{{Side: ours, Of: "nix copy", AtMost: 1}}}
		err = b.rounds(ctx, &near, smallRounds, s.smallBy(ours, "near", paths), measure{"nix copy", s.nixCopy(0, paths)})
		if err != nil {
			return nil, err
		}
		trips, err := s.countTrips(ctx, paths)
		return []figure{near, trips}, err
	},
}

// addSmall puts small files of their own into the client's store.
func (s *site) addSmall(ctx context.Context) ([]string, error) {
	out, err := s.run(ctx, "sh", "-c", fmt.Sprintf(
		`mkdir /srv/small && cd /srv/small && for i in $(seq %d); do echo "$i, and some more text, so that it is not too small" >small-$i; done && nix-store --add *`, smallPaths))
	paths := strings.Fields(out)
	if err == nil && len(paths) != smallPaths {
		err = fmt.Errorf("nix-store --add printed %d paths", len(paths))
	}
	return paths, err
}

// smallBy measures a build on the machine with a feature, which lacks paths.
func (s *site) smallBy(side, feature string, paths []string) measure {
	machine := s.machines[0]
	if feature == "far" {
		machine = s.machines[1]
	}
	return measure{side, func(ctx context.Context, round int) (float64, error) {
		if err := s.forget(ctx, machine, paths); err != nil {
			return 0, err
		}
		name := fmt.Sprintf("small-%s-%d-%d-%d", feature, len(paths), round, time.Now().UnixNano())
		took, _, err := s.nixBuild(ctx, needing(name, feature, ":", paths...), hookOption(ourHook)...)
		return took.Seconds(), err
	}}
}

// nixCopy measures Nix's own copy of paths to a machine.
func (s *site) nixCopy(machine int, paths []string) func(context.Context, int) (float64, error) {
	return func(ctx context.Context, _ int) (float64, error) {
		if err := s.forget(ctx, s.machines[machine], paths); err != nil {
			return 0, err
		}
		cmd := s.client.Command(ctx, "root", "nix", "copy", "--stdin", "--no-check-sigs", "--to", "ssh://root@"+s.names[machine])
		cmd.Stdin = strings.NewReader(strings.Join(paths, "\n") + "\n")
		started := time.Now()
		out, err := cmd.CombinedOutput()
		took := time.Since(started)
		if err != nil {
			err = fmt.Errorf("nix copy: %w: %s", err, tail(string(out), 1000))
		}
		return took.Seconds(), err
	}
}

// countTrips counts the round trips that bringing paths to a machine takes, by
// what a delay adds to a build with and to one without them.
func (s *site) countTrips(ctx context.Context, paths []string) (figure, error) {
	raw := figure{Case: "raw", Unit: "s"}
	err := s.b.rounds(ctx, &raw, smallRounds,
		s.smallBy("far, none", "far", nil), s.smallBy("near, none", "near", nil),
		s.smallBy("far, all", "far", paths), s.smallBy("near, all", "near", paths))
	trips := figure{
		Case: "round trips", Goals: []goal{{Side: ours, AtMost: 6}},
		Note: fmt.Sprintf("What a round trip of %v adds to a build with the paths, less what it adds to one without", countedTrip),
	}
	if err != nil {
		return trips, err
	}
	for n := range smallRounds {
		added := func(what string) float64 {
			return raw.side("far, " + what).Values[n] - raw.side("near, " + what).Values[n]
		}
		trips.add(ours, (added("all")-added("none"))/countedTrip.Seconds())
	}
	return trips, nil
}
