package main

import (
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestBuildGoesOnWithTheNextDaemon(t *testing.T) {
	var calls atomic.Int32
	d := (&fakeDaemon{build: func(_ *dispatchv1.BuildRequest, s buildStream) error {
		if calls.Add(1) < 3 {
			s.Send(eventOf(helloDrv, placed("ssh://mac", "")))
			return status.Error(codes.Unavailable, "nix-dispatchd is shutting down")
		}
		return s.Send(summary(true, output(helloDrv, "out", helloOut)))
	}}).start(t)
	code, out, errOut := runCommand(t.Context(), d.socket, "build", helloDrv)
	if code != exitOK || out != helloOut+"\n" {
		t.Errorf("exit status %d, output %q, errors %q", code, out, errOut)
	}
	if got := strings.Count(errOut, "waiting for it to come back"); got != 2 {
		t.Errorf("told %d times that the daemon went away, want 2:\n%s", got, errOut)
	}
}

func TestBuildDoesNotOutliveDaemonsThatDieOfIt(t *testing.T) {
	var calls atomic.Int32
	d := (&fakeDaemon{build: func(*dispatchv1.BuildRequest, buildStream) error {
		calls.Add(1)
		return status.Error(codes.Unavailable, "crashed")
	}}).start(t)
	code, _, errOut := runCommand(t.Context(), d.socket, "build", helloDrv)
	if code != exitUnreachable || calls.Load() != maxDaemons {
		t.Errorf("exit status %d after %d calls, want %d after %d: %s", code, calls.Load(), exitUnreachable, maxDaemons, errOut)
	}
}
