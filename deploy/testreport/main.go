// Command testreport runs test commands, shows what failed and ends with one line,
// "N passed, N failed".
//
//	testreport [-opt-in REGEXP] [-finally COMMAND] [+]'NAME: COMMAND'...
//
// Each COMMAND is run by sh, after those before it have ended; with a plus sign,
// beside the one before it. Of one that prints what "go test -json" does, every
// test and subtest counts; any other counts as one check, by its exit status.
//
// A skipped test counts as skipped and makes the whole fail, for nobody shall take
// a skip for a pass, unless its name or the reason matches REGEXP: those run only on
// request, and are only mentioned.
//
// Nothing of the commands outlives testreport, however they end: an interrupt ends
// them, and then every process that any of them has left is killed, the temporary
// directory that they share (TMPDIR) is removed, and the COMMAND of -finally is run.
package main

import (
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

	"golang.org/x/sys/unix"
)

func main() {
	// Orphans of the commands become children of this process, for killOrphans.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "testreport: processes that outlive their test will not be killed:", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run returns the exit status: 0 if all passed, 1 if not, 2 for bad usage. What the
// commands print goes to stderr as it comes, which must be safe for concurrent use.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("testreport", flag.ContinueOnError)
	flags.SetOutput(stderr)
	optIn := flags.String("opt-in", "^$", "tests that may be skipped, by name or reason, a `REGEXP`")
	finally := flags.String("finally", "", "run `COMMAND` when all has ended, or was interrupted")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	mayskip, err := regexp.Compile(*optIn)
	if err != nil || flags.NArg() == 0 {
		fmt.Fprintln(stderr, "usage: testreport [-opt-in REGEXP] [-finally COMMAND] 'NAME: COMMAND'...", errors.Join(err))
		return 2
	}
	temp, err := makeTemp()
	if err != nil {
		fmt.Fprintln(stderr, "testreport:", err)
		return 1
	}
	defer os.RemoveAll(temp)
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
		s.temp = temp
		steps = append(steps, s)
		if beside && len(groups) > 0 {
			groups[len(groups)-1] = append(groups[len(groups)-1], s)
		} else {
			groups = append(groups, []*step{s})
		}
	}
	started := time.Now()
	stopWaiting := commands.waitForOrphans()
	for _, group := range groups {
		var running sync.WaitGroup
		for _, s := range group {
			running.Go(func() { s.run(ctx, stderr) })
		}
		running.Wait()
	}
	stopWaiting()
	killOrphans(stdout)
	if *finally != "" {
		cmd := exec.Command("/bin/sh", "-c", *finally)
		cmd.Stdout, cmd.Stderr = stderr, stderr
		if err := cmd.Run(); err != nil {
			fmt.Fprintf(stdout, "%s: %v\n", *finally, err)
		}
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
	cmd.Env = append(os.Environ(), "TMPDIR="+s.temp)
	// A group of its own: "go test" does not pass an interrupt on to what it runs, so
	// that goes to all of them, whether it came from a terminal or not.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = 10 * time.Second
	// Not a pipe to read to its end: what a command has left running may hold it.
	lines := &lineWriter{each: s.line}
	cmd.Stdout = lines
	if err := commands.start(cmd); err != nil {
		return 0, err
	}
	err = cmd.Wait()
	lines.flush()
	return cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), err
}
