// Command testreport runs test commands one after the other, shows what failed
// and ends with one line, "N passed, N failed".
//
//	testreport [-opt-in REGEXP] 'NAME: COMMAND'...
//
// Each COMMAND is run by sh. Of one that prints what "go test -json" does, every
// test and subtest counts; any other counts as one check, by its exit status.
//
// A skipped test counts as skipped and makes the whole fail, for nobody shall take
// a skip for a pass, unless its name matches REGEXP: those are for who asks for
// them, and are only mentioned.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit status: 0 if all passed, 1 if not, 2 for bad usage.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("testreport", flag.ContinueOnError)
	flags.SetOutput(stderr)
	optIn := flags.String("opt-in", "^$", "tests that may be skipped, a `REGEXP`")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	mayskip, err := regexp.Compile(*optIn)
	if err != nil || flags.NArg() == 0 {
		fmt.Fprintln(stderr, "usage: testreport [-opt-in REGEXP] 'NAME: COMMAND'...", errors.Join(err))
		return 2
	}
	r := newReport(stdout, mayskip)
	for _, arg := range flags.Args() {
		name, command, ok := strings.Cut(arg, ": ")
		if !ok {
			fmt.Fprintf(stderr, "testreport: %q: want 'NAME: COMMAND'\n", arg)
			return 2
		}
		r.step(ctx, name, command, stderr)
	}
	if !r.verdict() {
		return 1
	}
	return 0
}

// step runs one command.
func (r *report) step(ctx context.Context, name, command string, stderr io.Writer) {
	if ctx.Err() != nil {
		r.fail(name, "not run: interrupted")
		return
	}
	fmt.Fprintf(r.out, "== %s\n", name)
	started := time.Now()
	r.begin()
	err := r.execute(ctx, command, stderr)
	r.finish(name, err)
	fmt.Fprintf(r.out, "== %s: %s in %.0f s\n", name, map[bool]string{true: "ok", false: "FAILED"}[r.stepOK()], time.Since(started).Seconds())
}

func (r *report) execute(ctx context.Context, command string, stderr io.Writer) error {
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", command)
	cmd.Stderr = stderr
	// An interrupt has reached the whole group from the terminal; what is told to
	// this process alone is passed on.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			r.line(line)
		}
		if err != nil {
			break
		}
	}
	return cmd.Wait()
}
