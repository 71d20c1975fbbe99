// Command fleet brings up real Nix machines on this host to try things out: see
// package nixdispatch/deploy/fleet.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"nixdispatch/deploy/fleet"
)

const usage = `fleet brings up real Nix machines on this host, each with its own root, network,
sshd and nix-daemon. Needs root. Nothing of it is on this host's own network.

  fleet prepare [SUITE...]          install tools, make the base roots (once; minutes)
  fleet up [OPTIONS] NAME...        bring up hosts
  fleet run [--user U] HOST CMD...  run a command in a host
  fleet cut|restore HOST...         drop all packets of a host, silently, or no more
  fleet freeze|thaw HOST...         stop all processes of a host, or continue them
  fleet kill|boot HOST...           power off at once; start again with the same disk
  fleet rm HOST...                  remove hosts
  fleet list                        all fleets and hosts
  fleet far NAME HOST [--delay D]   a second name for HOST, D away each way; until ^C
  fleet proxy --listen A --to B     a TCP proxy that delays each direction; until ^C
  fleet down                        remove the fleet and all its hosts
  fleet reap                        remove what dead fleets left behind

Suites are bookworm (Nix 2.8), trixie (Nix 2.26) and sid (the newest in Debian).
Every command takes --fleet NAME (default "default") and --help.

  fleet up --suite bookworm old
  fleet up --nix-conf 'max-jobs = 4' mac kitty
  fleet run old sh -c 'echo "ssh://mac x86_64-linux - 4" > /etc/nix/machines'
  fleet run --user alice old nix-build -j0 -E 'derivation { name = "x";
    system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo hi > $out" ]; }'
  fleet down
`

// errUsage says that the command line is wrong; what is wrong has been printed.
var errUsage = errors.New("usage")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	interrupted := ctx.Err() != nil
	stop()
	// What run has started says for itself why it failed; an error that wraps the
	// end of another program is one of ours, and is shown.
	exit, ran := err.(*exec.ExitError)
	switch {
	case err == nil:
	case errors.Is(err, errUsage):
		os.Exit(2)
	case ran && exit.ExitCode() > 0:
		os.Exit(exit.ExitCode())
	case interrupted && errors.Is(err, context.Canceled):
		fmt.Fprintln(os.Stderr, "fleet: interrupted")
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

// invocation is one command line being carried out.
type invocation struct {
	name   string
	flags  *flag.FlagSet
	fleet  string
	log    *slog.Logger
	stdout io.Writer
	stderr io.Writer
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, usage)
		return errUsage
	}
	if slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]) {
		fmt.Fprint(stdout, usage)
		return nil
	}
	in := &invocation{name: args[0], stdout: stdout, stderr: stderr}
	in.log = slog.New(slog.NewTextHandler(stderr, nil))
	in.flags = flag.NewFlagSet("fleet "+args[0], flag.ContinueOnError)
	in.flags.SetOutput(stderr)
	in.flags.StringVar(&in.fleet, "fleet", "default", "`NAME` of the fleet")
	commands := map[string]func(context.Context, []string) error{
		"prepare": in.prepare, "up": in.up, "run": in.run, "rm": in.remove,
		"cut": in.each((*fleet.Host).CutOff), "restore": in.each((*fleet.Host).Restore),
		"freeze": in.each((*fleet.Host).Freeze), "thaw": in.each((*fleet.Host).Thaw),
		"kill": in.each((*fleet.Host).Kill), "boot": in.each((*fleet.Host).Boot),
		"list": in.list, "far": in.far, "proxy": in.proxy, "down": in.down, "reap": in.reap,
	}
	command, known := commands[args[0]]
	if !known {
		fmt.Fprintf(stderr, "fleet: unknown command %q\n\n%s", args[0], usage)
		return errUsage
	}
	err := command(ctx, args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	return err
}

// parse reads flags up to the first argument and demands at least n arguments.
func (in *invocation) parse(args []string, n int, want string) ([]string, error) {
	if err := in.flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, errUsage
	}
	if in.flags.NArg() < n {
		fmt.Fprintf(in.stderr, "fleet %s: want %s; see fleet --help\n", in.name, want)
		return nil, errUsage
	}
	return in.flags.Args(), nil
}

// parseMixed is parse with flags anywhere.
func (in *invocation) parseMixed(args []string, n int, want string) ([]string, error) {
	var words []string
	for {
		if _, err := in.parse(args, 0, want); err != nil {
			return nil, err
		}
		rest := in.flags.Args()
		if len(rest) == 0 {
			break
		}
		words = append(words, rest[0])
		args = rest[1:]
	}
	if len(words) < n {
		fmt.Fprintf(in.stderr, "fleet %s: want %s; see fleet --help\n", in.name, want)
		return nil, errUsage
	}
	return words, nil
}

// words are given by repeating a flag.
type words []string

func (w *words) String() string { return strings.Join(*w, " ") }

func (w *words) Set(s string) error {
	*w = append(*w, s)
	return nil
}
