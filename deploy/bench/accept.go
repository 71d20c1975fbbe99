package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

const (
	acceptRounds = 5
	acceptAsked  = 40 // times a round
	inFlight     = 100
)

var acceptRow = row{
	name:       "accept",
	work:       "from the start of the hook's process to its reply, the middle one of 40",
	needsFleet: true,
	run: func(ctx context.Context, b *bench) (_ []figure, err error) {
		s, err := b.newSite(ctx, siteConfig{machines: plainMachines(4)})
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		drvPath, err := s.run(ctx, "nix-instantiate", "--expr", trivialBuilds("asked", 1))
		if err != nil {
			return nil, err
		}
		alone := figure{Case: "nothing else to do", Unit: "ms", Goals: []goal{{Side: ours, AtMost: 8}}}
		if err := s.acceptRounds(ctx, &alone, drvPath); err != nil {
			return nil, err
		}
		busy := figure{Case: "100 builds in flight", Unit: "ms", Goals: []goal{{Side: ours, AtMost: 20}}}
		stop, err := s.occupy(ctx)
		if err != nil {
			return nil, err
		}
		defer stop()
		if err := s.acceptRounds(ctx, &busy, drvPath); err != nil {
			return nil, err
		}
		return []figure{alone, busy}, nil
	},
}

func (s *site) acceptRounds(ctx context.Context, f *figure, drvPath string) error {
	by := func(side, hook string) measure {
		return measure{side, func(ctx context.Context, _ int) (float64, error) { return s.askHook(ctx, hook, drvPath) }}
	}
	return s.b.rounds(ctx, f, acceptRounds, by(ours, ourHook), by(limit, bareHook))
}

// askHook is the middle time, in milliseconds, that a hook takes to accept.
func (s *site) askHook(ctx context.Context, hook, drvPath string) (float64, error) {
	out, err := s.run(ctx, benchPrograms+"/bare", "ask", hook, drvPath, strconv.Itoa(acceptAsked))
	if err != nil {
		return 0, err
	}
	var times []float64
	for _, word := range strings.Fields(out) {
		ms, err := strconv.ParseFloat(word, 64)
		if err != nil {
			return 0, err
		}
		times = append(times, ms)
	}
	if len(times) != acceptAsked {
		return 0, fmt.Errorf("bare ask printed %d times", len(times))
	}
	return median(times), nil
}

// occupy has builds in flight until stop, which waits for their end.
func (s *site) occupy(ctx context.Context) (stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	expr := fmt.Sprintf(`builtins.genList (i: derivation {
		name = "long-${toString i}"; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
		args = [ "-c" "sleep 600" ];
	}) %d`, inFlight)
	ended := make(chan error, 1)
	go func() {
		_, _, err := s.nixBuild(ctx, expr, hookOption(ourHook)...)
		ended <- err
	}()
	stop = func() {
		cancel()
		<-ended
	}
	for {
		st, err := s.status(ctx)
		if err == nil && len(st.Builds) == inFlight {
			return stop, nil
		}
		select {
		case err = <-ended:
			cancel()
			return nil, fmt.Errorf("builds that were to last ended: %w", err)
		case <-ctx.Done():
			stop()
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}
