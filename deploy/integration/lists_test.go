package integration

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/deploy/fleet"
)

// TestListsGivenPerRequest names machines with --builders, in every form, with
// real Nix and with nix-dispatch build. The daemon serves them.
func TestListsGivenPerRequest(t *testing.T) {
	t.Parallel()
	for _, client := range clients(t) {
		t.Run("client="+client, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, siteConfig{client: client, jobs: 2, machines: []machineConfig{
				{name: "mac", columns: "x86_64-linux - 4"},
				{name: "kitty", scheme: "ssh-ng", columns: "x86_64-linux - 2"},
			}})
			const kitty = "ssh-ng://root@kitty"
			s.write(machinesFile, "ssh://root@mac x86_64-linux - 4\n")
			s.write("/srv/list", "# more\n"+kitty+" x86_64-linux - 2\n")
			s.mustDispatch("reload")
			s.eventually(patience, "the daemon has nothing of kitty any more", func() bool {
				return strings.Contains(s.daemon.log.String(), `nothing leads there any more" machine=`+kitty)
			})
			s.countBuilds()
			before := s.started()

			// The client could build it, and has a free slot: it is the machine that is wanted.
			out := s.mustBuildOn("root", "as-text", "--builders", kitty+" x86_64-linux - 2")
			if builtOn(out.Stderr)[kitty] != 1 {
				t.Errorf("nix-build does not say that it built on %s:\n%s", kitty, out.Stderr)
			}
			s.mustBuildOn("root", "as-file", "--builders", "@/srv/list")
			s.mustBuildOn("root", "as-list", "--builders", "# both\nssh://root@mac i686-linux ; "+kitty+" x86_64-linux")
			s.mustBuildOn("root", "default", "--max-jobs", "0")
			s.mustBuildOn("alice", "ignored", "--max-jobs", "0", "--builders", kitty+" x86_64-linux")
			s.mustBuildOn("root", "nowhere", "--builders", "")
			drv := s.derivations(derivation{name: "command"}.expr())[0]
			s.mustDispatch("build", "--builders", "@/srv/list", drv)
			drv = s.derivations(derivation{name: "command-nowhere"}.expr())[0]
			s.mustDispatch("build", "--builders", "", drv)
			want := map[string]string{
				"as-text": "kitty", "as-file": "kitty", "as-list": "kitty", "command": "kitty",
				"default": "mac", "ignored": "mac", "nowhere": "client", "command-nowhere": "client",
			}
			if diff := cmp.Diff(want, s.where()); diff != "" {
				t.Errorf("derivations built (-want +got):\n%s", diff)
			}
			if n := s.started() - before; n != 6 {
				t.Errorf("the daemon served %d builds, want 6: all that went to machines", n)
			}
			_, got := s.scrape()
			if n := got["nix_dispatch_builds_total{machine=other,result=built,system=x86_64-linux}"]; n != 4 {
				t.Errorf("builds_total{machine=other} = %v, want the 4 on kitty", n)
			}
			if s.state(kitty) != "up" || !slices.Contains(s.uris(), kitty) {
				t.Errorf("the status has no %s, which was just used: %v", kitty, s.uris())
			}
		})
	}
}

// started counts the builds that the daemon has accepted.
func (s *site) started() int { return strings.Count(s.daemon.log.String(), `msg="build accepted"`) }

// mustBuildOn builds a derivation of that name, which must succeed.
func (s *site) mustBuildOn(user, name string, args ...string) fleet.Output {
	s.t.Helper()
	out, err := s.nixBuild(user, derivation{name: name}.expr(), args...)
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", name, err, out.Stderr)
	}
	return out
}

// TestWhoMayNameMachines asks as members of groups.
func TestWhoMayNameMachines(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{daemon: []string{"--machines-group", "machinists"}, machines: []machineConfig{
		{name: "mac", columns: "x86_64-linux - 4"}, {name: "kitty", columns: "x86_64-linux - 2"},
	}})
	for _, args := range [][]string{
		{"groupadd", "--system", "nix-dispatch"}, {"groupadd", "--system", "machinists"},
		{"usermod", "--append", "--groups", "nix-dispatch", "alice"},
		{"usermod", "--append", "--groups", "nix-dispatch,machinists", "bob"},
	} {
		s.run(args...)
	}
	s.stopDaemon(syscall.SIGTERM)
	s.write(machinesFile, "ssh://root@mac x86_64-linux - 4\n")
	s.startDaemon()
	s.countBuilds()
	build := func(user, name string) (fleet.Output, error) {
		drv := s.derivations(derivation{name: name}.expr())[0]
		return s.client.RunAs(t.Context(), user, programs+"/nix-dispatch", "build", "--builders", "ssh://root@kitty x86_64-linux", drv)
	}
	if out, err := build("alice", "alices"); err == nil || !strings.Contains(out.Stderr, "may not name machines") {
		t.Errorf("alice, who is no machinist, names machines: %v\n%s", err, out.Stderr)
	}
	if out, err := build("bob", "bobs"); err != nil {
		t.Errorf("bob, a machinist, may not name machines: %v\n%s", err, out.Stderr)
	}
	if diff := cmp.Diff(map[string]string{"bobs": "kitty"}, s.where()); diff != "" {
		t.Errorf("derivations built (-want +got):\n%s", diff)
	}
}

// TestListFromNixConf has the setting in nix.conf, which both Nix and the daemon
// go by.
func TestListFromNixConf(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{
		nixConf:  "builders = ssh://root@mac x86_64-linux - 3 ; ssh-ng://root@kitty x86_64-linux - 2 9\n",
		machines: []machineConfig{{name: "mac"}, {name: "kitty", scheme: "ssh-ng"}},
	})
	if got := s.uris(); !slices.Equal(got, []string{"ssh-ng://root@kitty", "ssh://root@mac"}) || s.status().Machines[0].Slots != 3 {
		t.Errorf("machines = %+v, want those of nix.conf", s.status().Machines)
	}
	s.countBuilds()
	for _, user := range []string{"alice", "root"} {
		s.mustBuildOn(user, user)
	}
	if diff := cmp.Diff(map[string]string{"alice": "kitty", "root": "kitty"}, s.where()); diff != "" {
		t.Errorf("derivations built (-want +got):\n%s", diff)
	}
	if n := strings.Count(s.daemon.log.String(), "machines named by a request"); n != 0 {
		t.Errorf("%d requests had a list that is not the daemon's own", n)
	}
	s.idle(time.Minute)
}
