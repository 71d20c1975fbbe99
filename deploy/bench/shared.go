package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

const (
	sharers     = 16
	sharedSize  = 512 << 20
	narOverhead = 1.001 // a NAR is a little longer than its file
)

var sharedRow = row{
	name:       "shared",
	work:       "16 builds that take no time and need the same path of 512 MiB, 2 machines; meanwhile a build that needs nothing",
	needsFleet: true,
	run: func(ctx context.Context, b *bench) (_ []figure, err error) {
		s, err := b.newSite(ctx, siteConfig{machines: plainMachines(2)})
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
		other := figure{Case: "the other build", Unit: "s", Goals: []goal{{Side: "meanwhile", Of: "alone", AtMost: 4}}}
		if _, err := s.buildMany(ctx, "warm", 8, ourHook); err != nil {
			return nil, err
		}
		alone, err := s.buildMany(ctx, "alone", 1, ourHook)
		if err != nil {
			return nil, err
		}
		other.add("alone", alone)
		before, err := s.bytesSent(ctx)
		if err != nil {
			return nil, err
		}
		took, meanwhile, err := s.shareBy(ctx, ourHook, big)
		if err != nil {
			return nil, err
		}
		all.add(ours, took)
		other.add("meanwhile", meanwhile)
		after, err := s.bytesSent(ctx)
		if err != nil {
			return nil, err
		}
		sent.add(ours, (after-before)/sharedSize)
		if took, meanwhile, err = s.shareBy(ctx, stockHook, big); err != nil {
			return nil, err
		}
		all.add(stock, took)
		other.add("meanwhile, stock", meanwhile)
		return []figure{all, sent, other}, nil
	},
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
	time.Sleep(time.Second) // the input is on its way then
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
