package integration

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"nixdispatch/deploy/fleet"
)

const socket = "/run/nix-dispatch/socket"

// as runs nix-dispatch on the client as a user.
func (s *site) as(user string, args ...string) (stdout, stderr string, exit int) {
	out, err := s.client.RunAs(s.t.Context(), user, append([]string{programs + "/nix-dispatch"}, args...)...)
	return out.Stdout, out.Stderr, exitCode(err)
}

// run runs a command on the client as root.
func (s *site) run(argv ...string) string {
	s.t.Helper()
	out, err := s.client.Run(s.t.Context(), argv...)
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(out.Stdout)
}

// Root and the group nix-dispatch may use the daemon, others not.
func TestWhoMayUseTheDaemon(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{{name: "mac"}}})
	t.Run("without the group", func(t *testing.T) {
		s := s.within(t)
		if got := s.run("stat", "-c", "%a %U %G", socket); got != "660 root root" {
			t.Errorf("the socket is %s, want 660 root root", got)
		}
		s.refused("alice")
	})
	s.stopDaemon(syscall.SIGTERM)
	s.run("groupadd", "--system", "nix-dispatch")
	s.run("usermod", "--append", "--groups", "nix-dispatch", "alice")
	s.run("usermod", "--append", "--groups", "nix-dispatch", "bob")
	s.startDaemon()
	drv := s.derivations("[" + shell("quick", "echo quick > $out", "") + shell("slow", "sleep 600; echo > $out", "") + "]")
	t.Run("a member of the group", func(t *testing.T) {
		s := s.within(t)
		if got := s.run("stat", "-c", "%a %U %G", socket); got != "660 root nix-dispatch" {
			t.Errorf("the socket is %s, want 660 root nix-dispatch", got)
		}
		out, stderr, exit := s.as("alice", "build", drv[0])
		if exit != 0 {
			t.Fatalf("build: exit %d\n%s", exit, stderr)
		}
		s.contents(strings.TrimSpace(out), "quick\n")
	})
	t.Run("not a member of the group", func(t *testing.T) { s.within(t).refused("nix") })
	t.Run("whoever gets past the socket's mode", func(t *testing.T) {
		s := s.within(t)
		s.run("chmod", "666", socket)
		defer s.run("chmod", "660", socket)
		_, stderr, exit := s.as("nix", "status")
		if exit == 0 || !strings.Contains(stderr, "uid 1003 may not use nix-dispatch") || !strings.Contains(stderr, `group "nix-dispatch"`) {
			t.Errorf("status: exit %d, %q", exit, stderr)
		}
		_, stderr, exit = s.as("nix", "build", drv[0])
		if exit == 0 || !strings.Contains(stderr, "may not use nix-dispatch") {
			t.Errorf("build: exit %d, %q", exit, stderr)
		}
	})
	t.Run("another's build is not to be cancelled", func(t *testing.T) { s.within(t).cancels(drv[1]) })
	t.Run("health service", func(t *testing.T) { s.within(t).healthy() })
}

// refused checks that a user outside the group is turned away with a reason, and
// that plain Nix still builds for that user.
func (s *site) refused(user string) {
	t := s.t
	t.Helper()
	_, stderr, exit := s.as(user, "status")
	if exit == 0 || !strings.Contains(stderr, "permission denied\nOnly root and the members of the group nix-dispatch may use it") {
		t.Errorf("status as %s: exit %d, %q, want permission denied", user, exit, stderr)
	}
	out, err := s.nixBuild(user, shell("plain-"+user, "echo plain > $out", ""))
	s.built(out, err, "plain\n")
}

// cancels checks who may cancel alice's build.
func (s *site) cancels(drv string) {
	t := s.t
	cmd := s.client.Command(t.Context(), "alice", programs+"/nix-dispatch", "build", drv)
	var stderr syncBuffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var id string
	s.eventually(time.Minute, "the build is running", func() bool {
		for _, b := range s.status().Builds {
			if b.DrvPath == drv && b.Phase == "building" {
				id = b.ID.String()
			}
		}
		return id != ""
	})
	_, said, exit := s.as("bob", "cancel", id)
	if exit == 0 || !strings.Contains(said, "another user's") {
		t.Errorf("bob cancels alice's build: exit %d, %q", exit, said)
	}
	if n, err := strconv.Atoi(id); err == nil {
		_, said, exit = s.as("alice", "cancel", strconv.Itoa(n+1000))
		if exit == 0 || !strings.Contains(said, "no such build") {
			t.Errorf("cancel of a build that is not there: exit %d, %q", exit, said)
		}
	}
	if _, said, exit = s.as("alice", "cancel", id); exit != 0 {
		t.Errorf("alice cancels her build: exit %d, %q", exit, said)
	}
	if code := exitCode(cmd.Wait()); code != 1 || !strings.Contains(stderr.String(), "cancelled") {
		t.Errorf("the build ended with %d and %q, want 1 and that it was cancelled", code, stderr.String())
	}
	s.idle(time.Minute)
	s.eventually(time.Minute, "nothing of it runs on the machine", func() bool {
		processes, err := s.machines["mac"].Processes()
		if err != nil {
			t.Fatal(err)
		}
		return !strings.Contains(fmt.Sprint(processes), "sleep 600")
	})
}

// healthy asks the standard health service.
func (s *site) healthy() {
	t := s.t
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.client.Root()+socket)
	}
	cc, err := grpc.NewClient("passthrough:///nix-dispatchd", grpc.WithContextDialer(dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	answer, err := healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil || answer.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v, want SERVING", answer, err)
	}
}

// TestGroupsOfTheProcess has processes call whose groups are not those of a user in
// /etc/group: a service with DynamicUser and SupplementaryGroups, a member by LDAP, and
// a member's process that has given its groups up.
func TestGroupsOfTheProcess(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{{name: "mac"}}})
	s.stopDaemon(syscall.SIGTERM)
	s.run("groupadd", "--system", "nix-dispatch")
	s.run("groupadd", "--system", "naming")
	s.run("usermod", "--append", "--groups", "nix-dispatch,naming", "alice")
	s.args = append(s.args, "--machines-group", "naming")
	s.startDaemon()
	s.run("chmod", "666", socket) // so that it is the daemon that decides
	gid := func(name string) string { return strings.Split(s.run("getent", "group", name), ":")[2] }
	members, naming := gid("nix-dispatch"), gid("naming")
	alice := s.run("id", "-u", "alice")
	drv := s.derivations("[" + shell("thing", "echo thing > $out", "") + "]")[0]
	for _, tt := range []struct {
		name       string
		setpriv    []string
		may, names bool
	}{
		{"a number without a name, in the group", []string{"--reuid", "4711", "--regid", "4711", "--groups", members}, true, false},
		{"with it as its own group", []string{"--reuid", "4711", "--regid", members, "--clear-groups"}, true, false},
		{"in both groups", []string{"--reuid", "4711", "--regid", "4711", "--groups", "7," + members + "," + naming}, true, true},
		{"in other groups", []string{"--reuid", "4711", "--regid", "4711", "--groups", "4712,4713"}, false, false},
		{"a member's process without the groups", []string{"--reuid", alice, "--regid", "4711", "--clear-groups"}, false, false},
		{"a user who is no member", []string{"--reuid", "nix", "--regid", "nix", "--init-groups"}, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			as := func(args ...string) (fleet.Output, error) {
				return s.client.Run(t.Context(), append(append([]string{"setpriv"}, tt.setpriv...), args...)...)
			}
			out, err := as(programs+"/nix-dispatch", "status")
			if (err == nil) != tt.may || !tt.may && !strings.Contains(out.Stderr, "may not use nix-dispatch") {
				t.Errorf("status: %v, %q, want it allowed: %v", err, out.Stderr, tt.may)
			}
			out, _ = as(programs+"/mallory", "hook", "--drv", drv, "--builders", "ssh://root@mac x86_64-linux - 3")
			if said := out.Stdout + out.Stderr; tt.may && strings.Contains(said, "may not name machines") == tt.names ||
				tt.names && !strings.Contains(said, "ACTION_ACCEPT") {
				t.Errorf("names a machine: %q, want it allowed: %v", said, tt.names)
			}
		})
	}
}
