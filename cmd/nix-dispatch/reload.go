package main

import (
	"context"
	"fmt"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

func reloadCommand() *command {
	c := newCommand("reload", "", "read the list of machines anew", `Has nix-dispatchd read its list of machines anew, and the files that it includes. It
does so by itself some seconds after they have changed, and on SIGHUP. If anything is
wrong in them nothing changes, and the exit status is 1. Only root and the user that
nix-dispatchd runs as may do this.

Examples:
  nix-dispatch reload`)
	socket := socketFlag(c.Flags)
	c.run = func(ctx context.Context, _ []string, std stdio) int {
		return withDaemon(ctx, *socket, std, func(ctx context.Context, conn *daemonConn) (int, error) {
			r, err := conn.Reload(ctx, &dispatchv1.ReloadRequest{})
			if err != nil {
				return exitFailed, err
			}
			for _, e := range r.GetErrors() {
				fmt.Fprintf(std.err, "error: %s\n", nix.PlainText(e.GetMessage()))
			}
			if len(r.GetErrors()) > 0 {
				fmt.Fprintf(std.err, "nothing was changed; machines as before: %d\n", r.GetMachines())
				return exitFailed, nil
			}
			fmt.Fprintf(std.out, "machines: %d\n", r.GetMachines())
			return exitOK, nil
		})
	}
	return c
}
