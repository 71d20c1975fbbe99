// Command demo shows nix-dispatch at work: it makes a client and three machines
// on this host (package nixdispatch/deploy/fleet), builds a small graph of
// derivations through the daemon with a plain nix-build, checks what came of it
// and removes everything again. It needs root.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"nixdispatch/deploy/fleet"
)

// bound is how long all of it may take once the base roots are there; keepBound how
// long it goes on for who wants to look.
const (
	bound     = 5 * time.Minute
	keepBound = time.Hour
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit status: 0 if everything shown was true, 1 if not, 2 for
// bad usage.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	bin := flags.String("bin", "bin", "the directory of the programs, a `PATH`")
	keep := flags.Bool("keep", false, "go on building until interrupted, for an hour at most")
	if err := flags.Parse(args); err != nil || flags.NArg() > 0 {
		fmt.Fprintln(stderr, "usage: demo [-bin PATH] [-keep]")
		return 2
	}
	started := time.Now()
	summary, err := show(ctx, *bin, *keep, stdout, stderr)
	if err != nil {
		fmt.Fprintf(stdout, "\ndemo failed: %v\n", err)
		return 1
	}
	fmt.Fprintf(stdout, "\ndemo passed in %.0f s: %s\n", time.Since(started).Seconds(), summary)
	return 0
}

func show(ctx context.Context, bin string, keep bool, stdout, stderr io.Writer) (summary string, err error) {
	if err := fleet.Available(); err != nil {
		return "", fmt.Errorf("no machines can be made here: %w", err)
	}
	bin, err = filepath.Abs(bin)
	if err != nil {
		return "", err
	}
	for _, program := range []string{"nix-dispatchd", "nix-dispatch"} {
		if _, err := os.Stat(filepath.Join(bin, program)); err != nil {
			return "", fmt.Errorf("the programs must be built first ('make build'): %w", err)
		}
	}
	log := slog.New(slog.NewTextHandler(stderr, nil))
	if err := fleet.EnsureTools(ctx); err != nil {
		return "", err
	}
	if err := fleet.Prepare(ctx, log); err != nil {
		return "", err
	}
	sceneCtx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	f, err := fleet.New(sceneCtx, fleet.Options{})
	if err != nil {
		return "", err
	}
	defer func() {
		if closeErr := f.Close(); err == nil && closeErr != nil {
			err = fmt.Errorf("clean up: %w", closeErr)
		}
	}()
	s := &scene{fleet: f, bin: bin, out: stdout}
	for _, act := range []func(context.Context) error{s.bringUp, s.startDaemon, s.build, s.tellWhere, s.checkStore, s.metrics, s.page} {
		if err := act(sceneCtx); err != nil {
			if s.daemon != nil {
				fmt.Fprintf(stderr, "\nnix-dispatchd's log:\n%s", s.daemonLog.String())
			}
			return "", err
		}
	}
	if keep {
		keepCtx, cancel := context.WithTimeout(ctx, keepBound)
		defer cancel()
		s.keepBuilding(keepCtx)
	}
	return s.summary(), nil
}
