package integration

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestHandshakes runs many builds on 4 machines over one SSH connection to each.
func TestHandshakes(t *testing.T) {
	t.Parallel()
	const slots = 4
	builds := shortOr(40, 100)
	var cfg siteConfig
	for n, suite := range append(suites, suites[1]) {
		cfg.machines = append(cfg.machines, machineConfig{
			name: fmt.Sprintf("mac%d", n), suite: suite, columns: fmt.Sprintf("x86_64-linux - %d", slots),
			scheme: []string{"ssh", "ssh-ng"}[n%2],
		})
	}
	s := newSite(t, cfg)
	s.countBuilds()
	start := time.Now()
	// Builds that end before Nix offers the next would rightly all go to the first
	// machine.
	s.mustBuild("alice", all(many(builds, derivation{name: "hello", script: "sleep 1"})))
	t.Logf("%d builds: %s", builds, time.Since(start).Round(time.Millisecond))
	share := perHost(s.where())
	t.Logf("derivations built: %v", share)
	handshakes, want := make(map[string]int), make(map[string]int)
	total := 0
	for name, h := range s.machines {
		want[name] = 1
		var err error
		if handshakes[name], err = h.SSHConnections(); err != nil {
			t.Fatal(err)
		}
		total += share[name]
		if share[name] < builds/len(s.machines)/4 {
			t.Errorf("%s built %d derivations of %d", name, share[name], builds)
		}
		if most := s.builds(h).most; most > slots {
			t.Errorf("%s: %d builds at once, want at most %d", name, most, slots)
		}
	}
	if total != builds {
		t.Errorf("the machines built %d derivations, want %d", total, builds)
	}
	if diff := cmp.Diff(want, handshakes); diff != "" {
		t.Errorf("SSH connections accepted (-want +got):\n%s", diff)
	}
}
