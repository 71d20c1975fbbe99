package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// With these in its environment the test binary is a hook process, as Nix would
// start one.
const (
	asHookEnv       = "NIX_DISPATCH_TEST_AS_HOOK"
	hookPatienceEnv = "NIX_DISPATCH_TEST_PATIENCE"
	hookAnswerEnv   = "NIX_DISPATCH_TEST_ANSWER_TIMEOUT"
)

func TestMain(m *testing.M) {
	if os.Getenv(asHookEnv) != "" {
		os.Exit(hookMain())
	}
	os.Exit(m.Run())
}

func hookMain() int {
	std := stdio{os.Stdin, os.Stdout, os.Stderr}
	patience, err := time.ParseDuration(os.Getenv(hookPatienceEnv))
	if err != nil {
		return runHook(context.Background(), os.Args[1:], std)
	}
	answer, err := time.ParseDuration(os.Getenv(hookAnswerEnv))
	if err != nil {
		answer = time.Second
	}
	return runHookProcess(context.Background(), os.Args[len(os.Args)-1], std,
		hookOptions{socket: socketPath(), answerTimeout: answer, patience: patience})
}

// A fakeDaemon answers calls as a test says.
type fakeDaemon struct {
	dispatchv1.UnimplementedDispatchServiceServer
	hook   func(hookStream) error
	build  func(*dispatchv1.BuildRequest, grpc.ServerStreamingServer[dispatchv1.BuildResponse]) error
	status *dispatchv1.StatusResponse
	cancel func(uint64) error

	socket string
	server *grpc.Server
}

type hookStream = grpc.BidiStreamingServer[dispatchv1.HookRequest, dispatchv1.HookResponse]

func (d *fakeDaemon) Hook(s hookStream) error { return d.hook(s) }

func (d *fakeDaemon) Build(req *dispatchv1.BuildRequest, s grpc.ServerStreamingServer[dispatchv1.BuildResponse]) error {
	return d.build(req, s)
}

func (d *fakeDaemon) Status(context.Context, *dispatchv1.StatusRequest) (*dispatchv1.StatusResponse, error) {
	return d.status, nil
}

func (d *fakeDaemon) Cancel(_ context.Context, req *dispatchv1.CancelRequest) (*dispatchv1.CancelResponse, error) {
	return &dispatchv1.CancelResponse{}, d.cancel(req.BuildId)
}

// start serves d on a socket until the test ends.
func (d *fakeDaemon) start(t testing.TB) *fakeDaemon {
	t.Helper()
	d.socket = filepath.Join(socketDir(t), "socket")
	listener, err := net.Listen("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	d.server = grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage))
	dispatchv1.RegisterDispatchServiceServer(d.server, d)
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.server.Serve(listener) //nolint:errcheck // Stop ends it
	}()
	t.Cleanup(func() {
		d.server.Stop()
		<-done
	})
	return d
}

// socketDir is a directory with a short name: a socket's path has at most 107
// bytes, and t.TempDir holds the test's name.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
