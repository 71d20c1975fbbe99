package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

const (
	prefetchBuilds = 8
	prefetchSize   = 64 << 20
	prefetchLine   = 200_000_000 / 8 // bytes a second
	prefetchSlots  = 2
	prefetchSleep  = 2 // seconds that each build takes
	prefetchRounds = 2
)

var prefetchRow = row{
	name: "prefetch",
	work: fmt.Sprintf("%d builds of 2 s, each with 64 MiB of inputs of its own, over a line of 200 Mbit/s to a machine with 2 slots",
		prefetchBuilds),
	needsFleet: true,
	run: func(ctx context.Context, b *bench) (_ []figure, err error) {
		machines := plainMachines(1)
		machines[0].columns = fmt.Sprintf("x86_64-linux - %d", prefetchSlots)
		s, err := b.newSite(ctx, siteConfig{machines: machines})
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		var inputs []string
		for n := range prefetchBuilds {
			p, err := s.addRandom(ctx, s.client, fmt.Sprintf("input-%d", n), prefetchSize)
			if err != nil {
				return nil, err
			}
			inputs = append(inputs, p)
		}
		if _, err := s.buildMany(ctx, "warm", 2, ourHook); err != nil {
			return nil, err
		}
		if err := s.machines[0].Limit(ctx, prefetchLine); err != nil {
			return nil, err
		}
		f := figure{
			Unit: "s", Goals: []goal{{Side: ours, Of: limit, AtMost: 1.15}, {Side: ours, Of: stock, AtMost: 1}},
			Note: fmt.Sprintf("The limit is that of the line, ssh alone with all inputs (%.1f s by its rate), for the builds take %d s",
				float64(prefetchBuilds*prefetchSize)/prefetchLine, prefetchBuilds*prefetchSleep/prefetchSlots),
		}
		line := fmt.Sprintf("for p in %s; do nix-store --dump $p; done | ssh -o Compression=no root@%s 'cat >/dev/null'",
			strings.Join(inputs, " "), s.names[0])
		err = b.rounds(ctx, &f, prefetchRounds, s.prefetchBy(ours, ourHook, inputs), s.prefetchBy(stock, stockHook, inputs),
			measure{limit, s.pipe(line)})
		return []figure{f}, err
	},
}

func (s *site) prefetchBy(side, hook string, inputs []string) measure {
	return measure{side, func(ctx context.Context, round int) (float64, error) {
		if err := s.forget(ctx, s.machines[0], inputs); err != nil {
			return 0, err
		}
		var list strings.Builder
		for n, p := range inputs {
			name := fmt.Sprintf("prefetch-%s-%d-%d", side, round, n)
			fmt.Fprintf(&list, " (%s)", needing(name, "", fmt.Sprintf("sleep %d", prefetchSleep), p))
		}
		took, _, err := s.nixBuild(ctx, "["+list.String()+" ]", hookOption(hook)...)
		return took.Seconds(), err
	}}
}
