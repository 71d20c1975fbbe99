package integration

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/deploy/fleet"
)

const machinesFile = "/etc/nix/machines"

// A listReport is what nix-dispatch status --json prints of the list of machines.
type listReport struct {
	// Unplaceable counts the builds that no machine can ever run.
	Unplaceable int
	// Reload is nil before the list was first read anew.
	Reload *struct {
		Success bool
		Errors  []string
	}
}

func (s *site) list() listReport {
	s.t.Helper()
	var r listReport
	if err := json.Unmarshal([]byte(s.mustDispatch("status", "--json").Stdout), &r); err != nil {
		s.t.Fatal(err)
	}
	return r
}

// uris are the machines that the daemon knows, as the status shows them.
func (s *site) uris() []string {
	s.t.Helper()
	var uris []string
	for _, m := range s.status().Machines {
		uris = append(uris, m.URI)
	}
	slices.Sort(uris)
	return uris
}

// state is the state of a machine; "" if there is none.
func (s *site) state(uri string) string {
	s.t.Helper()
	for _, m := range s.status().Machines {
		if m.URI == uri {
			return m.State
		}
	}
	return ""
}

// mustDispatch runs a nix-dispatch command that must succeed.
func (s *site) mustDispatch(args ...string) fleet.Output {
	s.t.Helper()
	out, err := s.dispatch(args...)
	if err != nil {
		s.t.Fatalf("nix-dispatch %s: %v\n%s", strings.Join(args, " "), err, out.Stderr)
	}
	return out
}

// TestReloadUnderLoad edits the machines file again and again while builds run, once
// with a syntax error: 20 times under 100 builds, in "make test" half of that. The edits add and remove machines, and change how they
// are reached, how many slots they have and what they build.
func TestReloadUnderLoad(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "mac", columns: "x86_64-linux - 4"},
		{name: "kitty", scheme: "ssh-ng", columns: "x86_64-linux - 4", suite: fleet.Sid},
		{name: "old", columns: "x86_64-linux - 2", suite: fleet.Bookworm},
	}})
	const key = "/root/.ssh/id_ed25519"
	edits := []string{
		"ssh://root@mac x86_64-linux - 4\nssh-ng://root@kitty x86_64-linux - 4\n",
		"ssh://root@mac x86_64-linux " + key + " 2\nssh-ng://root@kitty x86_64-linux - 1 9\n",
		"ssh-ng://root@kitty x86_64-linux " + key + " 4\nssh://root@old x86_64-linux - 2\n",
		"ssh://root@mac i686-linux - 4\nssh-ng://root@kitty x86_64-linux - 2\nssh://root@old x86_64-linux - 0\n",
		"ssh://root@mac x86_64-linux - 3\nssh://root@mac x86_64-linux " + key + " 4 2 kvm\nssh://root@old x86_64-linux - 2\n",
	}
	s.countBuilds()
	changes := shortOr(10, 20)
	ds := many(5*changes, derivation{name: "load", script: "sleep 0.5"})
	build := s.start("alice", all(ds))
	started := func() int {
		n := 0
		for _, h := range s.machines {
			n += s.builds(h).total()
		}
		return n
	}
	for i := range changes {
		s.eventually(patience, fmt.Sprintf("%d builds were started", 4*i+1), func() bool { return started() > 4*i })
		switch {
		case i == changes/2:
			s.write(machinesFile, "ssh://root@mac x86_64-linux - many\n")
			s.eventually(patience, "the broken file is found", func() bool { r := s.list().Reload; return r != nil && !r.Success })
		case i%5 == 4:
			before := s.reloads()
			s.write(machinesFile, edits[i%len(edits)])
			s.eventually(patience, "the daemon finds the change", func() bool { return s.reloads() > before })
		default:
			s.write(machinesFile, edits[i%len(edits)])
			s.mustDispatch("reload")
		}
	}
	build.wait(2 * patience)
	if diff := cmp.Diff(namesOf(ds), slices.Sorted(keys(s.where()))); diff != "" {
		t.Errorf("derivations built (-want +got):\n%s", diff)
	}
	for name, h := range s.machines {
		if most := s.builds(h).most; most > 4 {
			t.Errorf("%d builds at once on %s, which never had more than 4 slots", most, name)
		}
	}
	t.Logf("built: %v", perHost(s.where()))
	s.idle(time.Minute)
	if got := s.reloads(); got < changes-1 {
		t.Errorf("the file was read anew %d times, want %d at least", got, changes-1)
	}
}

// reloads counts how often the daemon has read the machines file anew.
func (s *site) reloads() int {
	return strings.Count(s.daemon.log.String(), "builders setting read anew")
}

func keys(m map[string]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// TestReloadBySignalAndLink changes the file as NixOS does, by another link, and
// as a person does, with a signal.
func TestReloadBySignalAndLink(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{{name: "mac"}, {name: "kitty"}}})
	if _, err := s.client.Run(t.Context(), "sh", "-ec", `
		mkdir -p /srv/1 /srv/2
		echo 'ssh://root@mac x86_64-linux - 1' > /srv/1/machines
		echo 'ssh://root@kitty x86_64-linux - 1' > /srv/2/machines
		ln -s /srv/1 /srv/static; ln -sf /srv/static/machines /etc/nix/machines`); err != nil {
		t.Fatal(err)
	}
	s.eventually(patience, "mac is the only one", func() bool { return slices.Equal(s.uris(), []string{"ssh://root@mac"}) })
	if _, err := s.client.Run(t.Context(), "sh", "-ec", `ln -s /srv/2 /srv/new; mv -T /srv/new /srv/static`); err != nil {
		t.Fatal(err)
	}
	s.eventually(patience, "kitty is the only one", func() bool { return slices.Equal(s.uris(), []string{"ssh://root@kitty"}) })
	if err := s.client.Signal(s.daemon.cmd, syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.eventually(patience, "the signal has it read", func() bool { return strings.Contains(s.daemon.log.String(), "why=SIGHUP") })
	s.countBuilds()
	s.mustBuild("alice", derivation{name: "thing"}.expr())
}

// TestDrainSurvivesRestart drains a machine, restarts the daemon, and undrains it.
func TestDrainSurvivesRestart(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "mac", columns: "x86_64-linux - 4 2"}, {name: "kitty", columns: "x86_64-linux - 4"},
	}})
	s.countBuilds()
	running := s.start("alice", derivation{name: "running", script: awaitGo}.expr())
	s.eventually(patience, "the fast machine has the build", func() bool { return s.builds(s.machines["mac"]).running == 1 })
	if out := s.mustDispatch("drain", "mac"); out.Stdout != "ssh://root@mac is drained; builds still on it: 1\n" {
		t.Errorf("drain printed %q", out.Stdout)
	}
	s.mustBuild("alice", derivation{name: "elsewhere"}.expr())
	s.letGo()
	running.wait(patience)
	s.stopDaemon(syscall.SIGTERM)
	s.startDaemon()
	if got := s.state("ssh://root@mac"); got != "draining" {
		t.Errorf("after a restart the machine is %q, want draining", got)
	}
	s.mustBuild("alice", derivation{name: "elsewhere-again"}.expr())
	for _, args := range [][]string{{"drain", "mac"}, {"undrain", "mac"}, {"reload"}} {
		out, err := s.client.RunAs(t.Context(), "alice", append([]string{programs + "/nix-dispatch"}, args...)...)
		if err == nil {
			t.Errorf("alice may %s: %s", args, out.Stdout)
		}
	}
	s.mustDispatch("undrain", "ssh://root@mac")
	s.mustBuild("alice", derivation{name: "back"}.expr())
	want := map[string]string{"running": "mac", "elsewhere": "kitty", "elsewhere-again": "kitty", "back": "mac"}
	if diff := cmp.Diff(want, s.where()); diff != "" {
		t.Errorf("derivations built (-want +got):\n%s", diff)
	}
}

// TestLinesWithOneURI has two lines for one machine, which counts what runs there.
func TestLinesWithOneURI(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "mac", columns: "x86_64-linux - 2", host: feature("big")},
	}})
	s.write(machinesFile, "ssh://root@mac x86_64-linux - 2\nssh://root@mac x86_64-linux - 3 1 - big\n")
	s.mustDispatch("reload")
	s.eventually(patience, "both lines are one machine that is up", func() bool {
		ms := s.status().Machines
		return len(ms) == 1 && ms[0].State == "up" && ms[0].Slots == 3
	})
	s.countBuilds()
	mac := s.machines["mac"]
	build := s.start("alice", all(slices.Concat(
		many(4, derivation{name: "plain", script: awaitGo}),
		many(4, derivation{name: "big", features: []string{"big"}, script: awaitGo}))))
	s.eventually(patience, "all three slots are used", func() bool { return s.builds(mac).running == 3 })
	time.Sleep(2 * time.Second) // for those that should not start
	c := s.builds(mac)
	plain := 0
	for _, name := range c.names() {
		if strings.HasPrefix(name, "plain") {
			plain++
		}
	}
	if c.running != 3 || plain > 2 {
		t.Errorf("%d builds run, %d of them of the line with 2 slots; want 3, at most 2", c.running, plain)
	}
	s.letGo()
	build.wait(patience)
	if c := s.builds(mac); c.total() != 8 || c.most != 3 {
		t.Errorf("%d builds, %d at once; want 8, 3 at once", c.total(), c.most)
	}
	if n, err := mac.SSHConnections(); err != nil || n != 1 {
		t.Errorf("%d SSH connections (%v), want one for both lines", n, err)
	}
	s.idle(time.Minute)
}

// TestLineThatLeadsBack has lines that lead to the client's own store, with ssh
// and without. A build sent there would wait for the locks of its own caller.
func TestLineThatLeadsBack(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{{name: "mac", columns: "x86_64-linux - 1 1"}}})
	own := []string{"ssh://localhost", "ssh-ng://localhost", "ssh://root@client", "ssh-ng://root@client"}
	for _, uri := range own {
		s.write(machinesFile, uri+" x86_64-linux - 8 9\nssh://root@mac x86_64-linux - 1 1\n")
		s.mustDispatch("reload")
		s.eventually(patience, uri+" is refused", func() bool {
			for _, m := range s.status().Machines {
				if m.URI == uri {
					return m.State == "down" && strings.Contains(m.Reason, "this host's own")
				}
			}
			return false
		})
		s.countBuilds()
		name := strings.Map(func(r rune) rune {
			if r < 'a' || r > 'z' {
				return '-'
			}
			return r
		}, uri)
		s.mustBuild("alice", derivation{name: "build" + name}.expr())
		if n := s.builds(s.machines["mac"]).total(); n != 1 {
			t.Errorf("%s: mac built %d, want the build that may not go back", uri, n)
		}
	}
	_, got := s.scrape()
	if got["nix_dispatch_machine_down{machine=ssh-ng://root@client,reason=own_store}"] != 1 {
		t.Errorf("no metric tells why the machine is down: %v", got)
	}
}
