package main

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// How long a build waits for a daemon that went away, or is about to: the next one
// finds what was built and goes on with the rest.
const (
	// comeBack is how long nobody may answer.
	comeBack = 30 * time.Second
	// ending is how long a daemon that is shutting down may take for the builds it
	// has; more than its usual --drain-timeout.
	ending = 15 * time.Minute
	// comeBackPoll is the time between two attempts.
	comeBackPoll = 250 * time.Millisecond
	// maxDaemons bounds how many daemons may go away during one build: it may be what
	// they die of.
	maxDaemons = 20
)

// buildThrough has the daemon build, and the next one if that goes away. The
// caller must close the connection, which holds the outputs' roots.
func buildThrough(ctx context.Context, opts *buildOptions, std stdio) (*dispatchv1.BuildResponse, *daemonConn, error) {
	conn, err := dialReady(ctx, *opts.socket)
	if err != nil && mayComeBack(err) {
		conn, err = awaitNext(ctx, opts, std, "is out of reach", err)
	}
	if err != nil {
		return nil, nil, err
	}
	for n := 1; ; n++ {
		result, err := followBuild(ctx, conn, opts, std)
		if err == nil {
			return result, conn, nil
		}
		conn.Close()
		if status.Code(err) != codes.Unavailable || n == maxDaemons {
			return nil, nil, err
		}
		if conn, err = awaitNext(ctx, opts, std, "went away", err); err != nil {
			return nil, nil, err
		}
	}
}

// mayComeBack tells whether dialReady failed on the socket of a daemon that was there
// once, which is killed or stopped.
func mayComeBack(err error) bool {
	return status.Code(err) == codes.DeadlineExceeded || strings.Contains(status.Convert(err).Message(), syscall.ECONNREFUSED.Error())
}

// awaitNext tells the user why a build waits, and is nextDaemon.
func awaitNext(ctx context.Context, opts *buildOptions, std stdio, what string, why error) (*daemonConn, error) {
	fmt.Fprintf(std.err, "nix-dispatch: the daemon %s: %s; waiting for it to come back\n",
		what, nix.PlainText(status.Convert(why).Message()))
	return nextDaemon(ctx, *opts.socket)
}

// nextDaemon connects to the daemon that takes requests again.
func nextDaemon(ctx context.Context, socket string) (*daemonConn, error) {
	ctx, cancel := context.WithTimeout(ctx, ending)
	defer cancel()
	heard := time.Now()
	for {
		conn, err := dialReady(ctx, socket)
		if err == nil {
			heard = time.Now()
			var serving bool
			if serving, err = conn.serving(ctx); serving {
				return conn, nil
			}
			conn.Close()
		}
		if time.Since(heard) > comeBack || ctx.Err() != nil {
			return nil, err
		}
		select {
		case <-time.After(comeBackPoll):
		case <-ctx.Done():
		}
	}
}

// serving tells whether a daemon that answers takes requests: one that is shutting
// down does not.
func (d *daemonConn) serving(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	r, err := healthpb.NewHealthClient(d.cc).Check(ctx, &healthpb.HealthCheckRequest{})
	switch {
	case err != nil:
		return false, err
	case r.GetStatus() != healthpb.HealthCheckResponse_SERVING:
		return false, status.Error(codes.Unavailable, "it is shutting down")
	default:
		return true, nil
	}
}
