package daemon

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// The bounds of what one user may have in progress, far above what anyone needs. They
// are for callers who do not command the daemon, but for builds, pings, detached builds
// and logs, which are everybody's. Goroutines have no bound of their own: each belongs to
// a connection, a call or a build.
const (
	// maxUserConnections is less where the process may open few files; see newConnLimit.
	maxUserConnections = 256
	maxUserCalls       = 1024
	maxUserStreams     = 512
	// maxUserRequests is two of the largest requests of a user.
	maxUserRequests = 2 * maxUserArriving
	// maxUserDerivations bounds the texts of derivations that Build calls have read, for as
	// long as they go on: 50,000 of Nixpkgs' and more.
	maxUserDerivations = 256 << 20
	// maxUserBuilds bounds the derivations that Build calls have in progress; the others
	// of their graphs wait.
	maxUserBuilds = 10_000
	// maxPings bounds how many machines are pinged at once; others wait.
	maxPings = 4
	// maxUserLogs bounds the logs on disk of builds in progress. What they print beyond
	// that is dropped.
	maxUserLogs = 4 << 30
)

func newUsage(files int64) *usage.Ledger {
	return usage.New(usage.Amounts{
		usage.Connections:     min(files/8, maxUserConnections),
		usage.Calls:           maxUserCalls,
		usage.Streams:         maxUserStreams,
		usage.RequestBytes:    maxUserRequests,
		usage.ArrivingBytes:   maxUserArriving,
		usage.Builds:          maxUserBuilds,
		usage.Pings:           maxPings,
		usage.DetachedBuilds:  maxDetached,
		usage.DetachedBytes:   maxDetachedSizes,
		usage.DerivationBytes: maxUserDerivations,
		usage.LogBytes:        maxUserLogs,
	})
}

// user names the caller to the ledger.
func (c caller) user() usage.User { return usage.User{UID: c.uid} }

// user names the origin to the ledger.
func (o origin) user() usage.User { return usage.User{UID: o.uid, Process: o.process} }

// take counts what a caller has in progress. Those who command the daemon have no bounds:
// they are root, and nix-daemon's hooks, which come for all users of the host.
func (d *Daemon) take(c caller, r usage.Resource, n int64) (*usage.Use, error) {
	if !d.bounds(c) {
		return d.usage.Count(c.user(), r, n), nil
	}
	return d.usage.Take(c.user(), r, n)
}

// bounds tells whether the caller has bounds of connections, calls and requests.
func (d *Daemon) bounds(c caller) bool { return !c.commands() || d.bounded }

// A callUse is what a call counts for, from its beginning until its handler has returned.
type callUse struct {
	d                   *Daemon
	caller              caller
	call, stream, bytes *usage.Use
}

// beginCall counts a call. The caller must release it.
func (d *Daemon) beginCall(ctx context.Context, streams bool) (*callUse, error) {
	c, _ := callerFrom(ctx)
	u := &callUse{d: d, caller: c}
	var err error
	if u.call, err = d.take(c, usage.Calls, 1); err == nil && streams {
		u.stream, err = d.take(c, usage.Streams, 1)
	}
	if err != nil {
		u.release()
		return nil, toStatus(err)
	}
	u.bytes = d.usage.Count(c.user(), usage.RequestBytes, 0)
	return u, nil
}

// received counts a message of the call.
func (u *callUse) received(m any) error {
	message, ok := m.(proto.Message)
	if !ok {
		return nil
	}
	n := int64(proto.Size(message))
	if u.bytes.Grow(n, u.d.bounds(u.caller)) {
		return nil
	}
	return toStatus(&usage.BoundError{Resource: usage.RequestBytes, Bound: u.d.usage.Bounds()[usage.RequestBytes]})
}

// serves counts the call as a hook that nix-daemon runs for a user: beside their own
// calls, for they have no say in how many there are.
func (u *callUse) serves(o origin) {
	if u.d.bounds(u.caller) {
		return
	}
	u.call.Move(o.user(), usage.Hooks)
	u.stream.Release()
	u.bytes.Move(o.user(), usage.HookBytes)
}

func (u *callUse) release() {
	u.call.Release()
	u.stream.Release()
	u.bytes.Release()
}

// unaryUse counts calls of one request and one answer.
func (d *Daemon) unaryUse(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	u, err := d.beginCall(ctx, false)
	if err != nil {
		return nil, err
	}
	defer u.release()
	if err := u.received(req); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

// streamUse counts all others.
func (d *Daemon) streamUse(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	u, err := d.beginCall(ss.Context(), true)
	if err != nil {
		return err
	}
	defer u.release()
	return next(srv, &countedStream{ss, context.WithValue(ss.Context(), callUseKey{}, u), u})
}

type callUseKey struct{}

// callUseFrom is what the stream that ctx belongs to counts for; nil if nothing does.
func callUseFrom(ctx context.Context) *callUse {
	u, _ := ctx.Value(callUseKey{}).(*callUse)
	return u
}

// A countedStream counts what it brings.
type countedStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // a stream has one
	use *callUse
}

func (s *countedStream) Context() context.Context { return s.ctx }

func (s *countedStream) RecvMsg(m any) error {
	if err := s.ServerStream.RecvMsg(m); err != nil {
		return err
	}
	return s.use.received(m)
}

// A derivationReader reads derivations for a caller, as many as one user may have.
type derivationReader struct {
	d      *Daemon
	store  *localStore
	caller caller
	use    *usage.Use // whoever made the reader releases it when the derivations are gone
}

func (d *Daemon) derivationReader(s *localStore, c caller) *derivationReader {
	return &derivationReader{d: d, store: s, caller: c, use: d.usage.Count(c.user(), usage.DerivationBytes, 0)}
}

func (r *derivationReader) read(p nix.StorePath) (*nix.Derivation, error) {
	return r.store.derivationWithin(p, func(n int) error {
		if r.use.Grow(int64(n), r.d.bounds(r.caller)) {
			return nil
		}
		return &usage.BoundError{Resource: usage.DerivationBytes, Bound: r.d.usage.Bounds()[usage.DerivationBytes]}
	})
}

// userUsage is what all users have in progress, and the bounds of one, for Status.
func (d *Daemon) userUsage() (users []*dispatchv1.UserUsage, bounds *dispatchv1.UserUsage) {
	for _, u := range d.usage.Users() {
		o := origin{uid: u.User.UID, process: u.User.Process}
		users = append(users, usageProto(o.String(), u.Used))
	}
	return users, usageProto("", d.usage.Bounds())
}

func usageProto(user string, a usage.Amounts) *dispatchv1.UserUsage {
	return &dispatchv1.UserUsage{
		User:          user,
		Connections:   uint64(a[usage.Connections]), //nolint:gosec // a count
		Calls:         uint64(a[usage.Calls]),       //nolint:gosec // likewise, to the end
		Streams:       uint64(a[usage.Streams]),
		RequestBytes:  uint64(a[usage.RequestBytes] + a[usage.ArrivingBytes]),
		Hooks:         uint64(a[usage.Hooks]),
		HookBytes:     uint64(a[usage.HookBytes]),
		Builds:        uint64(a[usage.Builds]),
		Pings:         uint64(a[usage.Pings]),
		Detached:      uint64(a[usage.DetachedBuilds]),
		DetachedBytes: uint64(a[usage.DetachedBytes]),
		LogBytes:      uint64(a[usage.LogBytes]),

		DerivationBytes: uint64(a[usage.DerivationBytes]),
	}
}
