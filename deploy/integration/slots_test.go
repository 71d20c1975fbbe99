package integration

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/deploy/fleet"
)

// patience is how long these tests wait for what takes a moment on a machine
// with nothing else to do.
const patience = 3 * time.Minute

// TestSlots builds more derivations at once than there are slots, on machines
// that count: with few slots, and with more than sshd allows sessions on a
// connection.
func TestSlots(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "few", suite: fleet.Sid, columns: "x86_64-linux - 3 1 - few", host: feature("few")},
		{name: "crowd", scheme: "ssh-ng", columns: "x86_64-linux - 12 1 - crowd", host: feature("crowd")},
	}})
	s.countBuilds()
	ds := slices.Concat(
		many(8, derivation{name: "few", features: []string{"few"}, script: awaitGo}),
		many(16, derivation{name: "crowd", features: []string{"crowd"}, script: awaitGo}),
	)
	build := s.start("alice", all(ds))
	s.eventually(patience, "every slot builds", func() bool {
		return s.builds(s.machines["few"]).running == 3 && s.builds(s.machines["crowd"]).running == 12
	})
	time.Sleep(2 * time.Second) // for those that should not start
	s.letGo()
	build.wait(patience)
	got := map[string]int{"few": s.builds(s.machines["few"]).most, "crowd": s.builds(s.machines["crowd"]).most}
	if diff := cmp.Diff(map[string]int{"few": 3, "crowd": 12}, got); diff != "" {
		t.Errorf("builds at once (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]int{"few": 8, "crowd": 16}, perHost(s.where())); diff != "" {
		t.Errorf("derivations built (-want +got):\n%s", diff)
	}
	if n, err := s.machines["crowd"].SSHConnections(); err != nil || n != 2 {
		t.Errorf("%d SSH connections for 12 slots and 10 sessions on each (%v), want 2", n, err)
	}
	s.idle(time.Minute)
}

// feature is a machine that has a feature.
func feature(names ...string) fleet.HostConfig { return fleet.HostConfig{SystemFeatures: names} }

// TestManualsExample builds on the machines of the example in the chapter
// "Remote Builds" of the Nix manual.
func TestManualsExample(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "scratchy", columns: "x86_64-linux - 8 1 kvm", host: feature("kvm")},
		{name: "itchy", suite: fleet.Bookworm, columns: "x86_64-linux - 8 2"},
		{name: "poochie", suite: fleet.Sid, columns: "x86_64-linux - 1 2 kvm benchmark", host: feature("kvm", "benchmark")},
	}})
	for _, c := range []struct {
		name string
		n    int
		d    derivation
		want map[string]int
	}{
		// Both of speed 2 and idle is better than of speed 1 and idle; two loads on
		// speed 2 are as much as one on speed 1.
		{"plain", 9, derivation{}, map[string]int{"itchy": 6, "scratchy": 3}},
		{"kvm", 3, derivation{features: []string{"kvm"}}, map[string]int{"scratchy": 3}},
		{"benchmark", 1, derivation{features: []string{"benchmark"}}, map[string]int{"poochie": 1}},
		{"kvm-benchmark", 1, derivation{features: []string{"kvm", "benchmark"}}, map[string]int{"poochie": 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := s.in(t)
			s.countBuilds()
			c.d.name, c.d.script = c.name, awaitGo
			build := s.start("alice", all(many(c.n, c.d)))
			s.eventually(patience, "all are being built", func() bool { return s.running() == c.n })
			s.letGo()
			build.wait(patience)
			if diff := cmp.Diff(c.want, perHost(s.where())); diff != "" {
				t.Errorf("derivations built (-want +got):\n%s", diff)
			}
			s.idle(time.Minute)
		})
	}
	t.Run("one after the other", func(t *testing.T) {
		s := s.in(t)
		s.countBuilds()
		for _, d := range many(4, derivation{name: "single"}) {
			s.mustBuild("alice", d.expr())
			s.idle(time.Minute)
		}
		if diff := cmp.Diff(map[string]int{"itchy": 4}, perHost(s.where())); diff != "" {
			t.Errorf("derivations built (-want +got):\n%s", diff)
		}
	})
	t.Run("only slot", func(t *testing.T) {
		s := s.in(t)
		s.countBuilds()
		s.mustBuild("alice", all(many(3, derivation{name: "turns", features: []string{"benchmark"}, script: "sleep 1"})))
		if c := s.builds(s.machines["poochie"]); c.total() != 3 || c.most != 1 {
			t.Errorf("poochie, which has one slot, built %d, %d at once; want 3, 1 at once", c.total(), c.most)
		}
	})
	t.Run("impossible", func(t *testing.T) { s.in(t).checkImpossible() })
}

// running counts the builders that run on all hosts together.
func (s *site) running() int {
	s.t.Helper()
	n := 0
	for _, h := range s.hosts() {
		n += s.builds(h).running
	}
	return n
}

// checkImpossible checks what is said of a derivation that no machine of the
// manual's example can build, and that it is built locally if it can be.
func (s *site) checkImpossible() {
	s.t.Helper()
	gpu := derivation{name: "impossible", features: []string{"gpu"}}
	for _, user := range []string{"alice", "root"} {
		out, err := s.nixBuild(user, gpu.expr())
		if err == nil {
			s.t.Errorf("%s: built where nothing has the feature", user)
		}
		for _, want := range []string{
			"scratchy does not support required feature gpu",
			"itchy does not support required feature gpu",
			"poochie does not support required feature gpu",
		} {
			if !strings.Contains(out.Stderr, want) {
				s.t.Errorf("%s is not told %q:\n%s", user, want, out.Stderr)
			}
		}
	}
	s.countBuilds()
	out, err := s.nixBuild("root", gpu.expr(), "--max-jobs", "1", "--option", "system-features", "gpu")
	if err != nil {
		s.t.Fatalf("nix-build: %v\n%s", err, out.Stderr)
	}
	if strings.Contains(out.Stderr, "does not support") {
		s.t.Errorf("the user is bothered with what no machine can do:\n%s", out.Stderr)
	}
	if diff := cmp.Diff(map[string]string{"impossible": "client"}, s.where()); diff != "" {
		s.t.Errorf("derivations built (-want +got):\n%s", diff)
	}
}

// TestLocalMachineShares checks the replies to a client that may build itself.
func TestLocalMachineShares(t *testing.T) {
	t.Parallel()
	for _, client := range shortOr([]string{fleet.Trixie}, suites) {
		t.Run("client="+client, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, siteConfig{client: client, jobs: 2, machines: []machineConfig{
				{name: "mac", columns: "x86_64-linux - 2"},
			}})
			s.checkShares("alice")
			s.checkShares("root")
			s.checkNoBuilders()
			if client == fleet.Trixie {
				s.checkNoneUp()
			}
		})
	}
}

// checkShares builds more than the slots of the machine and the client can take
// together. Nix first offers every derivation while its own slots are free, and
// builds two itself. When it offers the rest again its slots are taken: as many
// as the machine has slots are queued there, so that it need not wait for what
// Nix offers some other time.
func (s *site) checkShares(user string) {
	s.t.Helper()
	mac := s.machines["mac"]
	s.countBuilds()
	ds := many(12, derivation{name: "share-" + user, script: awaitGo})
	build := s.start(user, all(ds))
	s.eventually(patience, "2 local slots and 2 of the machine are used", func() bool {
		return s.builds(s.client).running == 2 && s.builds(mac).running == 2
	})
	s.letGo(s.builds(mac).names()[0])
	s.eventually(patience, "the machine has the next build, and as many wait for it as it has slots", func() bool {
		c := s.builds(mac)
		return c.total() == 3 && c.running == 2 && len(s.status().Builds) >= 4
	})
	time.Sleep(2 * time.Second) // for those that should have been postponed
	if n := len(s.status().Builds); n > 6 {
		s.t.Errorf("%s: nix-dispatchd has %d builds, want at most 2 in slots, 2 with inputs on the way and 2 queued", user, n)
	}
	if c := s.builds(s.client); c.total() != 2 {
		s.t.Errorf("%s: the client, whose slots are taken, has started %d builds, want 2", user, c.total())
	}
	s.letGo()
	build.wait(patience)
	at := s.where()
	if diff := cmp.Diff(namesOf(ds), slices.Sorted(maps.Keys(at))); diff != "" {
		s.t.Errorf("%s: derivations built (-want +got):\n%s", user, diff)
	}
	share := perHost(at)
	s.t.Logf("%s: %v", user, share)
	if share["mac"] < 5 || share["client"] < 2 {
		s.t.Errorf("%s: derivations built: %v, want at least 5 on the machine, 2 on the client", user, share)
	}
	for name, h := range s.hosts() {
		if most := s.builds(h).most; most > 2 {
			s.t.Errorf("%s: %d builds at once on %s, want at most 2", user, most, name)
		}
	}
	s.idle(time.Minute)
}

func namesOf(ds []derivation) []string {
	names := make([]string, len(ds))
	for n, d := range ds {
		names[n] = d.name
	}
	slices.Sort(names)
	return names
}

// checkNoBuilders checks that a user who wants no machines gets none.
func (s *site) checkNoBuilders() {
	s.t.Helper()
	s.countBuilds()
	s.mustBuild("alice", derivation{name: "alone"}.expr(), "--builders", "")
	if diff := cmp.Diff(map[string]string{"alone": "client"}, s.where()); diff != "" {
		s.t.Errorf("with no builders, derivations built (-want +got):\n%s", diff)
	}
}

// checkNoneUp checks what happens when the only machine is off: what can be
// built locally is, what cannot waits for the machine.
func (s *site) checkNoneUp() {
	s.t.Helper()
	mac := s.machines["mac"]
	s.countBuilds()
	if err := mac.Kill(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	s.eventually(patience, "the machine is down", func() bool { return s.status().Machines[0].State == "down" })
	s.mustBuild("alice", derivation{name: "meanwhile"}.expr())
	if n := s.builds(s.client).starts["meanwhile"]; n != 1 {
		s.t.Errorf("with the machine down, the client ran the build %d times, want once", n)
	}
	build := s.start("alice", derivation{name: "patient"}.expr(), "--max-jobs", "0")
	s.eventually(patience, "the build waits", func() bool {
		builds := s.status().Builds
		return len(builds) == 1 && builds[0].Phase == "queued"
	})
	if err := mac.Boot(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	build.wait(patience)
	if n := s.builds(mac).starts["patient"]; n != 1 {
		s.t.Errorf("the machine ran the build that waited for it %d times, want once", n)
	}
	s.idle(time.Minute)
}
