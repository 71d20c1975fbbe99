package daemon

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/scheduler"
)

// maxMessage bounds a request. The largest carries the closure of a build's
// inputs: 100,000 paths of 160 bytes.
const maxMessage = 16 << 20

// window is how much of a stream may be on its way.
const window = 1 << 20

// A server answers the gRPC methods: it validates, calls, and translates.
type server struct {
	dispatchv1.UnimplementedDispatchServiceServer
	d *Daemon
}

// newGRPCServer makes the server with its gate and the health service.
func newGRPCServer(d *Daemon, g gate) (*grpc.Server, *health.Server) {
	s := grpc.NewServer(
		grpc.Creds(peerCredentials{}),
		grpc.MaxRecvMsgSize(maxMessage),
		// Set windows keep grpc from measuring the link with pings, one for every
		// message of a quiet stream.
		grpc.InitialWindowSize(window),
		grpc.InitialConnWindowSize(window),
		// Hooks look every half minute whether the daemon still answers.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(g.unary),
		grpc.StreamInterceptor(g.stream),
	)
	dispatchv1.RegisterDispatchServiceServer(s, &server{d: d})
	h := health.NewServer()
	healthpb.RegisterHealthServer(s, h)
	return s, h
}

// Status reports machines and builds.
func (s *server) Status(context.Context, *dispatchv1.StatusRequest) (*dispatchv1.StatusResponse, error) {
	snapshot, builds := s.d.dispatcher.snapshot()
	r := &dispatchv1.StatusResponse{
		Version: s.d.opts.Version,
		Started: timestamppb.New(s.d.started),
		Builds:  builds,
		Errors:  s.d.machines.badEntries(),
	}
	for _, m := range snapshot.Machines {
		r.Machines = append(r.Machines, s.machineStatus(m))
	}
	for _, line := range s.d.machines.others {
		r.Machines = append(r.Machines, &dispatchv1.MachineStatus{
			Uri:    line.StoreURI,
			State:  dispatchv1.MachineState_MACHINE_STATE_UNSUPPORTED,
			Slots:  uint32(line.MaxJobs), //nolint:gosec // the parser bounds it
			Reason: unsupported(line),
		})
	}
	return r, nil
}

var machineStates = map[scheduler.MachineState]dispatchv1.MachineState{
	scheduler.Connecting: dispatchv1.MachineState_MACHINE_STATE_CONNECTING,
	scheduler.Up:         dispatchv1.MachineState_MACHINE_STATE_UP,
	scheduler.Down:       dispatchv1.MachineState_MACHINE_STATE_DOWN,
	scheduler.Draining:   dispatchv1.MachineState_MACHINE_STATE_DRAINING,
}

func (s *server) machineStatus(m scheduler.MachineStatus) *dispatchv1.MachineStatus {
	out := &dispatchv1.MachineStatus{
		Uri:     string(m.ID),
		State:   machineStates[m.State],
		Slots:   uint32(m.Slots),              //nolint:gosec // the parser bounds it
		Running: uint32(m.Running + m.Held),   //nolint:gosec // at most slots
		Staging: uint32(m.Placed - m.Running), //nolint:gosec // bounded by the scheduler
		Reason:  m.Reason,
	}
	if machine := s.d.machines.get(m.ID); machine != nil {
		ssh := machine.host.Status()
		out.Since = timestamppb.New(ssh.Since)
		out.Connections = uint32(ssh.Connections) //nolint:gosec // a handful
	}
	return out
}

// Machines lists the machines as they were understood.
func (s *server) Machines(context.Context, *dispatchv1.MachinesRequest) (*dispatchv1.MachinesResponse, error) {
	r := &dispatchv1.MachinesResponse{Errors: s.d.machines.badEntries()}
	for _, line := range s.d.machines.lines {
		r.Machines = append(r.Machines, &dispatchv1.Machine{
			StoreUri:          line.StoreURI,
			Systems:           line.SystemTypes,
			SshKey:            line.SSHKey,
			MaxJobs:           uint32(line.MaxJobs), //nolint:gosec // the parser bounds it
			SpeedFactor:       line.SpeedFactor,
			SupportedFeatures: line.SupportedFeatures,
			MandatoryFeatures: line.MandatoryFeatures,
			SshPublicHostKey:  line.SSHPublicHostKey,
		})
	}
	return r, nil
}

// Cancel ends a build for all its followers.
func (s *server) Cancel(ctx context.Context, req *dispatchv1.CancelRequest) (*dispatchv1.CancelResponse, error) {
	c, _ := callerFrom(ctx)
	err := s.d.cancel(scheduler.BuildID(req.GetBuildId()), c)
	if err != nil {
		return nil, toStatus(err)
	}
	return &dispatchv1.CancelResponse{}, nil
}

// Errors of requests, by which toStatus tells the gRPC code.
var (
	errNoSuchBuild = errors.New("no such build is in progress")
	errNotYours    = errors.New("the build is another user's")
	errBadRequest  = errors.New("bad request")
)

// toStatus is the one place where errors become gRPC codes.
func toStatus(err error) error {
	code := codes.Internal
	switch {
	case errors.Is(err, errBadRequest):
		code = codes.InvalidArgument
	case errors.Is(err, errNoSuchBuild), errors.Is(err, errNotInStore):
		code = codes.NotFound
	case errors.Is(err, errNotYours):
		code = codes.PermissionDenied
	case errors.Is(err, errShutdown):
		code = codes.Unavailable
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	default:
		if _, ok := errors.AsType[*localError](err); ok {
			code = codes.FailedPrecondition
		}
	}
	return status.Error(code, err.Error())
}
