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

// TestFasterThanStockHook times trivial builds through the hook and through Nix's
// own, with the same machines file, in the same run. In "make nightly", with the
// computer to itself, it wants what the README promises; beside other tests only that
// ours are no slower. make bench measures more.
func TestFasterThanStockHook(t *testing.T) {
	if !nightly {
		t.Parallel()
	}
	for _, client := range shortOr([]string{fleet.Trixie}, []string{fleet.Trixie, fleet.Sid}) {
		t.Run("client="+client, func(t *testing.T) {
			var cfg siteConfig
			cfg.client = client
			for n := range 4 {
				cfg.machines = append(cfg.machines, machineConfig{
					name: fmt.Sprintf("mac%d", n),
					// Build users cost a machine two more processes for each build, as much
					// as the rest of a build that does nothing, whichever hook it came from.
					host: fleet.HostConfig{NixConf: "build-users-group =\n"},
				})
			}
			s := newSite(t, cfg)
			ours := []string{"--option", "build-hook", programs + "/nix-dispatch-hook"}
			stock := []string{"--option", "build-hook", stockHook}
			s.timeBuilds("warm", 8, ours)
			s.timeBuilds("warm-stock", 2, stock)
			// Most of both times is the starting of processes on two cores, so whatever
			// else runs on them narrows the gap: a run that fell short is repeated.
			const attempts = 3
			want := shortOr(1.0, 4.0)
			for n := 1; ; n++ {
				ratio := s.compareHooks(fmt.Sprint(n), ours, stock)
				if ratio > want {
					break
				}
				if n == attempts {
					t.Errorf("1/%.1f of the stock hook's time in the last of %d attempts, want less than 1/%.0f", ratio, n, want)
					break
				}
			}
		})
	}
}

// The stock hook takes each build after the other, so that few of them show how
// long one takes; it even gains by it, for it need not wait for slots.
var ourBuilds, stockBuilds = shortOr(24, 100), shortOr(6, 20)

// compareHooks returns how many times as long a build takes with the stock
// arguments as with ours.
func (s *site) compareHooks(name string, ours, stock []string) float64 {
	// Ours before and after, so that noise that grows or fades hits both.
	before := s.timeBuilds("before"+name, ourBuilds, ours)
	theirs := s.timeBuilds("stock"+name, stockBuilds, stock)
	after := s.timeBuilds("after"+name, ourBuilds, ours)
	for line := range strings.Lines(s.daemon.log.String()) {
		if strings.Contains(line, "level=WARN") { // what may have taken the time
			s.t.Log(line)
		}
	}
	ratio := float64(theirs) / float64(stockBuilds) / (float64(before+after) / float64(2*ourBuilds))
	s.t.Logf("Nix %s: %d builds in %s and %s through nix-dispatch, %d in %s through the stock hook: 1/%.1f",
		s.client.NixVersion(), ourBuilds, before.Round(time.Millisecond), after.Round(time.Millisecond),
		stockBuilds, theirs.Round(time.Millisecond), ratio)
	return ratio
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
