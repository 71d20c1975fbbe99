package main

import (
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// silent listens and accepts connections without ever saying a word.
func silent(t testing.TB) (socket string, connections *atomic.Int32) {
	socket = filepath.Join(socketDir(t), "socket")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	connections = new(atomic.Int32)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			defer conn.Close()
		}
	}()
	t.Cleanup(func() { listener.Close(); <-done })
	return socket, connections
}

func TestHookWithoutADaemonLeavesLocalBuildsToNix(t *testing.T) {
	hung, connections := silent(t)
	for name, socket := range map[string]string{"missing": "/nonexistent/socket", "hung": hung} {
		t.Run(name, func(t *testing.T) {
			n := newFakeNix(t, testSettings(), socketEnv+"="+socket, hookPatienceEnv+"=1h", hookAnswerEnv+"=300ms")
			for _, system := range []string{testSystem, "i686-linux", "builtin", testSystem} {
				if got, _ := n.try(system, false, "kvm"); got != "decline" {
					t.Errorf("%s: reply = %q, want decline", system, got)
				}
			}
			if said := n.said(1); strings.Count(said, "out of reach") != 1 {
				t.Errorf("said %q, want one warning", said)
			}
			for _, system := range []string{"riscv64-linux", "aarch64-linux"} {
				if got, _ := n.try(system, false); got != "postpone" {
					t.Errorf("%s: reply = %q, want postpone", system, got)
				}
			}
			if got, _ := n.try(testSystem, true, "nixos-test"); got != "postpone" {
				t.Errorf("with a feature missing here: reply = %q, want postpone", got)
			}
			n.stdin.Close()
			if status := n.wait(); status != 0 {
				t.Errorf("exit status = %d", status)
			}
		})
	}
	if got := connections.Load(); got != 1 {
		t.Errorf("the hung daemon was asked %d times, want once", got)
	}
}

func TestHookAnswersWithinASecondWithoutADaemon(t *testing.T) {
	hung, _ := silent(t)
	n := newFakeNix(t, testSettings(), socketEnv+"="+hung)
	start := time.Now()
	if got, _ := n.try(testSystem, false); got != "decline" {
		t.Errorf("reply = %q, want decline", got)
	}
	// Far from the bound: the machine may be busy.
	if took := time.Since(start); took < 900*time.Millisecond || took > 10*time.Second {
		t.Errorf("the answer took %v, want about 1s", took)
	}
}

func TestHookPostponesWhileTheDaemonRestarts(t *testing.T) {
	d := (&fakeDaemon{hook: func(s hookStream) error {
		s.Recv()
		return status.Error(codes.Unavailable, "shutting down")
	}}).start(t)
	n := newFakeNix(t, testSettings(), socketEnv+"="+d.socket)
	for range 2 {
		if got, _ := n.try(testSystem, true); got != "postpone" {
			t.Errorf("reply = %q, want postpone", got)
		}
	}
	if said := n.said(1); strings.Count(said, "restarting: shutting down") != 1 {
		t.Errorf("said %q, want one warning", said)
	}
}

func TestHookAsksARestartedDaemonAnew(t *testing.T) {
	var calls atomic.Int32
	d := (&fakeDaemon{hook: func(s hookStream) error {
		calls.Add(1)
		for range 2 { // Hello and one Try
			if _, err := s.Recv(); err != nil {
				return err
			}
		}
		s.Send(replyWith(dispatchv1.Reply_ACTION_DECLINE, "", false))
		return status.Error(codes.Unavailable, "shutting down")
	}}).start(t)
	n := newFakeNix(t, testSettings(), socketEnv+"="+d.socket)
	for range 3 {
		if got, _ := n.try(testSystem, true); got != "decline" {
			t.Errorf("reply = %q, want that of the daemon's next life", got)
		}
	}
	if got := calls.Load(); got != 3 {
		t.Errorf("%d calls, want 3", got)
	}
}
