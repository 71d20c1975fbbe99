package main

import (
	"context"
)

// withDaemon connects to the daemon and makes calls that it answers from memory:
// call gets a context with room for one of them. It returns the exit status.
func withDaemon(ctx context.Context, socket string, std stdio, calls ...func(context.Context, *daemonConn) (status int, err error)) int {
	ctx, stop := interruptible(ctx)
	defer stop()
	conn, err := dialReady(ctx, socket)
	if err != nil {
		return reportCallError(std.err, socket, err)
	}
	defer conn.Close()
	worst := exitOK
	for _, call := range calls {
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		status, err := call(callCtx, conn)
		cancel()
		if err != nil {
			status = reportCallError(std.err, socket, err)
		}
		worst = max(worst, status)
	}
	return worst
}
