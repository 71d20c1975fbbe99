package integration

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// An explanation is what nix-dispatch explain --json prints.
type explanation struct {
	Possible bool
	Chosen   string
	Why      string
	Machines []struct{ URI, Reason, Text string }
}

func (s *site) explain(args ...string) (e explanation, reasons map[string]string) {
	s.t.Helper()
	out := s.mustDispatch(append([]string{"explain", "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out.Stdout), &e); err != nil {
		s.t.Fatalf("nix-dispatch explain --json printed %q: %v", out.Stdout, err)
	}
	reasons = make(map[string]string)
	for _, m := range e.Machines {
		reasons[m.URI] = m.Reason + ": " + m.Text
	}
	return e, reasons
}

// TestExplain asks why builds go where they go, of machines in every state.
func TestExplain(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "mac", columns: "x86_64-linux - 1 2 kvm", host: feature("kvm")},
		{name: "kitty", scheme: "ssh-ng", columns: "x86_64-linux - 1 1 kvm", host: feature("kvm")},
		{name: "old", columns: "x86_64-linux - 2 1 kvm"},
	}})
	s.write(machinesFile, strings.Join([]string{
		"ssh://root@mac x86_64-linux - 1 2 kvm", "ssh-ng://root@kitty x86_64-linux - 1 1 kvm", "ssh://root@old x86_64-linux - 2 1 kvm",
		"ssh://root@nobody x86_64-linux - 2 1 kvm", "ssh://arm aarch64-linux", "ssh://root@old?x=1 x86_64-linux - 2 1 kvm benchmark",
	}, "\n")+"\n")
	s.mustDispatch("reload")
	s.mustDispatch("drain", "ssh://root@old")
	s.eventually(patience, "what can be up is", func() bool {
		return s.state("ssh://root@mac") == "up" && s.state("ssh-ng://root@kitty") == "up" && s.state("ssh://root@nobody") == "down" && s.state("ssh://root@old") == "draining"
	})
	s.countBuilds()
	build := s.start("alice", derivation{name: "blocker", features: []string{"kvm"}, script: awaitGo}.expr())
	s.eventually(patience, "mac has the build", func() bool { return s.builds(s.machines["mac"]).running == 1 })
	e, reasons := s.explain("--system", "x86_64-linux", "--features", "kvm")
	if !e.Possible || e.Chosen != "ssh-ng://root@kitty" || e.Why != "goes to ssh-ng://root@kitty: the only matching machine with a free slot" {
		t.Errorf("explain = %+v", e)
	}
	for uri, want := range map[string]string{
		"ssh://root@mac":      "full: is full: its only slot is taken (1 running)",
		"ssh-ng://root@kitty": "eligible: is eligible: 0 of 1 slots taken, speed factor 1",
		"ssh://root@old":      "drained: is drained: since 20",
		"ssh://root@nobody":   "down: is down: ",
		"ssh://arm":           "system: does not support system x86_64-linux (it has aarch64-linux)",
		"ssh://root@old?x=1":  "mandatory_feature: takes only builds that require feature benchmark",
	} {
		if !strings.HasPrefix(reasons[uri], want) {
			t.Errorf("%s: %q, want %q", uri, reasons[uri], want)
		}
	}
	s.letGo()
	build.wait(patience)
	s.checkSameWords()
	s.checkUnplaceable()
}

// checkSameWords compares what explain says of a derivation that no machine can
// build with what nix-build's user is told.
func (s *site) checkSameWords() {
	s.t.Helper()
	gpu := derivation{name: "gpu", features: []string{"gpu"}}.expr()
	drv, err := s.client.Run(s.t.Context(), "nix-instantiate", "--expr", gpu)
	if err != nil {
		s.t.Fatal(err)
	}
	text := s.mustDispatch("explain", strings.TrimSpace(drv.Stdout)).Stdout
	out, err := s.nixBuild("alice", gpu)
	if err == nil {
		s.t.Error("built where nothing has the feature")
	}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if len(lines) != 7 {
		s.t.Errorf("explain prints %d lines, want one for each of 6 machines and one before:\n%s", len(lines), text)
	}
	for _, line := range lines {
		if !strings.Contains(out.Stderr, strings.TrimSpace(line)) {
			s.t.Errorf("explain says %q, nix-build does not:\n%s", line, out.Stderr)
		}
	}
	if !strings.Contains(text, "does not support required feature gpu") {
		s.t.Errorf("explain says\n%s", text)
	}
	_, got := s.scrape()
	if got["nix_dispatch_derivations_unplaceable_total{system=x86_64-linux}"] < 1 {
		s.t.Errorf("what no machine can build is not counted: %v", got)
	}
}

// checkUnplaceable has a build wait for a machine whose line is then taken away.
func (s *site) checkUnplaceable() {
	s.t.Helper()
	s.countBuilds()
	s.write(machinesFile, "ssh://root@nobody x86_64-linux - 2 1 kvm\n")
	s.mustDispatch("reload")
	build := s.start("alice", derivation{name: "waiting", features: []string{"kvm"}}.expr())
	s.eventually(patience, "it waits", func() bool { return len(s.status().Builds) == 1 })
	if n := s.list().Unplaceable; n != 0 {
		s.t.Errorf("%d builds unplaceable while a machine is down that could take it", n)
	}
	s.write(machinesFile, "ssh://root@mac x86_64-linux - 1\n")
	s.mustDispatch("reload")
	s.eventually(patience, "it counts apart", func() bool { return s.list().Unplaceable == 1 })
	_, got := s.scrape()
	if got["nix_dispatch_builds_unplaceable{system=x86_64-linux}"] != 1 || got["nix_dispatch_builds_queued{system=x86_64-linux}"] != 0 {
		s.t.Errorf("metrics do not tell it from builds that wait: %v", got)
	}
	s.write(machinesFile, "ssh://root@mac x86_64-linux - 1 1 kvm\n")
	s.mustDispatch("reload")
	build.wait(patience)
	s.idle(time.Minute)
}
