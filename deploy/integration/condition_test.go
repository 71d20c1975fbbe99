package integration

import (
	"strings"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// TestMachinesTellHowTheyAre asks machines for their disk and load: those that run
// commands tell, and from those that do not, nothing is wanted.
func TestMachinesTellHowTheyAre(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "old", suite: fleet.Bookworm},
		{name: "new", suite: fleet.Sid, scheme: "ssh-ng", user: "nix", host: fleet.HostConfig{NixTrusted: true}},
		{name: "forced", host: fleet.HostConfig{SSHDConfig: "ForceCommand nix-store --serve --write"}},
		{name: "single", host: fleet.HostConfig{SSHDConfig: "MaxSessions 1"}},
	}})
	s.eventually(time.Minute, "all that can be known is known", func() bool {
		known := 0
		for _, m := range s.status().Machines {
			if m.Load != nil || strings.HasPrefix(m.LoadUnknown, "the account there runs no other") || strings.HasPrefix(m.LoadUnknown, "no session can be spared") {
				known++
			}
		}
		return known == 4
	})
	for n, m := range s.status().Machines {
		if m.State != "up" {
			t.Errorf("%s is %s: %s", m.URI, m.State, m.Reason)
		}
		if wanted := n < 2; (m.Load != nil) != wanted {
			t.Errorf("%s: load %v, %s", m.URI, m.Load, m.LoadUnknown)
			continue
		}
		if l := m.Load; l != nil && (l.StoreFreeBytes == nil || l.BuildDirFreeBytes == nil || l.Load1 == nil || l.Cores == nil || l.MemoryAvailableBytes == nil) {
			t.Errorf("%s does not tell all: %+v", m.URI, l)
		}
	}
	for n, want := range []string{"LoadUnknown", "the account there runs no other commands", "no session can be spared"} {
		if got := s.status().Machines[n+1].LoadUnknown; n > 0 && !strings.Contains(got, want) {
			t.Errorf("%s says %q, want %q", s.status().Machines[n+1].URI, got, want)
		}
	}
	_, metrics := s.scrape()
	for uri, known := range map[string]bool{"ssh://root@old": true, "ssh-ng://nix@new": true, "ssh://root@forced": false, "ssh://root@single": false} {
		if _, is := metrics[`nix_dispatch_machine_store_free_bytes{machine=`+uri+`}`]; is != known {
			t.Errorf("%s: the free space of its store is in the metrics: %v, want %v", uri, is, known)
		}
	}
	// The forced command and the only session are tried once, not for every connection.
	if log, err := s.machines["single"].SSHConnections(); err != nil || log != 1 {
		t.Errorf("%d connections to the machine with one session (%v), want 1", log, err)
	}
}

// TestFullDiskParksAMachine fills the disk of a machine that all builds prefer: they
// go elsewhere, everybody is told why, and when there is room it is used again.
func TestFullDiskParksAMachine(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{daemon: []string{"--load-interval", "1s"}, machines: []machineConfig{
		{name: "mac", suite: fleet.Sid, columns: "x86_64-linux - 2 4 only", host: feature("only")},
		{name: "mini", suite: fleet.Bookworm, columns: "x86_64-linux - 2"},
	}})
	v := victim{s, s.machines["mac"]}
	state := func() (string, string) { m := s.status().Machines[0]; return m.State, m.Reason }
	s.countBuilds()
	s.mustBuild("alice", derivation{name: "used"}.expr()) // one that is used is asked how it is
	if n := s.builds(v.Host).total(); n != 1 {
		t.Errorf("the machine that is preferred built %d, want 1", n)
	}
	s.onHost(v.Host, "mkdir -p /nix/store; mount -t tmpfs -o size=64m,mode=1775,gid=nixbld tmpfs /nix/store; head -c 63M /dev/zero >/nix/store/.full")
	s.eventually(time.Minute, "the machine is parked", func() bool {
		state, reason := state()
		return state == "parked" && strings.Contains(reason, "disk low: ") && strings.Contains(reason, "free in its store")
	})
	for _, d := range many(3, derivation{name: "elsewhere"}) {
		s.mustBuild("alice", d.expr())
	}
	if n := s.builds(s.machines["mini"]).total(); n != 3 {
		t.Errorf("the machine with room built %d, want 3", n)
	}
	out, err := s.dispatch("explain", "--system", "x86_64-linux", "--features", "only")
	if err != nil || !strings.Contains(out.Stdout, "all matching machines that are up are parked") || !strings.Contains(out.Stdout, "is parked: disk low: ") {
		t.Errorf("explain says %q (%v)", out.Stdout, err)
	}
	// Only it can build this, and there is some room: it is used when the build has
	// waited for a while.
	s.mustBuild("alice", derivation{name: "only", features: []string{"only"}}.expr())
	s.onHost(v.Host, "rm /nix/store/.full")
	s.eventually(time.Minute, "the machine is up again", func() bool { state, reason := state(); return state == "up" && reason == "" })
	s.idle(time.Minute)
}
