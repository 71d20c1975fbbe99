package main

import (
	"context"
	"errors"
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

func explainCommand() *command {
	c := newCommand("explain", "[DRV]", "tell where a build can go, and why not elsewhere", `Tells of each machine whether a build can go there, or the first reason against it,
and which machine would be chosen now and why. DRV is the path of a .drv file; if a
build of it is in progress the answer is about that. Without DRV it is about any
build for --system.

Examples:
  nix-dispatch explain $(nix-instantiate hello.nix)
  nix-dispatch explain --system x86_64-linux --features kvm,big-parallel`)
	req := new(dispatchv1.ExplainRequest)
	socket := socketFlag(c.Flags)
	asJSON := c.Flags.Bool("json", false, "print JSON")
	storeFlag(c.Flags, &req.Store)
	req.Environment = storeEnvironment()
	c.Flags.StringVar(&req.System, "system", "", "ask for any build for this `SYSTEM`")
	features := c.Flags.String("features", "", "the system `FEATURES` that it requires, with commas between")
	c.run = func(ctx context.Context, operands []string, std stdio) int {
		if *features != "" {
			req.Features = strings.Split(*features, ",")
		}
		if err := explained(req, operands); err != nil {
			return usageError(std, c.Name, "%v", err)
		}
		return withDaemon(ctx, *socket, std, func(ctx context.Context, conn *daemonConn) (int, error) {
			r, err := conn.Explain(ctx, req)
			if err != nil {
				return exitFailed, err
			}
			if *asJSON {
				return printJSON(std, explainOf(r)), nil
			}
			fmt.Fprintln(std.out, nix.PlainText(r.GetText()))
			return exitOK, nil
		})
	}
	return c
}

// explained puts the derivation into the request, if it is about one.
func explained(req *dispatchv1.ExplainRequest, operands []string) (err error) {
	switch {
	case len(operands) > 1:
		return errors.New("one derivation at a time")
	case len(operands) == 1 && (req.System != "" || len(req.Features) > 0):
		return errors.New("a derivation has its own system and features")
	case len(operands) == 1:
		req.DrvPath, err = resolveDerivation(operands[0])
		return err
	case req.System == "":
		return errors.New("which derivation, or --system?")
	}
	return nil
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
