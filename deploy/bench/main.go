// Command bench measures nix-dispatch against Nix's own build hook, and against
// what no program could do without, on machines made here (package
// nixdispatch/deploy/fleet). It needs root.
//
//	bench [-bin DIR] [-only NAME,NAME...] [-json FILE] [-into FILE.md]
//	bench -list
//
// All sides of a comparison are measured in the same run, in turn and several
// times, and compared pair by pair: what else goes on here hits all of them.
// Ratios count; absolute times tell of this computer and of the moment.
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
	"slices"
	"strings"
	"syscall"
	"time"

	"nixdispatch/deploy/fleet"
)

// rows are all there are, in the order of the table.
func rows() []row {
	return []row{
		dispatchRow,
		distanceRow,
		acceptRow,
		blackHoleRow,
		bigPathRow,
		manyPathsRow,
		sharedRow,
		prefetchRow,
		graphRow,
		memoryRow,
		schedulerRow,
		idleRow,
	}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1 // a row could not be measured; a goal that is missed is a result
	exitUsage  = 2
)

type settings struct {
	bin, only, jsonFile, into string
	list                      bool
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var s settings
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&s.bin, "bin", "bin", "the `directory` of the programs")
	flags.StringVar(&s.only, "only", "", "measure these rows only: their `names`, separated by commas")
	flags.StringVar(&s.jsonFile, "json", "", "keep the results in this `file`, beside those of other rows")
	flags.StringVar(&s.into, "into", "", "replace the table in this Markdown `file` by one of all results in the JSON file")
	flags.BoolVar(&s.list, "list", false, "list the rows and measure nothing")
	if err := flags.Parse(args); err != nil {
		return exitUsage
	}
	chosen, err := choose(rows(), s.only)
	if err != nil || flags.NArg() > 0 || s.into != "" && s.jsonFile == "" {
		fmt.Fprintln(stderr, "bench: wrong arguments:", errors.Join(err, errors.New("see bench -h")))
		return exitUsage
	}
	if s.list {
		for _, r := range chosen {
			fmt.Fprintf(stdout, "%-12s %s\n", r.name, r.work)
		}
		return exitOK
	}
	if err := measureAll(ctx, s, chosen, stdout, stderr); err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return exitFailed
	}
	return exitOK
}

// choose returns the rows named in only, all if that is "".
func choose(all []row, only string) ([]row, error) {
	if only == "" {
		return all, nil
	}
	var chosen []row
	for name := range strings.SplitSeq(only, ",") {
		n := slices.IndexFunc(all, func(r row) bool { return r.name == strings.TrimSpace(name) })
		if n < 0 {
			return nil, fmt.Errorf("there is no row %q", name)
		}
		chosen = append(chosen, all[n])
	}
	return chosen, nil
}

// measureAll measures rows one after the other. One that fails does not keep the
// others from being measured.
func measureAll(ctx context.Context, s settings, chosen []row, stdout, stderr io.Writer) error {
	bin, err := filepath.Abs(s.bin)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	book, err := openBook(s.jsonFile)
	if err != nil {
		return err
	}
	b := &bench{bin: bin, own: filepath.Dir(self), out: stdout, log: slog.New(slog.NewTextHandler(stderr, nil))}
	if slices.ContainsFunc(chosen, func(r row) bool { return r.needsFleet }) {
		if err := b.prepare(ctx); err != nil {
			return err
		}
	}
	var errs []error
	for _, r := range chosen {
		e, err := b.measure(ctx, r)
		if err != nil {
			errs = append(errs, fmt.Errorf("row %s: %w", r.name, err))
			continue
		}
		book.put(e)
	}
	writeTable(stdout, book.measured(chosen))
	errs = append(errs, book.save(s.jsonFile), book.insertInto(s.into, rows()))
	return errors.Join(errs...)
}

// A bench is what rows are measured with.
type bench struct {
	bin string // the directory of nix-dispatchd and the others
	own string // that of this program, and of bare and barehook
	out io.Writer
	log *slog.Logger
}

// prepare sees to it that hosts can be made and the programs are there.
func (b *bench) prepare(ctx context.Context) error {
	if err := fleet.Available(); err != nil {
		return fmt.Errorf("no machines can be made here: %w", err)
	}
	for dir, programs := range map[string][]string{
		b.bin: {"nix-dispatchd", "nix-dispatch", "nix-dispatch-hook"},
		b.own: {"bare", "barehook"},
	} {
		for _, program := range programs {
			if _, err := os.Stat(filepath.Join(dir, program)); err != nil {
				return fmt.Errorf("the programs must be built first ('make bench' does it): %w", err)
			}
		}
	}
	return errors.Join(fleet.EnsureTools(ctx, b.log), fleet.Prepare(ctx, b.log))
}

// say tells of progress.
func (b *bench) say(format string, args ...any) { fmt.Fprintf(b.out, format+"\n", args...) }

// measure measures one row, and notes under which conditions.
func (b *bench) measure(ctx context.Context, r row) (entry, error) {
	b.say("== %s: %s", r.name, r.work)
	ctx, cancel := context.WithTimeout(ctx, rowBound)
	defer cancel()
	e := entry{Row: r.name, Work: r.work, Conditions: conditionsNow()}
	started := time.Now()
	var err error
	e.Figures, err = r.run(ctx, b)
	b.say("== %s: %.0f s", r.name, time.Since(started).Seconds())
	return e, err
}

// rowBound ends a row that hangs.
const rowBound = 20 * time.Minute
