package integration

import (
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestCallersNameLinks has a member of the group name links in the store that nix-store
// --add left there, whose target has become a pipe or a device. Nix 2.8 takes such a
// path for valid.
func TestCallersNameLinks(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: []machineConfig{{name: "mac"}}})
		s.stopDaemon(syscall.SIGTERM)
		s.run("groupadd", "--system", "nix-dispatch")
		s.run("usermod", "--append", "--groups", "nix-dispatch", "alice")
		s.startDaemon()
		drv := s.derivations("[" + shell("honest", "echo honest > $out", "") + "]")[0]
		threads := s.daemonThreads()
		for name, put := range map[string][]string{
			"pipe":   {"mkfifo", "/srv/there"},
			"device": {"ln", "-s", "/dev/zero", "/srv/there"},
		} {
			// At first the target is a derivation, so that the store takes it. Nix 2.26 and
			// 2.34 refuse it all the same, and leave it in the store.
			s.run("mkdir", "/srv/"+name)
			s.run("cp", drv, "/srv/there")
			link := "/srv/" + name + "/" + drv[len("/nix/store/")+33:]
			s.run("ln", "-s", "/srv/there", link)
			_, _ = s.client.Run(t.Context(), "nix-store", "--add", link) // what is left there is looked at below
			links := strings.Fields(s.run("find", "/nix/store", "-maxdepth", "1", "-type", "l", "-name", "*.drv"))
			if len(links) == 0 {
				t.Fatal("nix-store --add left no link")
			}
			s.run("rm", "/srv/there")
			s.run(put...)
			for _, link := range links {
				for range 20 {
					for _, ask := range [][]string{{"explain", link}, {"build", link}} {
						start := time.Now()
						_, stderr, exit := s.as("alice", ask...)
						if exit == 0 || !strings.Contains(stderr, "is not in the local store") && !strings.Contains(stderr, "not a regular file") {
							t.Fatalf("%s: %s: exit %d after %v, %q", name, strings.Join(ask, " "), exit, time.Since(start), stderr)
						}
					}
				}
				if said := s.mallory("alice", "hook", "--drv", link); !strings.Contains(said, "ACTION_STOCK") {
					t.Errorf("%s: hook: %q", name, said)
				}
			}
			s.run("rm", "/srv/there")
		}
		if now := s.daemonThreads(); now > threads+20 {
			t.Errorf("the daemon has %d threads, %d before", now, threads)
		}
		s.mustBuild("root", shell("after", "echo after > $out", ""))
	})
}

// daemonThreads is how many threads nix-dispatchd has.
func (s *site) daemonThreads() int {
	s.t.Helper()
	n, err := strconv.Atoi(s.run("sh", "-c", "ls /proc/$(pgrep -x nix-dispatchd)/task | wc -l"))
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}
