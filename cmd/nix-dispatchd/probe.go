package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"time"

	"nixdispatch/cmd/internal/pingtext"
	"nixdispatch/daemon"
)

const probeUsage = `Usage: nix-dispatchd probe [OPTION...] URI

Connects to a machine as the user who runs this, in no daemon's name, and prints
each step of the way to its Nix, with its time. 'nix-dispatch ping' runs it for
machines that are not in nix-dispatchd's list.

Options:
  --timeout DURATION  how long a step may take (default 15s to connect, 30s for
                      ssh's handshake, 1m for the machine's Nix)
  --json              print a JSON object for each step
  --help              print this and exit

Exit status: 0 all is well, 1 a step failed, 2 wrong usage.

Examples:
  nix-dispatchd probe ssh-ng://nix@mac
  nix-dispatchd probe --timeout 5s 'ssh://mac?ssh-key=/home/alice/my-key'
`

// probe is "nix-dispatchd probe".
func probe(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("nix-dispatchd probe", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	timeout := flags.Duration("timeout", 0, "")
	asJSON := flags.Bool("json", false, "")
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, probeUsage)
		return 0
	case err == nil && flags.NArg() != 1:
		err = fmt.Errorf("expected one store URI")
	case err == nil && *timeout < 0:
		err = fmt.Errorf("--timeout must be positive")
	}
	var ok bool
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, probeLimit)
		defer cancel()
		ok, err = runProbe(ctx, flags.Arg(0), *timeout, *asJSON, stdout)
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
