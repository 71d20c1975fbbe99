package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// slow is from how many seconds on a test is shown when it passes.
const slow = 1.0

// maxOutput bounds what is kept of one test's output: its end.
const maxOutput = 256 << 10

// An event is one line of "go test -json" (go doc test2json, and the build
// events of go help buildjson).
type event struct {
	Action      string
	Package     string
	ImportPath  string
	Test        string // "" for the package itself
	Output      string
	Elapsed     float64
	FailedBuild string
}

// A testID names a test, or with test "" a package.
type testID struct{ pkg, test string }

func (id testID) String() string {
	if id.test == "" {
		return id.pkg
	}
	return id.pkg + " " + id.test
}

// A step is one command and what became of its tests. It is for one goroutine;
// steps that run beside each other share nothing but out.
type step struct {
	name, command string
	temp          string    // TMPDIR for the command; "" for the system's
	out           io.Writer // safe for concurrent use
	mayskip       *regexp.Regexp

	passed, skipped int
	failed          []string // names
	skips           []string // names and reasons

	events   int               // how many lines were events
	tests    int               // how many tests began
	output   map[testID]string // of what has not ended
	running  map[testID]bool   // tests that have not ended
	failedIn map[string]int    // failed tests by package
	passedIn map[string]int    // passed tests by package
	builds   map[string]string // compilers' messages by import path
}

func newStep(name, command string, out io.Writer, mayskip *regexp.Regexp) *step {
	return &step{
		name: name, command: command, out: out, mayskip: mayskip,
		output: make(map[testID]string), running: make(map[testID]bool),
		failedIn: make(map[string]int), passedIn: make(map[string]int),
		builds: make(map[string]string),
	}
}

// A lineWriter passes on what is written to it line by line.
type lineWriter struct {
	each func(line []byte)
	rest []byte // of a line whose end has not come
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.rest = append(w.rest, p...)
	for {
		n := bytes.IndexByte(w.rest, '\n') + 1
		if n == 0 {
			return len(p), nil
		}
		w.each(w.rest[:n])
		w.rest = w.rest[n:]
	}
}

// flush passes on a last line that has no end.
func (w *lineWriter) flush() {
	if len(w.rest) > 0 {
		w.each(w.rest)
		w.rest = nil
	}
}

// A lockedWriter is written to by one goroutine at a time.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func (s *step) ok() bool { return len(s.failed) == 0 }

// line takes one line of a command's output. What is no event is shown as it is.
func (s *step) line(line []byte) {
	var e event
	if err := json.Unmarshal(line, &e); err != nil || e.Action == "" {
		s.out.Write(line)
		return
	}
	s.events++
	id := testID{e.Package, e.Test}
	switch e.Action {
	case "run":
		s.tests++
		s.running[id] = true
	case "output":
		s.keep(id, e.Output)
	case "build-output":
		s.builds[e.ImportPath] += e.Output
	case "pass", "fail", "skip":
		delete(s.running, id)
		if id.test == "" {
			s.endPackage(e)
		} else {
			s.endTest(id, e)
		}
		delete(s.output, id)
	}
}

// keep appends to a test's output, without the lines that only tell its progress.
func (s *step) keep(id testID, text string) {
	if strings.HasPrefix(text, "=== ") {
		return
	}
	text = s.output[id] + text
	if len(text) > maxOutput {
		text = text[len(text)-maxOutput:]
	}
	s.output[id] = text
}

func (s *step) endTest(id testID, e event) {
	top := !strings.Contains(id.test, "/")
	switch e.Action {
	case "pass":
		s.passed++
		s.passedIn[id.pkg]++
		if top && e.Elapsed >= slow {
			fmt.Fprintf(s.out, "   %6.1f s  %s\n", e.Elapsed, id.test)
		}
	case "fail":
		s.failedIn[id.pkg]++
		s.fail(id.String(), s.output[id])
	case "skip":
		reason := skipReason(s.output[id])
		if s.mayskip.MatchString(id.test) || s.mayskip.MatchString(reason) {
			fmt.Fprintf(s.out, "   left out  %s: %s\n", id.test, reason)
			return
		}
		s.skipped++
		s.skips = append(s.skips, id.String()+": "+reason)
	}
}

// skipReason is what a skipped test said, without the line about its end.
func skipReason(output string) string {
	said, _, _ := strings.Cut(output, "--- SKIP")
	return strings.Join(strings.Fields(said), " ")
}

// endPackage reports a package. One may fail without any of its tests: it does
// not compile, or its process died.
func (s *step) endPackage(e event) {
	lost := s.lose(e.Package)
	switch {
	case e.Action == "skip": // no test files
	case e.Action == "pass" && lost == 0:
		if s.passedIn[e.Package] > 0 {
			fmt.Fprintf(s.out, "ok %6.1f s  %s (%d)\n", e.Elapsed, e.Package, s.passedIn[e.Package])
		}
	case s.failedIn[e.Package]+lost == 0:
		s.fail(e.Package, s.builds[e.FailedBuild]+s.output[testID{e.Package, ""}])
	default:
		fmt.Fprintf(s.out, "FAIL %4.1f s  %s\n", e.Elapsed, e.Package)
	}
}

// lose counts tests of a package as failed that began and never ended; "" is
// for all packages.
func (s *step) lose(pkg string) int {
	var lost []testID
	for id := range s.running {
		if pkg == "" || id.pkg == pkg {
			lost = append(lost, id)
		}
	}
	slices.SortFunc(lost, func(a, b testID) int { return strings.Compare(a.String(), b.String()) })
	for _, id := range lost {
		delete(s.running, id)
		s.fail(id.String()+" (did not end)", s.output[id])
	}
	return len(lost)
}

func (s *step) fail(name, output string) {
	s.failed = append(s.failed, name)
	if output != "" && !strings.HasSuffix(output, "\n") {
		output += "\n"
	}
	fmt.Fprintf(s.out, "--- FAILED: %s\n%s", name, output)
}

// finish ends a step whose command ended with err.
func (s *step) finish(err error) {
	s.lose("")
	switch {
	case s.events == 0 && err == nil:
		s.passed++
	case s.events > 0 && err == nil && s.tests == 0:
		s.fail(s.name, "it ran no tests")
	case err != nil && s.ok():
		s.fail(s.name, err.Error())
	}
}

// verdict prints the outcome of all steps, the last line for all to see, and tells
// whether all is well.
func verdict(out io.Writer, steps []*step) bool {
	var passed, failed, skipped int
	for _, s := range steps {
		passed, failed, skipped = passed+s.passed, failed+len(s.failed), skipped+s.skipped
		for _, name := range s.failed {
			fmt.Fprintf(out, "failed: %s\n", name)
		}
	}
	for _, s := range steps {
		for _, skip := range s.skips {
			fmt.Fprintf(out, "skipped, which counts as a failure here: %s\n", skip)
		}
	}
	fmt.Fprintf(out, "%d passed, %d failed", passed, failed)
	if skipped > 0 {
		fmt.Fprintf(out, ", %d skipped", skipped)
	}
	fmt.Fprintln(out)
	return failed == 0 && skipped == 0 && passed > 0
}
