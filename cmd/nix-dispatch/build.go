package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"nixdispatch/cmd/internal/cli"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// buildOptions are the command line of "build".
type buildOptions struct {
	socket    *string
	json      bool
	outLink   string
	printLogs bool
	request   dispatchv1.BuildRequest
	// call begins the call that tells of the build.
	call func(context.Context, *daemonConn) (grpc.ServerStreamingClient[dispatchv1.BuildResponse], error)
}

func buildCommand() *command {
	c := newCommand("build", "DRV...", "build derivations on the machines", `Builds derivations and whatever they need that is not there yet, and prints the
paths of their outputs. DRV is the path of a .drv file; DRV^out,doc or DRV!out,doc
asks for some outputs only. Times are in seconds, or like 1h30m.

Examples:
  nix-dispatch build -L --out-link result $(nix-instantiate hello.nix)
  nix-dispatch build --builders 'ssh://mac x86_64-linux - 4' $(nix-instantiate hello.nix)
  nix-dispatch build --store ~/my-nix $(nix-instantiate --store ~/my-nix hello.nix)
  nix-dispatch build --detach $(nix-instantiate hello.nix)`)
	opts := buildFlags(c.Flags)
	c.run = func(ctx context.Context, operands []string, std stdio) int {
		if len(operands) == 0 {
			return usageError(std, c.Name, "which derivation?")
		}
		for _, operand := range operands {
			drv, err := resolveDerivation(operand)
			if err != nil {
				return usageError(std, c.Name, "%v", err)
			}
			opts.request.Derivations = append(opts.request.Derivations, drv)
		}
		if opts.request.Detach && opts.outLink != "" {
			return usageError(std, c.Name, "with --detach there is nobody to make the link; 'nix-dispatch attach --out-link' makes it when the build has ended")
		}
		opts.request.HoldRoots = opts.outLink != ""
		opts.call = func(ctx context.Context, conn *daemonConn) (grpc.ServerStreamingClient[dispatchv1.BuildResponse], error) {
			return conn.Build(ctx, &opts.request)
		}
		return runBuild(ctx, opts, std)
	}
	return c
}

// resultFlags are about what is shown and left of a build.
func resultFlags(flags *flag.FlagSet, opts *buildOptions) {
	opts.socket = socketFlag(flags)
	flags.BoolVar(&opts.json, "json", false, "print the outputs as JSON")
	flags.StringVar(&opts.outLink, "out-link", "", "make `PATH` a link to the output and keep it from being garbage-collected")
	cli.Alias(flags, "o", "out-link")
	flags.BoolVar(&opts.printLogs, "print-build-logs", false, "show the builders' logs")
	cli.Alias(flags, "L", "print-build-logs")
}

func attachCommand() *command {
	c := newCommand("attach", "BUILD", "follow a build, and wait for its outputs", `Follows a detached build by its number, and prints the paths of its outputs when it
has ended, or at once if it has. Ctrl-C leaves the build as it is. Another build in
progress goes on to its end for this command, even if all who asked for it leave.

Examples:
  nix-dispatch attach -L --out-link result $(nix-dispatch build --detach $(nix-instantiate hello.nix))`)
	opts := new(buildOptions)
	resultFlags(c.Flags, opts)
	storeFlag(c.Flags, &opts.request.Store)
	c.run = func(ctx context.Context, operands []string, std stdio) int {
		if len(operands) != 1 {
			return usageError(std, c.Name, "want one build")
		}
		id, err := strconv.ParseUint(operands[0], 10, 64)
		if err != nil {
			return usageError(std, c.Name, "%q is not the number of a build", operands[0])
		}
		opts.call = func(ctx context.Context, conn *daemonConn) (grpc.ServerStreamingClient[dispatchv1.BuildResponse], error) {
			return conn.Attach(ctx, &dispatchv1.AttachRequest{BuildId: id, HoldRoots: opts.outLink != ""})
		}
		return runBuild(ctx, opts, std)
	}
	return c
}

func buildFlags(flags *flag.FlagSet) *buildOptions {
	opts := new(buildOptions)
	req := &opts.request
	req.Limits = new(dispatchv1.Limits)
	resultFlags(flags, opts)
	flags.BoolVar(&req.Detach, "detach", false, "have the daemon build by itself, and print the number that 'attach', 'cancel' and 'log' take")
	flags.BoolVar(&req.KeepGoing, "keep-going", false, "go on with what can be built after a failure")
	cli.Alias(flags, "k", "keep-going")
	flags.BoolVar(&req.BuildersUseSubstitutes, "builders-use-substitutes", false, "let machines fetch inputs from their own substituters")
	storeFlag(flags, &req.Store)
	req.Environment = storeEnvironment()
	flags.Func("builders", "build on these machines, `TEXT` as in Nix's setting builders; '' for none. Root's to say", func(text string) error {
		req.Builders = &text
		return nil
	})
	flags.Func("priority", "let `N`, from -10 to 10, decide which builds go first, whosever they are; above 0 is root's to say", func(text string) error {
		n, err := strconv.ParseInt(text, 10, 8)
		if err != nil || n < -10 || n > 10 {
			return errors.New("want a whole number from -10 to 10")
		}
		req.Priority = int32(n)
		return nil
	})
	flags.Func("timeout", "stop a build after this `TIME`", durationFlag(&req.Limits.Timeout))
	flags.Func("max-silent-time", "stop a build that prints nothing for this `TIME`", durationFlag(&req.Limits.MaxSilentTime))
	flags.Uint64Var(&req.Limits.MaxLogSize, "max-build-log-size", 0, "stop a build that prints more than this many `BYTES`")
	return opts
}

func runBuild(ctx context.Context, opts *buildOptions, std stdio) int {
	ctx, stop := interruptible(ctx)
	defer stop()
	result, conn, err := buildThrough(ctx, opts, std)
	if err != nil {
		return reportCallError(std.err, *opts.socket, err)
	}
	defer conn.Close() // until then the outputs are safe
	if result.GetDetached() != nil {
		return reportDetached(opts, result.GetDetached().GetBuildId(), std)
	}
	summary := result.GetSummary()
	if !summary.GetSuccess() {
		return exitFailed
	}
	if opts.outLink != "" {
		if err := makeOutLinks(ctx, opts.request.GetStore(), opts.outLink, summary.GetOutputs()); err != nil {
			fmt.Fprintf(std.err, "nix-dispatch: %v\n", err)
			return exitFailed
		}
	}
	if opts.json {
		return printJSON(std, resultsOf(summary.GetOutputs()))
	}
	for _, out := range summary.GetOutputs() {
		fmt.Fprintln(std.out, nix.PlainText(out.GetPath()))
	}
	return exitOK
}

// reportDetached tells the number of a build that goes on by itself.
func reportDetached(opts *buildOptions, id uint64, std stdio) int {
	if opts.json {
		return printJSON(std, struct {
			ID uint64 `json:"id"`
		}{id})
	}
	fmt.Fprintf(std.err, "detached: 'nix-dispatch attach %d' follows it\n", id)
	fmt.Fprintln(std.out, id)
	return exitOK
}

// durationFlag reads a time as Nix has it, a number of seconds, or as Go has it.
func durationFlag(p **durationpb.Duration) func(string) error {
	return func(s string) error {
		d, err := time.ParseDuration(s)
		if n, intErr := strconv.ParseUint(s, 10, 31); intErr == nil {
			d, err = time.Duration(n)*time.Second, nil
		}
		if err != nil || d < 0 {
			return errors.New("want a number of seconds, or a time such as 1h30m")
		}
		if d > 0 {
			*p = durationpb.New(d)
		}
		return nil
	}
}

// resolveDerivation makes the daemon's "PATH!out1,out2" of an operand: links are
// followed and relative paths made absolute until there is a store path.
func resolveDerivation(operand string) (string, error) {
	path, outputs := operand, ""
	if i := strings.LastIndexAny(operand, "!^"); i >= 0 && !strings.Contains(operand[i:], "/") {
		path, outputs = operand[:i], operand[i+1:]
		if outputs == "" {
			return "", fmt.Errorf("%q names no output after %q", operand, operand[i:])
		}
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	drv, err := nix.ParseStorePath(abs)
	if err != nil || !drv.IsDerivation() {
		resolved, linkErr := filepath.EvalSymlinks(abs)
		if linkErr != nil {
			return "", fmt.Errorf("%q is not the path of a derivation in a Nix store: %w", operand, errors.Join(err, linkErr))
		}
		drv, err = nix.ParseStorePath(resolved)
	}
	if err != nil {
		return "", fmt.Errorf("%q is not the path of a derivation: %w", operand, err)
	}
	if !drv.IsDerivation() {
		return "", fmt.Errorf("%q is not the path of a derivation: its name does not end in .drv", operand)
	}
	if outputs == "" || outputs == "*" {
		return string(drv), nil
	}
	return string(drv) + "!" + outputs, nil
}

// followBuild runs the call to its end and shows what happens. It returns the last
// message.
func followBuild(ctx context.Context, conn *daemonConn, opts *buildOptions, std stdio) (*dispatchv1.BuildResponse, error) {
	stream, err := opts.call(ctx, conn)
	if err != nil {
		return nil, err
	}
	p := newProgress(std.err, opts.printLogs)
	defer p.close()
	return receiveBuild(stream, p)
}

func receiveBuild(stream grpc.ServerStreamingClient[dispatchv1.BuildResponse], p *progress) (*dispatchv1.BuildResponse, error) {
	for {
		resp, err := stream.Recv()
		if err == io.EOF {
			return nil, status.Error(codes.Unavailable, "it ended the call without a summary")
		}
		if err != nil {
			return nil, err
		}
		switch m := resp.GetMessage().(type) {
		case *dispatchv1.BuildResponse_Plan:
			p.plan(m.Plan)
		case *dispatchv1.BuildResponse_Event:
			p.event(m.Event)
		case *dispatchv1.BuildResponse_Summary, *dispatchv1.BuildResponse_Detached:
			return resp, nil
		}
	}
}

// A resultJSON is one derivation in the output of "build --json".
type resultJSON struct {
	DrvPath string            `json:"drvPath"`
	Outputs map[string]string `json:"outputs"`
}

func resultsOf(outputs []*dispatchv1.Output) []resultJSON {
	results := []resultJSON{}
	index := make(map[string]int)
	for _, out := range outputs {
		i, ok := index[out.GetDrvPath()]
		if !ok {
			i = len(results)
			index[out.GetDrvPath()] = i
			results = append(results, resultJSON{out.GetDrvPath(), make(map[string]string)})
		}
		results[i].Outputs[out.GetName()] = out.GetPath()
	}
	return results
}
