package main

import (
	"context"
	"strconv"
	"time"

	"nixdispatch/cmd/internal/cli"
	"nixdispatch/cmd/internal/daemonsocket"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// lookUpTimeout is how long somebody who presses the tab key waits for the daemon,
// unless the context has a deadline of its own.
const lookUpTimeout = time.Second

// lookUp is what a shell completes that only the daemon knows; see cli.Complete.
func lookUp(ctx context.Context) func(kind string) []cli.Candidate {
	return func(kind string) []cli.Candidate {
		switch kind {
		case "MACHINE", "URI", "BUILD":
		default:
			return nil
		}
		if _, ok := ctx.Deadline(); !ok {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, lookUpTimeout)
			defer cancel()
		}
		conn, err := dial(daemonsocket.Path())
		if err != nil {
			return nil
		}
		defer conn.Close()
		st, err := conn.Status(ctx, &dispatchv1.StatusRequest{})
		if err != nil {
			return nil
		}
		return candidatesOf(st, kind == "BUILD")
	}
}

// candidatesOf are the machines of a status, or its builds.
func candidatesOf(st *dispatchv1.StatusResponse, builds bool) []cli.Candidate {
	var list []cli.Candidate
	if builds {
		for _, b := range st.GetBuilds() {
			list = append(list, cli.Candidate{Word: strconv.FormatUint(b.GetId(), 10), About: cell(b.GetDrvPath())})
		}
		for _, b := range st.GetDetached() {
			list = append(list, cli.Candidate{Word: strconv.FormatUint(b.GetId(), 10), About: "detached, " + detachedState(b)})
		}
		return list
	}
	for _, m := range st.GetMachines() {
		list = append(list, cli.Candidate{Word: cell(m.GetUri()), About: stateName(m.GetState())})
	}
	return list
}
