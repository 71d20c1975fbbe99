package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"nixdispatch/cmd/internal/pingtext"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// pinged is a daemon with three machines: one that is well, one that is not
// trusted, one that is down.
func pinged(t *testing.T) *fakeDaemon {
	step := func(name, detail string) *dispatchv1.PingResponse {
		return &dispatchv1.PingResponse{Step: name, Verdict: dispatchv1.PingVerdict_PING_VERDICT_OK, Took: durationpb.New(1500 * time.Microsecond), Detail: detail}
	}
	return (&fakeDaemon{ping: func(req *dispatchv1.PingRequest, s grpc.ServerStreamingServer[dispatchv1.PingResponse]) error {
		switch req.GetMachine() {
		case "mac":
			s.Send(step("connect", "10.0.0.7:22\x1b[2J"))
			return s.Send(step("protocol", fmt.Sprint("within ", req.GetTimeout().AsDuration())))
		case "distrust":
			return s.Send(&dispatchv1.PingResponse{Step: "trust", Verdict: dispatchv1.PingVerdict_PING_VERDICT_WARNING, Cause: "user not trusted", Detail: "no"})
		case "ssh://down":
			s.Send(step("ssh config", "x"))
			return s.Send(&dispatchv1.PingResponse{Step: "connect", Verdict: dispatchv1.PingVerdict_PING_VERDICT_FAILED,
				Cause: "timeout", Detail: "no answer\nwithin 3s", Fix: "switch it on"})
		case "ambiguous":
			return status.Error(codes.InvalidArgument, "several machines have that name")
		}
		return status.Error(codes.NotFound, "no such machine")
	}}).start(t)
}

// prober puts a stand-in for nix-dispatchd into PATH.
func prober(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "nix-dispatchd"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestPingOfMachinesOfTheDaemon(t *testing.T) {
	prober(t, "exit 99")
	d := pinged(t)
	code, stdout, stderr := runCommand(t.Context(), d.socket, "ping", "--timeout", "3s", "ssh://down", "mac", "distrust", "nobody")
	want := `ssh://down, asked by nix-dispatchd
  ssh config      1.5 ms  x
  connect         0.0 ms  FAILED: timeout: no answer within 3s; switch it on
ssh://down: failed at "connect": timeout
mac, asked by nix-dispatchd
  connect         1.5 ms  10.0.0.7:22
  protocol        1.5 ms  within 3s
mac: ok in 3.0 ms
distrust, asked by nix-dispatchd
  trust           0.0 ms  WARNING: user not trusted: no
distrust: ok in 0.0 ms, warnings: 1
`
	if diff := cmp.Diff(want, stdout); diff != "" {
		t.Errorf("printed (-want +got):\n%s", diff)
	}
	if code != exitFailed || stderr != "nix-dispatch ping: nobody: no such machine\n" {
		t.Errorf("status %d, said %q", code, stderr)
	}
	for args, want := range map[string]int{"mac distrust": exitOK, "ssh://down": exitFailed, "ambiguous": exitUsage, "": exitUsage, "--timeout -1s mac": exitUsage} {
		if code, _, _ := runCommand(t.Context(), d.socket, append([]string{"ping"}, strings.Fields(args)...)...); code != want {
			t.Errorf("ping %s: status %d, want %d", args, code, want)
		}
	}
}

func TestPingInJSON(t *testing.T) {
	d := pinged(t)
	code, stdout, _ := runCommand(t.Context(), d.socket, "ping", "--json", "ssh://down", "nobody")
	var got []pingtext.Report
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || code != exitFailed {
		t.Fatalf("status %d, printed %q: %v", code, stdout, err)
	}
	want := []pingtext.Report{
		{Machine: "ssh://down", By: "daemon", Steps: []pingtext.Step{
			{Name: "ssh config", Verdict: "ok", Milliseconds: 1.5, Detail: "x"},
			{Name: "connect", Verdict: "failed", Detail: "no answer\nwithin 3s", Cause: "timeout", Fix: "switch it on"},
		}},
		{Machine: "nobody", By: "daemon", Steps: []pingtext.Step{}, Error: "no such machine"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A store URI that is not the daemon's is tried by a process of the caller's, and
// so are all where there is no daemon.
func TestPingOfOtherURIs(t *testing.T) {
	args := filepath.Join(t.TempDir(), "args")
	prober(t, `echo "$@" >>`+args+`
case $* in
*refused*) echo '{"step":"connect","verdict":"failed","ms":2,"detail":"d","cause":"connection refused","fix":"start sshd"}'; exit 1;;
*odd*) echo 'nix-dispatchd probe: it is odd' >&2; exit 2;;
*garbage*) echo 'hello'; exit 1;;
*killed*) kill -9 $$;;
*) echo '{"step":"connect","verdict":"ok","ms":2,"detail":"d"}';;
esac`)
	d := pinged(t)
	nobody := filepath.Join(t.TempDir(), "socket")
	for _, tt := range []struct {
		socket, uri string
		code        int
		stdout, err string
	}{
		{d.socket, "ssh://other?ssh-key=/k", exitOK, "ok in 2.0 ms\n", ""},
		{nobody, "ssh://down", exitOK, "ok in 2.0 ms\n", ""},
		{d.socket, "ssh://refused", exitFailed, "connection refused: d; start sshd\n", ""},
		{d.socket, "odd://x", exitUsage, "", "it is odd\n"},
		{d.socket, "ssh://garbage", exitFailed, "", "read the steps"},
		{d.socket, "ssh://killed", exitFailed, "", "killed"},
		{nobody, "mac", exitUnreachable, "", "out of reach: dial unix"},
	} {
		code, stdout, stderr := runCommand(t.Context(), tt.socket, "ping", "--timeout", "2s", tt.uri)
		if code != tt.code || !strings.Contains(stdout, tt.stdout) || !strings.Contains(stderr, tt.err) {
			t.Errorf("ping %s: status %d, printed %q, said %q; want %d, %q, %q", tt.uri, code, stdout, stderr, tt.code, tt.stdout, tt.err)
		}
	}
	got, err := os.ReadFile(args)
	if want := "probe --json --timeout 2s -- ssh://other?ssh-key=/k\n"; err != nil || !strings.HasPrefix(string(got), want) {
		t.Errorf("run with %q (%v), want %q first", got, err, want)
	}
}

func TestPingWithoutAProgramForIt(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	code, _, stderr := runCommand(t.Context(), filepath.Join(t.TempDir(), "socket"), "ping", "ssh://x")
	if code != exitFailed || !strings.Contains(stderr, "nix-dispatchd, which tries machines") {
		t.Errorf("status %d, said %q", code, stderr)
	}
}
