package main

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"nixdispatch/proto/dispatch/dispatchtest"
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

// A noticing writer calls notice when something is written.
type noticing struct {
	strings.Builder
	notice func()
}

func (w *noticing) Write(p []byte) (int, error) {
	w.notice()
	return w.Builder.Write(p)
}

// TestBuildWaitsForADaemon begins while the daemon is killed: its socket is there.
func TestBuildWaitsForADaemon(t *testing.T) {
	t.Parallel()
	d := (&fakeDaemon{build: func(_ *dispatchv1.BuildRequest, s buildStream) error {
		return s.Send(summary(true, output(helloDrv, "out", helloOut)))
	}}).start(t)
	socket := filepath.Join(dispatchtest.SocketDir(t), "socket")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	var out strings.Builder
	var comesBack sync.Once
	errOut := &noticing{notice: func() {
		comesBack.Do(func() {
			if err := errors.Join(os.Remove(socket), os.Symlink(d.socket, socket)); err != nil {
				t.Error(err)
			}
		})
	}}
	args := []string{"nix-dispatch", "build", "--socket", socket, helloDrv}
	code := run(t.Context(), args, stdio{in: strings.NewReader(""), out: &out, err: errOut})
	if code != exitOK || out.String() != helloOut+"\n" || strings.Count(errOut.String(), "waiting for it to come back") != 1 {
		t.Errorf("exit status %d, output %q, errors %q", code, out.String(), errOut.String())
	}
}

func TestBuildDoesNotWaitWhereNoDaemonWas(t *testing.T) {
	t.Parallel()
	code, _, errOut := runCommand(t.Context(), filepath.Join(t.TempDir(), "socket"), "build", helloDrv)
	if code != exitUnreachable || strings.Contains(errOut, "waiting") {
		t.Errorf("exit status %d, errors %q", code, errOut)
	}
}
