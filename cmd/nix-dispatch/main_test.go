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
	// drain is asked by Drain and Undrain.
	drain   func(machine string, drained bool) (string, error)
	reload  *dispatchv1.ReloadResponse
	explain func(*dispatchv1.ExplainRequest) (*dispatchv1.ExplainResponse, error)
	history func(*dispatchv1.HistoryRequest, grpc.ServerStreamingServer[dispatchv1.FinishedBuild]) error
	log     func(*dispatchv1.LogRequest, grpc.ServerStreamingServer[dispatchv1.LogResponse]) error
	ping    func(*dispatchv1.PingRequest, grpc.ServerStreamingServer[dispatchv1.PingResponse]) error

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

func (d *fakeDaemon) Drain(_ context.Context, req *dispatchv1.DrainRequest) (*dispatchv1.DrainResponse, error) {
	uri, err := d.drain(req.GetMachine(), true)
	return &dispatchv1.DrainResponse{Machine: uri, Builds: 2}, err
}

func (d *fakeDaemon) Undrain(_ context.Context, req *dispatchv1.UndrainRequest) (*dispatchv1.UndrainResponse, error) {
	uri, err := d.drain(req.GetMachine(), false)
	return &dispatchv1.UndrainResponse{Machine: uri}, err
}

func (d *fakeDaemon) Reload(context.Context, *dispatchv1.ReloadRequest) (*dispatchv1.ReloadResponse, error) {
	return d.reload, nil
}

func (d *fakeDaemon) Explain(_ context.Context, req *dispatchv1.ExplainRequest) (*dispatchv1.ExplainResponse, error) {
	return d.explain(req)
}

func (d *fakeDaemon) Ping(req *dispatchv1.PingRequest, s grpc.ServerStreamingServer[dispatchv1.PingResponse]) error {
	return d.ping(req, s)
}

func (d *fakeDaemon) History(req *dispatchv1.HistoryRequest, s grpc.ServerStreamingServer[dispatchv1.FinishedBuild]) error {
	return d.history(req, s)
}

func (d *fakeDaemon) Log(req *dispatchv1.LogRequest, s grpc.ServerStreamingServer[dispatchv1.LogResponse]) error {
	return d.log(req, s)
}

// start serves d on a socket until the test ends.
func (d *fakeDaemon) start(t testing.TB) *fakeDaemon {
	t.Helper()
	d.socket, d.server = dispatchtest.Serve(t, d)
	return d
}
