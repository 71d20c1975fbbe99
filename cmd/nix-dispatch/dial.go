package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

const (
	// maxMessage bounds one message from the daemon: the plan of the largest
	// graph of derivations, some hundred thousand paths, is below it.
	maxMessage = 64 << 20
	// window is how much of a stream may be on its way.
	window = 1 << 20
	// connectTimeout is how long a person waits for a daemon that does not answer.
	connectTimeout = 5 * time.Second
)

// A daemonConn is a connection to nix-dispatchd.
type daemonConn struct {
	dispatchv1.DispatchServiceClient
	socket string
	cc     *grpc.ClientConn
	// dialErr is why the socket could not be connected to, nil once it could.
	dialErr atomic.Pointer[error]
	// connected tells whether the socket was ever connected to.
	connected atomic.Bool
}

// dial makes a connection that connects when it is first used. The caller must
// Close it. It does nothing that takes time, for a hook process is started for
// every build.
func dial(socket string) (*daemonConn, error) {
	d := &daemonConn{socket: socket}
	cc, err := grpc.NewClient("passthrough:///nix-dispatchd",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(d.connect),
		grpc.WithAuthority("localhost"),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDisableRetry(),
		grpc.WithDisableHealthCheck(),
		// A daemon that is stopped must not keep its callers for ever.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 30 * time.Second}),
		// Set windows keep grpc from measuring the link with pings, one for every
		// message of a quiet stream.
		grpc.WithInitialWindowSize(window),
		grpc.WithInitialConnWindowSize(window),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	)
	if err != nil {
		return nil, err
	}
	d.cc = cc
	d.DispatchServiceClient = dispatchv1.NewDispatchServiceClient(cc)
	return d, nil
}

func (d *daemonConn) connect(ctx context.Context, _ string) (net.Conn, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", d.socket)
	for errors.Is(err, syscall.EAGAIN) && ctx.Err() == nil { // many connect at this moment
		select {
		case <-ctx.Done():
		case <-time.After(time.Millisecond):
			conn, err = dialer.DialContext(ctx, "unix", d.socket)
		}
	}
	if err != nil {
		d.dialErr.Store(&err)
		return nil, err
	}
	d.dialErr.Store(nil)
	d.connected.Store(true)
	return conn, nil
}

// Close ends the connection and every call on it.
func (d *daemonConn) Close() { d.cc.Close() }

// whyNot is the reason of err in words for a person: what kept us from the
// socket if anything did, else what the daemon said.
func (d *daemonConn) whyNot(err error) string {
	if dialErr := d.dialErr.Load(); dialErr != nil {
		return (*dialErr).Error()
	}
	return status.Convert(err).Message()
}

// dialReady connects and waits until the daemon speaks, at most connectTimeout:
// a daemon that is stopped still has its socket.
func dialReady(ctx context.Context, socket string) (*daemonConn, error) {
	d, err := dial(socket)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	d.cc.Connect()
	for {
		state := d.cc.GetState()
		switch {
		case state == connectivity.Ready:
			return d, nil
		case state == connectivity.TransientFailure:
			err = status.Error(codes.Unavailable, "connection failed")
		case !d.cc.WaitForStateChange(ctx, state):
			err = status.FromContextError(ctx.Err()).Err()
		default:
			continue
		}
		reason := d.whyNot(err)
		d.Close()
		if status.Code(err) == codes.DeadlineExceeded {
			reason = fmt.Sprintf("it accepts connections at %q but does not answer", socket)
		}
		return nil, status.Errorf(status.Code(err), "%s", reason)
	}
}

// exitStatus is the exit status for an error of a call.
func exitStatus(err error) int {
	switch status.Code(err) {
	case codes.OK:
		return exitOK
	case codes.Unavailable, codes.DeadlineExceeded, codes.PermissionDenied, codes.Unimplemented:
		return exitUnreachable
	case codes.InvalidArgument:
		return exitUsage
	case codes.Canceled:
		return exitInterrupted
	default:
		return exitFailed
	}
}

// reportCallError writes why a call failed, and what to do, and returns the
// exit status.
func reportCallError(w io.Writer, socket string, err error) int {
	message := nix.PlainText(status.Convert(err).Message())
	switch status.Code(err) {
	case codes.Canceled:
		fmt.Fprintln(w, "nix-dispatch: interrupted")
	case codes.Unavailable, codes.DeadlineExceeded:
		advice := "Is nix-dispatchd running? 'systemctl status nix-dispatchd' tells; --socket names another socket than " + socket + "."
		if strings.Contains(message, syscall.EACCES.Error()) {
			advice = "Only root and the members of the group nix-dispatch may use it ('nix build' needs no group); --socket names another daemon's socket."
		}
		fmt.Fprintf(w, "nix-dispatch: the daemon is out of reach: %s\n%s\n", message, advice)
	case codes.PermissionDenied:
		fmt.Fprintf(w, "nix-dispatch: the daemon refuses: %s\n", message)
	case codes.Unimplemented:
		fmt.Fprintf(w, "nix-dispatch: the daemon at %s is of another version: %s\n", socket, message)
	default:
		fmt.Fprintf(w, "nix-dispatch: %s\n", message)
	}
	return exitStatus(err)
}
