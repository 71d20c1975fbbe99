package main

import (
	"context"
	"testing"

	"google.golang.org/grpc"

	"nixdispatch/proto/dispatch/dispatchtest"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A fakeDaemon answers calls as a test says.
type fakeDaemon struct {
	dispatchv1.UnimplementedDispatchServiceServer
	build  func(*dispatchv1.BuildRequest, grpc.ServerStreamingServer[dispatchv1.BuildResponse]) error
	status *dispatchv1.StatusResponse
	cancel func(uint64) error

	socket string
	server *grpc.Server
}

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
	d.socket, d.server = dispatchtest.Serve(t, d)
	return d
}
