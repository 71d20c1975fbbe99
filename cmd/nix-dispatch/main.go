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

	"nixdispatch/cmd/internal/buildhook"
	"nixdispatch/cmd/internal/cli"
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

// A command is one subcommand: its description, and what it does.
type command struct {
	cli.Command
	// run gets the operands after the options were parsed, and returns the exit
	// status.
	run func(ctx context.Context, operands []string, std stdio) int
}

// newCommand describes a subcommand that has no options yet; see cli.Command.
func newCommand(name, args, summary, about string) *command {
	return &command{Command: cli.Command{Name: name, Args: args, Summary: summary, About: about, Flags: cli.NewFlags(name)}}
}

// commands makes all subcommands anew, with their options unset.
func commands() []*command {
	return []*command{
		buildCommand(),
		attachCommand(),
		statusCommand(),
		topCommand(),
		pingCommand(),
		doctorCommand(),
		explainCommand(),
		historyCommand(),
		logCommand(),
		cancelCommand(),
		drainCommand(),
		undrainCommand(),
		reloadCommand(),
		machinesCommand(),
		enableCommand(),
		disableCommand(),
		hookCommand(),
	}
}

// hookCommand is nix-dispatch-hook under another name.
func hookCommand() *command {
	c := newCommand("hook", "[VERBOSITY]", "what Nix's build-hook setting runs", buildhook.About)
	c.Raw = true
	c.run = func(_ context.Context, args []string, _ stdio) int { return buildhook.Main(args) }
	return c
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
	all := commands()
	args := argv[1:]
	if len(args) == 0 {
		program(all).WriteHelp(std.err, "")
		return exitUsage
	}
	name, args := args[0], args[1:]
	switch name {
	case "--help", "-help", "-h", "help":
		if len(args) == 0 {
			program(all).WriteHelp(std.out, "")
			return exitOK
		}
		name, args = args[0], []string{"--help"}
	case "--version", "-version", "version":
		fmt.Fprintf(std.out, "nix-dispatch %s\n", version)
		return exitOK
	}
	for _, c := range all {
		if c.Name == name {
			return c.start(ctx, args, std)
		}
	}
	generator := cli.Generator{
		Program: program(all), Version: version, ManSection: "1", LookUp: lookUp(ctx),
		SeeAlso: []string{"nix.conf(5)", "nix-dispatchd(8)"},
	}
	if ok, err := generator.Run(argv[1:], std.out); err != nil {
		return usageError(std, name, "%v", err)
	} else if ok {
		return exitOK
	}
	fmt.Fprintf(std.err, "nix-dispatch: unknown subcommand %q\nTry 'nix-dispatch --help'.\n", name)
	return exitUsage
}

// start parses the arguments after the subcommand's name and runs it.
func (c *command) start(ctx context.Context, args []string, std stdio) int {
	if c.Raw {
		return c.run(ctx, args, std)
	}
	operands, err := cli.Parse(c.Flags, args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		c.WriteHelp(std.out, programName)
		return exitOK
	case err != nil:
		return usageError(std, c.Name, "%v", err)
	case c.Args == "" && len(operands) > 0:
		return usageError(std, c.Name, "unexpected argument %q", operands[0])
	}
	return c.run(ctx, operands, std)
}

// program describes all of nix-dispatch.
func program(all []*command) *cli.Command {
	p := &cli.Command{
		Name:    programName,
		Summary: "build Nix derivations on other machines, through nix-dispatchd",
		About:   programAbout,
		Flags:   cli.NewFlags(programName),
	}
	for _, c := range all {
		p.Commands = append(p.Commands, &c.Command)
	}
	return p
}

const programName = "nix-dispatch"

const programAbout = `Shows what nix-dispatchd does, which builds on the machines of Nix's builders setting,
and has it build derivations. 'nix-dispatch SUBCOMMAND --help' shows the options of a
subcommand, 'nix-dispatch completion bash|zsh|fish' prints what these shells need to complete
its arguments.

Environment: NIX_DISPATCH_SOCKET is the daemon's socket, unless --socket names one. By
default it is $XDG_RUNTIME_DIR/nix-dispatch/socket if this user runs a daemon there, else
` + daemonsocket.Default + `.

Exit status: 0 done, 1 a build failed or the daemon refused, 2 wrong usage,
3 the daemon is out of reach.`

// socketFlag registers --socket with its default from the environment.
func socketFlag(flags *flag.FlagSet) *string {
	path := flags.String("socket", daemonsocket.Path(), "the daemon's socket, a `PATH`; by default what $NIX_DISPATCH_SOCKET names, or the usual one")
	flags.Lookup("socket").DefValue = "" // the text says it
	return path
}

// usageError reports a wrong command line.
func usageError(std stdio, subcommand, format string, args ...any) int {
	fmt.Fprintf(std.err, "nix-dispatch %s: %s\nTry 'nix-dispatch %s --help'.\n",
		subcommand, fmt.Sprintf(format, args...), subcommand)
	return exitUsage
}
