package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"nixdispatch/deploy/fleet"
)

const (
	sharers     = 16
	sharedSize  = 512 << 20
	narOverhead = 1.001 // a NAR is a little longer than its file
	// inputUnderWay is how long after the builds were asked for it is.
	inputUnderWay = time.Second
)

var sharedRow = row{
	name:       "shared",
	work:       "16 builds that take no time and need the same path of 512 MiB, 2 machines; meanwhile two that need nothing, of the same user and of another one",
	needsFleet: true,
	run: func(ctx context.Context, b *bench) (_ []figure, err error) {
		s, err := b.newSite(ctx, siteConfig{
			machines: plainMachines(2),
			client:   fleet.HostConfig{NixConf: "build-hook = " + ourHook + "\n"},
		})
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, s.close()) }()
		big, err := s.addRandom(ctx, s.client, "shared", sharedSize)
		if err != nil {
			return nil, err
		}
		all := figure{Case: "all builds", Unit: "s", Goals: []goal{{Side: ours, Of: stock, AtMost: 1}}}
		sent := figure{Case: "bytes sent", Unit: "x the input", Goals: []goal{{Side: ours, AtMost: 2 * narOverhead}}}
		goals := []goal{{Side: "meanwhile", Of: "alone", AtMost: 4}}
		own := figure{Case: "the other build, of the same user", Unit: "s", Goals: goals}
		others := figure{Case: "the other build, of another user", Unit: "s", Goals: goals}
		if _, err := s.buildMany(ctx, "warm", 8, ourHook); err != nil {
			return nil, err
		}
		alone, err := s.buildMany(ctx, "alone", 1, ourHook)
		if err != nil {
			return nil, err
		}
		own.add("alone", alone)
		if alone, err = s.buildAsAlice(ctx, "alone"); err != nil {
			return nil, err
		}
		others.add("alone", alone)
		before, err := s.bytesSent(ctx)
		if err != nil {
			return nil, err
		}
		alices := make(chan error, 1)
		go func() {
			time.Sleep(inputUnderWay)
			took, err := s.buildAsAlice(ctx, "meanwhile")
			others.add("meanwhile", took)
			alices <- err
		}()
		took, meanwhile, err := s.shareBy(ctx, ourHook, big)
		if err = errors.Join(err, <-alices); err != nil {
			return nil, err
		}
		all.add(ours, took)
		own.add("meanwhile", meanwhile)
		after, err := s.bytesSent(ctx)
		if err != nil {
			return nil, err
		}
		sent.add(ours, (after-before)/sharedSize)
		if took, meanwhile, err = s.shareBy(ctx, stockHook, big); err != nil {
			return nil, err
		}
		all.add(stock, took)
		own.add("meanwhile, stock", meanwhile)
		return []figure{all, sent, own, others}, nil
	},
}

// buildAsAlice builds something through nix-daemon, and so our hook.
func (s *site) buildAsAlice(ctx context.Context, name string) (float64, error) {
	took, _, err := s.nixBuildAs(ctx, "alice", trivialBuilds("alices-"+name, 1))
	return took.Seconds(), err
}

// shareBy has builds that share an input built by a hook, on machines that lack
// it, and another one beside them.
func (s *site) shareBy(ctx context.Context, hook, input string) (all, other float64, err error) {
	for _, m := range s.machines {
		if err := s.forget(ctx, m, []string{input}); err != nil {
			return 0, 0, err
		}
	}
	var list strings.Builder
	kind := hook[strings.LastIndex(hook, "/")+1:]
	for n := range sharers {
		fmt.Fprintf(&list, " (%s)", needing(fmt.Sprintf("share-%s-%d", kind, n), "", ":", input))
	}
	type result struct {
		took time.Duration
		err  error
	}
	done := make(chan result, 1)
	go func() {
		took, _, err := s.nixBuild(ctx, "["+list.String()+" ]", hookOption(hook)...)
		done <- result{took, err}
	}()
	time.Sleep(inputUnderWay)
	other, err = s.buildMany(ctx, "beside-"+kind, 1, hook)
	r := <-done
	return r.took.Seconds(), other, errors.Join(err, r.err)
}

// bytesSent is how many bytes of NARs nix-dispatchd has sent to machines, by its
// history of builds, which is a second behind.
func (s *site) bytesSent(ctx context.Context) (total float64, err error) {
	time.Sleep(3 * time.Second)
	out, err := s.run(ctx, programs+"/nix-dispatch", "history", "--json")
	if err != nil {
		return 0, err
	}
	for rows := json.NewDecoder(strings.NewReader(out)); ; {
		var row struct{ BytesSent float64 }
		switch err := rows.Decode(&row); {
		case errors.Is(err, io.EOF):
			return total, nil
		case err != nil:
			return 0, err
		}
		total += row.BytesSent
	}
}
