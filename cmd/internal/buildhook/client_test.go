package buildhook

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/proto/hookcall"
)

// TestClientOfADaemon has this process accept a connection as a Nix daemon's does.
func TestClientOfADaemon(t *testing.T) {
	self := &hookcall.Client{UID: uint32(os.Getuid()), UIDKnown: true, PID: uint32(os.Getpid())}
	if got := connectedTo(os.Getpid()); got != nil {
		t.Fatalf("before any connection: %+v", got)
	}
	dir, err := os.MkdirTemp("", "client")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	// Neither the listener nor the client's own end tells of a client.
	if got := connectedTo(os.Getpid()); got != nil {
		t.Errorf("before it is accepted: %+v", got)
	}
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if diff := cmp.Diff(self, clientOf(os.Getpid())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestClientByName has processes be called as those of Nix daemons are.
func TestClientByName(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip(err)
	}
	// sleep takes any of these for a time.
	for _, tt := range []struct {
		argv []string
		want func(pid uint32) *hookcall.Client
	}{
		{[]string{"nix-daemon", "1"}, func(uint32) *hookcall.Client { return &hookcall.Client{UIDKnown: true, PID: 1} }},
		{[]string{"/nix/bin/nix", "1"}, func(uint32) *hookcall.Client { return &hookcall.Client{UIDKnown: true, PID: 1} }},
		{[]string{"nix-daemon", "1d"}, func(pid uint32) *hookcall.Client { return &hookcall.Client{PID: pid} }},
		{[]string{"nix-daemon", "999999999"}, func(pid uint32) *hookcall.Client { return &hookcall.Client{PID: pid} }},
		{[]string{"nix", "infinity"}, func(uint32) *hookcall.Client { return nil }},
		{[]string{"nix-build", "1"}, func(uint32) *hookcall.Client { return nil }},
	} {
		cmd := exec.Command(sleep)
		cmd.Args = append(tt.argv, "300") // they are added up
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(patience); len(arguments(cmd.Process.Pid)) != 4; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%q has not started", tt.argv)
			}
		}
		if diff := cmp.Diff(tt.want(uint32(cmd.Process.Pid)), clientOf(cmd.Process.Pid)); diff != "" {
			t.Errorf("%q (-want +got):\n%s", tt.argv, diff)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

// TestSSHPeer has processes that serve another host, or look like it.
func TestSSHPeer(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	const from = "SSH_CONNECTION=10.0.0.7 40000 10.0.0.1 22"
	for _, tt := range []struct {
		args []string
		env  string
		want string
	}{
		{[]string{"nix-daemon", "--stdio"}, from, "10.0.0.7"},
		{[]string{"nix-store", "--serve", "--write"}, from, "10.0.0.7"},
		{[]string{"nix-daemon", "--stdio"}, "SSH_CONNECTION=::ffff:10.0.0.7 1 ::1 22", "10.0.0.7"},
		{[]string{"nix-daemon", "--stdio"}, "SSH_CONNECTION=fe80::1%eth0 1 ::1 22", "fe80::1"},
		{[]string{"nix-daemon", "--stdio"}, "SSH_CONNECTION=somewhere", ""},
		{[]string{"nix-daemon", "--stdio"}, "OTHER=1", ""},
		{[]string{"nix-build", "x.nix"}, from, ""}, // somebody is logged in
	} {
		cmd := exec.Command(sh, append([]string{"-c", "echo; read x"}, tt.args...)...)
		cmd.Env = []string{"A=1", tt.env}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil { // it has started
			t.Fatal(err)
		}
		if got := sshPeer(cmd.Process.Pid); got != tt.want {
			t.Errorf("%q with %s: %q, want %q", tt.args, tt.env, got, tt.want)
		}
		_ = in.Close()
		_ = cmd.Wait() // it reads nothing
	}
}
