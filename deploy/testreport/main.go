// Command testreport runs test commands, shows what failed and ends with one line,
// "N passed, N failed".
//
//	testreport [-opt-in REGEXP] [+]'NAME: COMMAND'...
//
// Each COMMAND is run by sh, after those before it have ended; with a plus sign,
// beside the one before it. Of one that prints what "go test -json" does, every
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
	"sync"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit status: 0 if all passed, 1 if not, 2 for bad usage. What the
// commands print goes to stderr as it comes, which must be safe for concurrent use.
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
	shown := &lockedWriter{w: stdout}
	var steps []*step
	var groups [][]*step // those of a group run beside each other
	for _, arg := range flags.Args() {
		arg, beside := strings.CutPrefix(arg, "+")
		name, command, ok := strings.Cut(arg, ": ")
		if !ok {
			fmt.Fprintf(stderr, "testreport: %q: want 'NAME: COMMAND'\n", arg)
			return 2
		}
		s := newStep(name, command, shown, mayskip)
		steps = append(steps, s)
		if beside && len(groups) > 0 {
			groups[len(groups)-1] = append(groups[len(groups)-1], s)
		} else {
			groups = append(groups, []*step{s})
		}
	}
	started := time.Now()
	for _, group := range groups {
		var running sync.WaitGroup
		for _, s := range group {
			running.Go(func() { s.run(ctx, stderr) })
		}
		running.Wait()
	}
	fmt.Fprintf(stdout, "\nit took %.0f s\n", time.Since(started).Seconds())
	if !verdict(stdout, steps) {
		return 1
	}
	return 0
}

// run runs the step's command to its end, and says so.
func (s *step) run(ctx context.Context, stderr io.Writer) {
	started := time.Now()
	fmt.Fprintf(s.out, "== %s\n", s.name)
	var processor time.Duration
	if ctx.Err() != nil {
		s.finish(errors.New("not run: interrupted"))
	} else {
		var err error
		processor, err = s.execute(ctx, stderr)
		s.finish(err)
	}
	fmt.Fprintf(s.out, "== %s: %s in %.0f s, %.0f s of processor time\n", s.name,
		map[bool]string{true: "ok", false: "FAILED"}[s.ok()], time.Since(started).Seconds(), processor.Seconds())
}

// execute returns the processor time of the command and its children, too.
func (s *step) execute(ctx context.Context, stderr io.Writer) (processor time.Duration, err error) {
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", s.command)
	cmd.Stderr = stderr
	// An interrupt has reached the whole group from the terminal; what is told to
	// this process alone is passed on.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			s.line(line)
		}
		if err != nil {
			break
		}
	}
	err = cmd.Wait()
	return cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), err
}
