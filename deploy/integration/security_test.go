package integration

import (
	"bytes"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// These are lines of docs/security.md that need real users, or a real Nix.

// mallory runs the program of that name on the client as a user.
func (s *site) mallory(user string, args ...string) string {
	s.t.Helper()
	out, _ := s.client.RunAs(s.t.Context(), user, append([]string{programs + "/mallory"}, args...)...) // what it says tells
	return out.Stdout + out.Stderr
}

// TestSecurityOfTheHookCall has alice, a member of the group, lie as a hook, and
// nix, who is none, try it at all.
func TestSecurityOfTheHookCall(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{{name: "mac"}}})
	s.stopDaemon(syscall.SIGTERM)
	s.run("groupadd", "--system", "nix-dispatch")
	s.run("usermod", "--append", "--groups", "nix-dispatch", "alice")
	s.run("usermod", "--append", "--groups", "nix-dispatch", "bob")
	s.startDaemon()
	dep := shell("dep", "echo dep > $out", "")
	drvs := s.derivations("[" + shell("honest", "cat $dep > $out; echo the log of alice", "dep = "+dep+";") + shell("victim", "echo good > $out", "") + "]")
	honest, victim := drvs[0], drvs[1]
	s.mustBuild("root", dep)

	// A file that a build without a sandbox could have left: a derivation in name,
	// with the victim's outputs and another builder.
	text := s.run("cat", victim)
	forged := strings.Replace(victim, "/nix/store/", "/nix/store/0", 1)
	forged = forged[:len("/nix/store/")+32] + "-victim.drv"
	s.write(forged, strings.Replace(text, "echo good", "echo evil", 1))

	for _, tt := range []struct {
		name, user string
		args       []string
		want       string
	}{
		{"not in the group", "nix", []string{"--drv", honest}, "permission denied"},
		{"a derivation that is not valid", "alice", []string{"--drv", forged}, "ACTION_STOCK derivation " + forged + " is not in the local store"},
		{"another store", "alice", []string{"--drv", honest, "--store", "/home/alice/store"}, "ACTION_STOCK the store at"},
		{"a store elsewhere", "alice", []string{"--drv", honest, "--env", "NIX_STORE_DIR=/home/alice/store"}, "ACTION_STOCK the store at"},
		{"machines", "alice", []string{"--drv", honest, "--builders", "ssh://root@client x86_64-linux"}, "ACTION_STOCK the builders setting is not the list this daemon serves, and the caller may not name machines"},
		{"a path that climbs", "alice", []string{"--drv", "/nix/store/../../etc/shadow.drv"}, "ACTION_STOCK"},
		{"a huge setting", "alice", []string{"--drv", honest, "--huge", "20000000"}, "ResourceExhausted"},
		{"no inputs, though there are some", "alice", []string{"--drv", honest, "--taken"}, "finished: BUILD_STATUS_BUILT"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if said := s.in(t).mallory(tt.user, append([]string{"hook"}, tt.args...)...); !strings.Contains(said, tt.want) {
				t.Errorf("said %q, want %q", said, tt.want)
			}
		})
	}
	s.contents(strings.TrimSpace(s.run("nix-store", "--query", "--outputs", honest)), "dep\n")
	if _, stderr, exit := s.as("alice", "build", forged); exit == 0 || !strings.Contains(stderr, "is not in the local store") {
		t.Errorf("build of what is not valid: exit %d, %q", exit, stderr)
	}
	if n := ran(t, s.machines["mac"], "victim"); n != 0 {
		t.Errorf("the forged derivation was built %d times", n)
	}
	s.logsOfOthers(honest)
	s.listensOnLoopback()
}

// logsOfOthers looks at who may read alice's log.
func (s *site) logsOfOthers(drv string) {
	s.t.Helper()
	s.eventually(time.Minute, "the build is in the history", func() bool {
		stdout, _, _ := s.as("bob", "history")
		return strings.Contains(stdout, drv)
	})
	for user, may := range map[string]bool{"alice": true, "root": true, "bob": false} {
		stdout, stderr, exit := s.as(user, "log", drv)
		if reads := exit == 0 && strings.Contains(stdout, "the log of alice"); reads != may || !may && !strings.Contains(stderr, "another user's") {
			s.t.Errorf("%s reads alice's log: %v (exit %d, %q)", user, reads, exit, stderr)
		}
	}
}

// listensOnLoopback looks at the sockets of the client that accept connections.
func (s *site) listensOnLoopback() {
	s.t.Helper()
	const listening, metricsPort = "0A", "2613" // 9747
	found := false
	for _, line := range strings.Split(s.run("cat", "/proc/net/tcp", "/proc/net/tcp6"), "\n") {
		fields := strings.Fields(line)
		if len(fields) < 4 || fields[3] != listening || !strings.HasSuffix(fields[1], ":"+metricsPort) {
			continue
		}
		found = true
		if fields[1] != "0100007F:"+metricsPort {
			s.t.Errorf("metrics are served at %s", fields[1])
		}
	}
	if !found {
		s.t.Error("metrics are not served")
	}
}

// A tap is a socket that passes on to the daemon's and remembers what went through.
type tap struct {
	mu    sync.Mutex
	bytes bytes.Buffer
}

func (p *tap) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bytes.Write(b)
}

func (p *tap) holds(word string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return bytes.Contains(p.bytes.Bytes(), []byte(word))
}

// tapSocket makes one on the client.
func (s *site) tapSocket(name string) *tap {
	s.t.Helper()
	l, err := net.Listen("unix", s.client.Root()+name)
	if err != nil {
		s.t.Fatal(err)
	}
	p := new(tap)
	var pumps sync.WaitGroup
	pumps.Go(func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("unix", s.client.Root()+socket)
			if err != nil {
				from.Close()
				continue
			}
			for _, pair := range [][2]net.Conn{{from, to}, {to, from}} {
				pumps.Go(func() {
					_, _ = io.Copy(io.MultiWriter(pair[1], p), pair[0]) // until one end closes
					pair[0].Close()
					pair[1].Close()
				})
			}
		}
	})
	s.t.Cleanup(func() {
		l.Close()
		pumps.Wait()
	})
	return p
}

// TestSecretsStayInTheHook builds with access tokens and passwords in Nix's
// settings, all of which Nix gives to every hook.
func TestSecretsStayInTheHook(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: []machineConfig{{name: "mac"}}})
		const token = "ghp_s3cr3tTokenOfTheTest"
		wire := s.tapSocket("/run/tap")
		// What the hook is given goes by a file.
		if err := s.client.WriteFile("/srv/hook", []byte("#!/bin/sh\ntee /srv/settings | "+programs+"/nix-dispatch-hook \"$@\"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		env := []string{"NIX_DISPATCH_SOCKET=/run/tap", "NIX_CONFIG=build-hook = /srv/hook\naccess-tokens = example.org=" + token}
		if err := s.client.RestartNixDaemon(t.Context(), fleet.NixDaemon{Env: env}); err != nil {
			t.Fatal(err)
		}
		s.mustBuild("alice", shell("with-secrets", "echo something to tell; echo > $out", ""))
		s.ranOn("with-secrets", "mac")
		if given := s.run("cat", "/srv/settings"); !strings.Contains(given, token) {
			t.Fatal("Nix gave no token to the hook, so there was nothing to keep")
		}
		if !wire.holds("with-secrets.drv") {
			t.Error("the hook did not ask through the tap")
		}
		if wire.holds(token) {
			t.Error("the token went over the socket")
		}
		if strings.Contains(s.daemon.log.String(), token) {
			t.Error("the token is in the log")
		}
		pid := s.run("pgrep", "-x", "nix-dispatchd")
		if found := s.mallory("root", "memory", pid, token, "ssh://root@mac"); strings.TrimSpace(found) != "ssh://root@mac" {
			t.Errorf("in the daemon's memory there is %q, want its machine only", found)
		}
		if out, err := s.client.Run(t.Context(), "grep", "-r", token, "/var/lib/nix-dispatch"); err == nil {
			t.Errorf("the token is in the state directory: %s", out.Stdout)
		}
	})
}
