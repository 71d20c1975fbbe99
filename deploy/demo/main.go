// Command demo shows nix-dispatch at work: it makes a client and three machines
// on this host (package nixdispatch/deploy/fleet), builds a small graph of
// derivations through the daemon with a plain nix-build, checks what came of it
// and removes everything again. It needs root.
package main

import (
	"context"
	"errors"
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

// bound is how long all of it may take once the base systems are there: far more
// than it does on a slow host. keepBound is how long -keep goes on.
const (
	bound     = 10 * time.Minute
	keepBound = time.Hour
)

// The exit statuses.
const (
	exitPassed      = 0
	exitFailed      = 1
	exitUsage       = 2
	exitInterrupted = 130
)

func main() {
	// SIGPIPE would end the process before it has cleaned up; the write that causes
	// it fails as well, and that ends the demo (lockedWriter).
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run returns the exit status: exitPassed only if everything shown was true.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	bin := flags.String("bin", "bin", "the directory of the programs, a `PATH`")
	keep := flags.Bool("keep", false, "go on building until interrupted, for an hour at most")
	if err := flags.Parse(args); err != nil || flags.NArg() > 0 {
		fmt.Fprintln(stderr, "usage: demo [-bin PATH] [-keep]")
		return exitUsage
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &scene{out: &lockedWriter{w: stdout, gone: cancel}, keep: *keep}
	started := time.Now()
	err := s.show(ctx, *bin)
	took := time.Since(started).Seconds()
	var left *leftoverError
	switch {
	case errors.As(err, &left):
		fmt.Fprintf(s.out, "\ndemo failed after %.0f s: %v\nTo remove what is left: %s reap\n", took, err, filepath.Join(*bin, "tools", "fleet"))
		return exitFailed
	case err != nil && ctx.Err() != nil:
		fmt.Fprintf(s.out, "\ndemo interrupted after %.0f s; nothing is left running or mounted\n", took)
		return exitInterrupted
	case err != nil:
		fmt.Fprintf(s.out, "\ndemo failed after %.0f s: %v\n", took, err)
		if s.logs != "" {
			fmt.Fprintf(s.out, "The logs of nix-dispatchd and of every host are in %s\n", s.logs)
		}
		return exitFailed
	}
	fmt.Fprintf(s.out, "\ndemo passed in %.0f s: %s\n", took, s.summary())
	return exitPassed
}

// A leftoverError says that not everything could be removed.
type leftoverError struct{ err error }

func (e *leftoverError) Error() string { return "clean up: " + e.err.Error() }
func (e *leftoverError) Unwrap() error { return e.err }

// show prepares the host and plays all acts on a fleet that it removes at the end.
func (s *scene) show(ctx context.Context, bin string) (err error) {
	if err := fleet.Available(); err != nil {
		return fmt.Errorf("no hosts can be made here: %w", err)
	}
	if s.bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	for _, program := range []string{"nix-dispatchd", "nix-dispatch"} {
		if _, err := os.Stat(filepath.Join(s.bin, program)); err != nil {
			return fmt.Errorf("the programs must be built first ('make build'): %w", err)
		}
	}
	log := slog.New(plainHandler{s.out})
	if err := fleet.EnsureTools(ctx, log); err != nil {
		return err
	}
	if err := fleet.Prepare(ctx, log); err != nil {
		return err
	}
	if s.fleet, err = fleet.New(ctx, fleet.Options{Log: log}); err != nil {
		return err
	}
	defer func() {
		s.say("Removing the hosts")
		if closeErr := s.fleet.Close(); closeErr != nil {
			err = errors.Join(err, &leftoverError{closeErr})
		}
	}()
	playCtx, cancel := context.WithTimeoutCause(ctx, bound, fmt.Errorf("not done after %v", bound))
	defer cancel()
	if err := s.play(playCtx); err != nil {
		if ctx.Err() == nil {
			err = errors.Join(err, s.keepLogs())
		}
		if cause := context.Cause(playCtx); cause != nil {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		return err
	}
	if s.keep {
		keepCtx, cancel := context.WithTimeout(ctx, keepBound)
		defer cancel()
		return s.keepBuilding(keepCtx)
	}
	return nil
}

func (s *scene) play(ctx context.Context) error {
	for _, act := range []func(context.Context) error{s.bringUp, s.startDaemon, s.build, s.showWhere, s.checkStore, s.metrics, s.page} {
		if err := act(ctx); err != nil {
			return err
		}
	}
	return nil
}

// keepLogs copies the logs of nix-dispatchd and the hosts beside the programs,
// where the next failure replaces them, and prints the end of nix-dispatchd's.
func (s *scene) keepLogs() error {
	dir := filepath.Join(s.bin, "demo-logs")
	err := os.RemoveAll(dir)
	if err == nil {
		err = os.Mkdir(dir, 0o755)
	}
	if err != nil {
		return fmt.Errorf("keep the logs: %w", err)
	}
	s.logs = dir
	errs := []error{s.fleet.CopyLogs(dir)}
	if s.lastPage != nil {
		errs = append(errs, os.WriteFile(filepath.Join(dir, "page.html"), s.lastPage, 0o644))
	}
	if s.daemon != nil {
		fmt.Fprintf(s.out, "\nThe end of nix-dispatchd's log:\n%s", s.daemonLog.tail(4000))
		errs = append(errs, os.WriteFile(filepath.Join(dir, "nix-dispatchd.log"), []byte(s.daemonLog.tail(16<<20)), 0o644))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("keep the logs: %w", err)
	}
	return nil
}
