package main

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/daemon"
)

func TestGateFlags(t *testing.T) {
	for args, want := range map[string]daemon.Gates{
		"":                             {MinFree: 1 << 30},
		"--min-free 0":                 {},
		"--min-free 512M":              {MinFree: 512 << 20},
		"--min-free 7 --max-load 1.5":  {MinFree: 7, MaxLoad: 1.5},
		"--min-free 0 --min-memory 2G": {MinMemory: 2 << 30},
		"--min-free 0 --max-pressure cpu=80,io=2.5": {MaxPressure: map[string]float64{"cpu": 0.8, "io": 0.025}},
	} {
		opts, _, err := parse(append(strings.Fields(args), "--builders", "ssh://m"), io.Discard)
		if diff := cmp.Diff(want, opts.Gates); err != nil || diff != "" {
			t.Errorf("%q: %v (-want +got):\n%s", args, err, diff)
		}
		if opts.LoadInterval != 30*time.Second {
			t.Errorf("%q: asked every %v", args, opts.LoadInterval)
		}
	}
	for _, args := range []string{
		"--min-free 1GB", "--min-free -1", "--min-free 99999999999T", "--min-memory x", "--max-load -1", "--max-load NaN",
		"--max-pressure disk=3", "--max-pressure cpu=101", "--max-pressure cpu", "--load-interval 1ms", "--load-interval -1s",
	} {
		if _, _, err := parse(append(strings.Fields(args), "--builders", "ssh://m"), io.Discard); err == nil {
			t.Errorf("%q is taken", args)
		}
	}
}
