package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	blackHoleRounds = 3
	// stockInBlackHole is how many builds the stock hook is given: it takes
	// as long for each as TCP takes to give up.
	stockInBlackHole = 1
)

var blackHoleRow = row{
	name:       "black hole",
	work:       "dispatch, while packets to one of the four machines vanish",
	needsFleet: true,
	run: func(ctx context.Context, b *bench) (_ []figure, err error) {
		s, err := b.newSite(ctx, siteConfig{machines: plainMachines(4)})
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		if _, err := s.buildMany(ctx, "warm", 8, ourHook); err != nil {
			return nil, err
		}
		cut := func(name string, n int, hook string) func(ctx context.Context, round int) (float64, error) {
			return func(ctx context.Context, round int) (float64, error) {
				return s.withoutFirst(ctx, func() (float64, error) {
					return s.buildMany(ctx, fmt.Sprintf("%s-%d", name, round), n, hook)
				})
			}
		}
		whole := figure{Case: "100 builds", Unit: "s"}
		err = b.rounds(ctx, &whole, blackHoleRounds,
			measure{"three of four", cut("hole", dispatchBuilds, ourHook)},
			s.dispatchBy("all four", ourHook))
		if err != nil {
			return nil, err
		}
		more := figure{Case: "longer than with all four", Unit: "s", Goals: []goal{{Side: ours, AtMost: 1}}}
		for n, v := range whole.side("three of four").Values {
			more.add(ours, v-whole.side("all four").Values[n])
		}
		each := figure{Case: "one build", Unit: "s"}
		err = b.rounds(ctx, &each, 1,
			measure{ours, cut("one-ours", stockInBlackHole, ourHook)},
			measure{stock, cut("one-stock", stockInBlackHole, stockHook)})
		return []figure{whole, more, each}, err
	},
}

// withoutFirst does something while the first machine is out of reach, and
// nix-dispatchd has noticed.
func (s *site) withoutFirst(ctx context.Context, fn func() (float64, error)) (float64, error) {
	first := s.machines[0]
	if err := first.CutOff(ctx); err != nil {
		return 0, err
	}
	err := s.awaitState(ctx, len(s.machines)-1)
	var value float64
	if err == nil {
		value, err = fn()
	}
	return value, errors.Join(err, first.Restore(ctx), s.awaitState(ctx, len(s.machines)))
}

// awaitState waits until so many machines are up.
func (s *site) awaitState(ctx context.Context, up int) error {
	for {
		st, err := s.status(ctx)
		if err == nil && st.up() == up {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("%d machines are up, not %d: %w", st.up(), up, ctx.Err()), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
