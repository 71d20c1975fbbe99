package main

import (
	"context"
	"fmt"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func drainCommand() *command {
	return machineCommand("drain", "give machines no new builds", `Gives machines no new builds. Those they have go on to their end. It stays so, also
after a restart of nix-dispatchd, until 'nix-dispatch undrain'. MACHINE is a store URI
as 'nix-dispatch status' shows it, or its host's name. Only root and the user that
nix-dispatchd runs as may do this.

Examples:
  nix-dispatch drain mac
  nix-dispatch drain ssh-ng://nix@big`,
		func(ctx context.Context, conn *daemonConn, name string, std stdio) (int, error) {
			r, err := conn.Drain(ctx, &dispatchv1.DrainRequest{Machine: name})
			if err == nil {
				fmt.Fprintf(std.out, "%s is drained; builds still on it: %d\n", cell(r.GetMachine()), r.GetBuilds())
			}
			return exitOK, err
		})
}

func undrainCommand() *command {
	return machineCommand("undrain", "give drained machines builds again", `Gives machines builds again that were drained. MACHINE is a store URI as
'nix-dispatch status' shows it, or its host's name.

Examples:
  nix-dispatch undrain mac`,
		func(ctx context.Context, conn *daemonConn, name string, std stdio) (int, error) {
			r, err := conn.Undrain(ctx, &dispatchv1.UndrainRequest{Machine: name})
			if err == nil {
				fmt.Fprintf(std.out, "%s takes builds\n", cell(r.GetMachine()))
			}
			return exitOK, err
		})
}

// machineCommand is a subcommand that makes one call for each machine.
func machineCommand(name, summary, about string, call func(context.Context, *daemonConn, string, stdio) (int, error)) *command {
	c := newCommand(name, "MACHINE...", summary, about)
	socket := socketFlag(c.Flags)
	c.run = func(ctx context.Context, machines []string, std stdio) int {
		if len(machines) == 0 {
			return usageError(std, c.Name, "which machine?")
		}
		var calls []func(context.Context, *daemonConn) (int, error)
		for _, machine := range machines {
			calls = append(calls, func(ctx context.Context, conn *daemonConn) (int, error) { return call(ctx, conn, machine, std) })
		}
		return withDaemon(ctx, *socket, std, calls...)
	}
	return c
}
