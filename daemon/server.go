package daemon

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/scheduler"
)

// maxMessage bounds a request. The largest carries the closure of a build's
// inputs: 100,000 paths of 160 bytes.
const maxMessage = 16 << 20

// window is how much of a stream may be on its way.
const window = 1 << 20

const (
	// helloWait is how long a caller may take for its first words.
	helloWait = 20 * time.Second
	// maxConnectionIdle is how long a connection may be open without a call.
	maxConnectionIdle = 10 * time.Minute
)

// A server answers the gRPC methods: it validates, calls, and translates.
type server struct {
	dispatchv1.UnimplementedDispatchServiceServer
	d *Daemon
}

// gRPC's own pool takes 1 MiB for whatever is larger than 32 KiB, such as most answers
// of Status, and holds it until the caller has read it. The pool can be set for the
// whole program only, before there is a server.
func init() {
	experimental.SetDefaultBufferPool(mem.NewTieredBufferPool(
		256, 4<<10, 16<<10, 32<<10, 64<<10, 128<<10, 256<<10, 512<<10, 1<<20))
}

// newGRPCServer makes the server with its gate and the health service.
func newGRPCServer(d *Daemon, g gate) (*grpc.Server, *health.Server) {
	s := grpc.NewServer(
		grpc.Creds(peerCredentials{}),
		grpc.MaxConcurrentStreams(maxStreams),
		// Who connects and says nothing.
		grpc.ConnectionTimeout(helloWait),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: maxConnectionIdle}),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeader),
		grpc.StatsHandler(arrivals{}),
		// Set windows keep grpc from measuring the link with pings, one for every
		// message of a quiet stream.
		grpc.InitialWindowSize(window),
		grpc.InitialConnWindowSize(window),
		// Hooks look every half minute whether the daemon still answers.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.ChainUnaryInterceptor(g.unary, d.unaryUse, d.statusShare.unary(d.bounds)),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.ChainStreamInterceptor(g.stream, d.streamUse),
	)
	dispatchv1.RegisterDispatchServiceServer(s, &server{d: d})
	h := health.NewServer()
	healthpb.RegisterHealthServer(s, h)
	return s, h
}

// Status reports machines and builds.
func (s *server) Status(_ context.Context, req *dispatchv1.StatusRequest) (*dispatchv1.StatusResponse, error) {
	r := s.d.status(int(req.GetMaxQueued()))
	if req.GetUsers() {
		r.Users, r.UserBounds = s.d.userUsage()
	}
	return r, nil
}

// status is a snapshot of machines and builds, with maxQueued of the builds that
// wait for a machine at most; 0 means all.
func (d *Daemon) status(maxQueued int) *dispatchv1.StatusResponse {
	snapshot, builds := d.dispatcher.snapshot(maxQueued)
	list := d.machines.current()
	r := &dispatchv1.StatusResponse{
		Version: d.opts.Version,
		Started: timestamppb.New(d.started),
		Builds:  builds,
		Errors:  list.badEntries(),
		Reload:  d.reload.status(),
	}
	if fault := d.drainFault.Load(); fault != nil {
		r.Errors = append(r.Errors, &dispatchv1.MachineError{
			File: filepath.Join(d.opts.StateDir, drainedFile), Message: (*fault).Error()})
	}
	for _, j := range d.detached.list() {
		r.Detached = append(r.Detached, j.info())
	}
	for _, system := range snapshot.Queued {
		r.Queued += uint32(system.Queued)           //nolint:gosec // the queue is bounded
		r.Unplaceable += uint32(system.Unplaceable) //nolint:gosec // likewise
	}
	for _, m := range d.machineStatuses(snapshot.Machines) {
		r.Machines = append(r.Machines, m.proto())
	}
	for _, line := range list.others {
		r.Machines = append(r.Machines, &dispatchv1.MachineStatus{
			Uri:    line.StoreURI,
			State:  dispatchv1.MachineState_MACHINE_STATE_UNSUPPORTED,
			Slots:  uint32(line.MaxJobs), //nolint:gosec // the parser bounds it
			Reason: unsupported(line),
		})
	}
	return r
}

// status is the last attempt to read the builders setting anew, for the API.
func (r *reloader) status() *dispatchv1.ReloadStatus {
	r.lastMu.Lock()
	defer r.lastMu.Unlock()
	if r.last == nil {
		return nil
	}
	return &dispatchv1.ReloadStatus{
		Time: timestamppb.New(r.last.at), Success: r.last.success(), Errors: r.last.list.badEntries()}
}

// Machines lists the machines as they were understood.
func (s *server) Machines(context.Context, *dispatchv1.MachinesRequest) (*dispatchv1.MachinesResponse, error) {
	list := s.d.machines.current()
	r := &dispatchv1.MachinesResponse{Errors: list.badEntries()}
	for _, line := range list.lines {
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

// Cancel ends a build for all its followers. It returns once the build has ended, or
// after endedWait.
func (s *server) Cancel(ctx context.Context, req *dispatchv1.CancelRequest) (*dispatchv1.CancelResponse, error) {
	c, _ := callerFrom(ctx)
	j := s.d.detached.find(req.GetBuildId())
	if j != nil {
		if err := s.d.detached.end(j.id, c); err != nil {
			return nil, toStatus(err)
		}
		j.awaitEnd(ctx)
		return &dispatchv1.CancelResponse{}, nil
	}
	b, err := s.d.cancel(scheduler.BuildID(req.GetBuildId()), c)
	if err != nil {
		return nil, toStatus(err)
	}
	b.feed.awaitEnd(ctx)
	return &dispatchv1.CancelResponse{}, nil
}

// Errors of requests, by which toStatus tells the gRPC code.
var (
	errNoSuchBuild = errors.New("no such build is in progress")
	errNotYours    = errors.New("the build is another user's")
	errBadRequest  = errors.New("bad request")
	errNotAllowed  = errors.New("only root and the user that nix-dispatchd runs as may do that")
)

// toStatus is the one place where errors become gRPC codes.
func toStatus(err error) error {
	if _, is := status.FromError(err); is || err == nil {
		return err // of gRPC itself
	}
	code := codes.Internal
	switch {
	case isBound(err):
		code = codes.ResourceExhausted
	case errors.Is(err, errBadRequest), errors.Is(err, errAmbiguous), errors.Is(err, errBadList):
		code = codes.InvalidArgument
	case errors.Is(err, errNoSuchBuild), errors.Is(err, errNoLog), errors.Is(err, errNotInStore), errors.Is(err, errNoSuchMachine):
		code = codes.NotFound
	case errors.Is(err, errNotYours), errors.Is(err, errNotAllowed), errors.Is(err, errMayNotName), errors.Is(err, errMayNotRaise):
		code = codes.PermissionDenied
	case errors.Is(err, errNoHistory), errors.Is(err, errEndedBadly), errors.Is(err, errForeignStore):
		code = codes.FailedPrecondition
	case errors.Is(err, errShutdown), errors.Is(err, errNotRunning):
		code = codes.Unavailable
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	default:
		if _, ok := errors.AsType[*localError](err); ok {
			code = codes.FailedPrecondition
		}
	}
	return status.Error(code, clipped(err.Error()))
}

func isBound(err error) bool {
	_, is := errors.AsType[*usage.BoundError](err)
	return is
}

// maxErrorText bounds the message of an error of a call, in bytes: it may quote
// what was asked for.
const maxErrorText = 16 << 10

func clipped(s string) string {
	if len(s) <= maxErrorText {
		return s
	}
	return strings.ToValidUTF8(s[:maxErrorText], "") + "..."
}
