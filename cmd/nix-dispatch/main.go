// Command nix-dispatch is the face of nix-dispatchd: it builds derivations,
// shows what the daemon does, checks machine files, and is what Nix's
// build-hook setting runs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"nixdispatch/cmd/internal/buildhook"
	"nixdispatch/cmd/internal/daemonsocket"
)

// version is set by the linker.
var version = "dev"

// What nix-dispatch exits with, apart from the hook, whose statuses are Nix's.
const (
	exitOK          = 0
	exitFailed      = 1 // a build failed, or the daemon refused
	exitUsage       = 2
	exitUnreachable = 3   // the daemon is out of reach
	exitInterrupted = 130 // as a shell says of a process ended by SIGINT
)

const (
	// hookName is the program name that means "hook": Nix 2.8 takes a path
	// without arguments as build-hook.
	hookName = "nix-dispatch-hook"
)

// stdio is what a subcommand reads and writes, so that tests can give it
// something else.
type stdio struct {
	in       io.Reader
	out, err io.Writer
}

// A command is one subcommand. run gets the arguments after its name and
// returns the exit status.
type command struct {
	name, args, help string
	run              func(ctx context.Context, args []string, std stdio) int
}

func commands() []command {
	return []command{
		{"build", "[OPTION]... DRV...", "build derivations on the machines", runBuild},
		{"status", "[--json]", "show machines and builds", runStatus},
		{"ping", "[--json] URI|MACHINE...", "try the way to machines, step by step", runPing},
		{"doctor", "[--json]", "look for what keeps builds from the machines", runDoctor},
		{"explain", "DRV|--system S", "tell where a build can go, and why not elsewhere", runExplain},
		{"history", "[--json] [--failed]", "show builds that have ended", runHistory},
		{"log", "[--follow] BUILD|DRV", "print the log of a build", runLog},
		{"cancel", "BUILD...", "end builds for all who wait for them", runCancel},
		{"drain", "MACHINE...", "give machines no new builds", runDrain},
		{"undrain", "MACHINE...", "give drained machines builds again", runUndrain},
		{"reload", "", "read the list of machines anew", runReload},
		{"machines", "check [--json] [FILE|-]", "show how a machines file is understood", runMachines},
		{"hook", "[VERBOSITY]", "what Nix's build-hook setting runs", func(_ context.Context, args []string, _ stdio) int { return buildhook.Main(args) }},
	}
}

func main() {
	std := stdio{os.Stdin, os.Stdout, os.Stderr}
	os.Exit(run(context.Background(), os.Args, std))
}

// run dispatches to a subcommand; argv[0] is the program's name.
func run(ctx context.Context, argv []string, std stdio) int {
	if filepath.Base(argv[0]) == hookName {
		return buildhook.Main(argv[1:])
	}
	args := argv[1:]
	if len(args) == 0 {
		printUsage(std.err)
		return exitUsage
	}
	switch args[0] {
	case "--help", "-help", "-h", "help":
		printUsage(std.out)
		return exitOK
	case "--version", "-version", "version":
		fmt.Fprintf(std.out, "nix-dispatch %s\n", version)
		return exitOK
	}
	for _, c := range commands() {
		if c.name == args[0] {
			return c.run(ctx, args[1:], std)
		}
	}
	fmt.Fprintf(std.err, "nix-dispatch: unknown subcommand %q\nTry 'nix-dispatch --help'.\n", args[0])
	return exitUsage
}

func printUsage(w io.Writer) {
	var b strings.Builder
	b.WriteString("Usage: nix-dispatch SUBCOMMAND [ARGUMENT]...\n\nSubcommands:\n")
	for _, c := range commands() {
		fmt.Fprintf(&b, "  %-9s %-24s  %s\n", c.name, c.args, c.help)
	}
	fmt.Fprintf(&b, `
'nix-dispatch SUBCOMMAND --help' shows the options of a subcommand.
Subcommands that talk to the daemon find it by --socket PATH, else by the
environment variable %s, else at $XDG_RUNTIME_DIR/nix-dispatch/socket
if this user runs a daemon of their own there, else at %s.

Exit status: 0 done, 1 a build failed or the daemon refused, 2 wrong usage,
3 the daemon is out of reach.
`, daemonsocket.Env, daemonsocket.Default)
	io.WriteString(w, b.String())
}

// newFlagSet is a flag set that writes to std and leaves exiting to the caller.
// Its usage text is "Usage: nix-dispatch NAME ARGS", then about, then the options.
func newFlagSet(std stdio, name, args, about string) *flag.FlagSet {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(std.err)
	flags.Usage = func() {
		w := flags.Output()
		fmt.Fprintf(w, "Usage: nix-dispatch %s %s\n\n%s\n\nOptions:\n", name, args, about)
		flags.PrintDefaults()
	}
	return flags
}

// parseFlags parses args, options and operands in any order, and returns the
// operands. When ok is false the subcommand ends with status: help was asked
// for, or an option was wrong.
func parseFlags(flags *flag.FlagSet, args []string) (operands []string, status int, ok bool) {
	for {
		err := flags.Parse(args)
		switch {
		case errors.Is(err, flag.ErrHelp):
			return nil, exitOK, false
		case err != nil:
			return nil, exitUsage, false
		}
		rest := flags.Args()
		if len(rest) == 0 {
			return operands, exitOK, true
		}
		if n := len(args) - len(rest); n > 0 && args[n-1] == "--" {
			return append(operands, rest...), exitOK, true
		}
		operands, args = append(operands, rest[0]), rest[1:]
	}
}

// socketFlag registers --socket with its default from the environment.
func socketFlag(flags *flag.FlagSet) *string {
	return flags.String("socket", daemonsocket.Path(), "the daemon's socket, a `PATH`")
}

// usageError reports a wrong command line.
func usageError(std stdio, subcommand, format string, args ...any) int {
	fmt.Fprintf(std.err, "nix-dispatch %s: %s\nTry 'nix-dispatch %s --help'.\n",
		subcommand, fmt.Sprintf(format, args...), subcommand)
	return exitUsage
}
