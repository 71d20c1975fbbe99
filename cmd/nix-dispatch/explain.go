package main

import (
	"context"
	"fmt"
	"strings"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// The JSON form of "explain".
type (
	explainJSON struct {
		System   string        `json:"system"`
		Features []string      `json:"features"`
		Possible bool          `json:"possible"`
		Chosen   string        `json:"chosen"`
		Why      string        `json:"why"`
		BuildID  uint64        `json:"buildId,omitempty"`
		Machines []verdictJSON `json:"machines"`
	}
	verdictJSON struct {
		URI    string `json:"uri"`
		Reason string `json:"reason"`
		Text   string `json:"text"`
	}
)

func runExplain(ctx context.Context, args []string, std stdio) int {
	req, socket, asJSON, status, ok := parseExplain(args, std)
	if !ok {
		return status
	}
	return withDaemon(ctx, socket, std, func(ctx context.Context, conn *daemonConn) (int, error) {
		r, err := conn.Explain(ctx, req)
		if err != nil {
			return exitFailed, err
		}
		if asJSON {
			return printJSON(std, explainOf(r)), nil
		}
		fmt.Fprintln(std.out, nix.PlainText(r.GetText()))
		return exitOK, nil
	})
}

func parseExplain(args []string, std stdio) (req *dispatchv1.ExplainRequest, socketPath string, asJSON bool, status int, ok bool) {
	flags := newFlagSet(std, "explain", "[--json] DRV | --system SYSTEM [--features A,B]", `Tells of each machine whether a build can go there, or the first reason against it,
and which machine would be chosen now and why. DRV is the path of a .drv file; if a
build of it is in progress the answer is about that.

Examples:
  nix-dispatch explain $(nix-instantiate hello.nix)
  nix-dispatch explain --system x86_64-linux --features kvm,big-parallel`)
	socket := socketFlag(flags)
	json := flags.Bool("json", false, "print JSON")
	var store string
	storeFlag(flags, &store)
	system := flags.String("system", "", "ask for any build for this `SYSTEM`")
	features := flags.String("features", "", "the system features that it requires, with commas between")
	operands, status, ok := parseFlags(flags, args)
	if !ok {
		return nil, "", false, status, false
	}
	req = &dispatchv1.ExplainRequest{System: *system, Store: store, Environment: storeEnvironment()}
	fail := func(format string, a ...any) (*dispatchv1.ExplainRequest, string, bool, int, bool) {
		return nil, "", false, usageError(std, "explain", format, a...), false
	}
	switch {
	case len(operands) > 1:
		return fail("one derivation at a time")
	case len(operands) == 1 && (*system != "" || *features != ""):
		return fail("a derivation has its own system and features")
	case len(operands) == 1:
		drv, err := resolveDerivation(operands[0])
		if err != nil {
			return fail("%v", err)
		}
		req.DrvPath = drv
	case *system == "":
		return fail("which derivation, or --system?")
	case *features != "":
		req.Features = strings.Split(*features, ",")
	}
	return req, *socket, *json, exitOK, true
}

func explainOf(r *dispatchv1.ExplainResponse) explainJSON {
	e := explainJSON{
		System: r.GetSystem(), Features: append([]string{}, r.GetFeatures()...), Possible: r.GetPossible(),
		Chosen: r.GetChosen(), Why: r.GetWhy(), BuildID: r.GetBuildId(), Machines: []verdictJSON{},
	}
	for _, v := range r.GetMachines() {
		reason := strings.ToLower(strings.TrimPrefix(v.GetReason().String(), "VERDICT_REASON_"))
		e.Machines = append(e.Machines, verdictJSON{v.GetMachine(), reason, v.GetText()})
	}
	return e
}
