package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"time"

	"nixdispatch/cmd/internal/cli"
	"nixdispatch/cmd/internal/pingtext"
	"nixdispatch/daemon"
)

const probeAbout = `Connects to a machine as the user who runs this, in no daemon's name, and prints each
step of the way to its Nix, with its time. 'nix-dispatch ping' runs it for machines that
are not in nix-dispatchd's list.

Examples:
  nix-dispatchd probe ssh-ng://nix@mac
  nix-dispatchd probe --timeout 5s 'ssh://mac?ssh-key=/home/alice/my-key'

Exit status: 0 all is well, 1 a step failed, 2 wrong usage.`

// probeSettings are what its command line says.
type probeSettings struct {
	timeout time.Duration
	json    bool
}

func probeCommand() (*cli.Command, *probeSettings) {
	s := new(probeSettings)
	flags := cli.NewFlags("probe")
	flags.DurationVar(&s.timeout, "timeout", 0, "how long a step may take, a `DURATION`; by default 15s to connect, 30s for ssh's handshake, 1m for the machine's Nix")
	flags.BoolVar(&s.json, "json", false, "print a JSON object for each step")
	return &cli.Command{Name: "probe", Args: "URI", Summary: "try the way to a machine, as oneself", About: probeAbout, Flags: flags}, s
}

// probe is "nix-dispatchd probe".
func probe(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	c, s := probeCommand()
	operands, err := cli.Parse(c.Flags, args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		c.WriteHelp(stdout, "nix-dispatchd")
		return 0
	case err == nil && len(operands) != 1:
		err = fmt.Errorf("expected one store URI")
	case err == nil && s.timeout < 0:
		err = fmt.Errorf("--timeout must be positive")
	}
	var ok bool
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, probeLimit)
		defer cancel()
		ok, err = runProbe(ctx, operands[0], s.timeout, s.json, stdout)
	}
	switch {
	case err != nil:
		fmt.Fprintf(stderr, "nix-dispatchd probe: %v\nTry 'nix-dispatchd probe --help'.\n", err)
		return 2
	case !ok:
		return 1
	default:
		return 0
	}
}

// probeLimit bounds all steps together.
const probeLimit = 5 * time.Minute

func runProbe(ctx context.Context, uri string, timeout time.Duration, asJSON bool, stdout io.Writer) (bool, error) {
	r := &pingtext.Report{Machine: uri, OK: true}
	ok, err := daemon.Probe(ctx, uri, daemon.ProbeOptions{Timeout: timeout}, func(s daemon.ProbeStep) {
		step := pingtext.Step{
			Name: s.Name, Verdict: probeVerdicts[s.Verdict], Milliseconds: pingtext.Millis(s.Took),
			Detail: s.Detail, Cause: s.Cause, Fix: s.Fix,
		}
		r.Add(step)
		if asJSON {
			_ = pingtext.WriteStep(stdout, step) // the exit status tells as well
		} else {
			step.Write(stdout)
		}
	})
	if err == nil && !asJSON {
		r.WriteEnd(stdout)
	}
	return ok, err
}

var probeVerdicts = map[daemon.ProbeVerdict]string{
	daemon.ProbeOK: pingtext.OK, daemon.ProbeWarning: pingtext.Warning, daemon.ProbeFailed: pingtext.Failed,
}
