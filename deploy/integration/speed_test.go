package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// stockHook is where Debian has the hook that Nix brings along.
const stockHook = "/usr/libexec/nix/build-remote"

// TestFasterThanStockHook times 100 trivial builds through the hook and through
// Nix's own, with the same machines file, in the same run.
func TestFasterThanStockHook(t *testing.T) {
	for _, client := range []string{fleet.Trixie, fleet.Sid} {
		t.Run("client="+client, func(t *testing.T) {
			const builds = 100
			var cfg siteConfig
			cfg.client = client
			for n := range 4 {
				cfg.machines = append(cfg.machines, machineConfig{name: fmt.Sprintf("mac%d", n)})
			}
			s := newSite(t, cfg)
			ours := []string{"--option", "build-hook", hookSetting(client)}
			stock := []string{"--option", "build-hook", stockHook}
			s.timeBuilds("warm", 8, ours)
			s.timeBuilds("warm-stock", 2, stock)
			// Ours before and after, so that noise that grows or fades hits both.
			before := s.timeBuilds("before", builds, ours)
			theirs := s.timeBuilds("stock", builds, stock)
			after := s.timeBuilds("after", builds, ours)
			mean := (before + after) / 2
			t.Logf("%d builds with Nix %s: %s and %s through nix-dispatch, %s through the stock hook: 1/%.1f",
				builds, s.client.NixVersion(), before.Round(time.Millisecond), after.Round(time.Millisecond),
				theirs.Round(time.Millisecond), float64(theirs)/float64(mean))
			// A busy host narrows the gap, for most of both times is the starting of
			// processes: 1/2.6 with other work on both cores, up to 1/4.6. The bound
			// leaves room for more of that; the ratio is what the line above says.
			if mean*3 >= theirs*2 {
				t.Errorf("%s through nix-dispatch is not less than two thirds of %s", mean, theirs)
			}
		})
	}
}

// timeBuilds builds n derivations nobody has as root with further arguments for
// nix-build, all of them on machines.
func (s *site) timeBuilds(name string, n int, args []string) time.Duration {
	s.t.Helper()
	s.countBuilds()
	expr := all(many(n, derivation{name: name}))
	start := time.Now()
	out, err := s.nixBuild("root", expr, args...)
	took := time.Since(start)
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", name, err, out.Stderr)
	}
	if got := len(strings.Fields(out.Stdout)); got != n {
		s.t.Errorf("%s: nix-build printed %d paths, want %d", name, got, n)
	}
	share := perHost(s.where())
	s.t.Logf("%s: %s, derivations built: %v", name, took.Round(time.Millisecond), share)
	if share["client"] != 0 {
		s.t.Errorf("%s: %d derivations were built on the client", name, share["client"])
	}
	return took
}
