package main

import (
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
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

// A report counts what passed. It is for one goroutine.
type report struct {
	out     io.Writer
	mayskip *regexp.Regexp

	passed, skipped int
	failed          []string // names
	skips           []string // names and reasons

	// Of the step in progress.
	failedBefore int
	events       int               // how many lines were events
	tests        int               // how many tests began
	output       map[testID]string // of what has not ended
	running      map[testID]bool   // tests that have not ended
	failedIn     map[string]int    // failed tests by package
	passedIn     map[string]int    // passed tests by package
	builds       map[string]string // compilers' messages by import path
}

func newReport(out io.Writer, mayskip *regexp.Regexp) *report {
	return &report{out: out, mayskip: mayskip}
}

func (r *report) begin() {
	r.failedBefore, r.events, r.tests = len(r.failed), 0, 0
	r.output, r.builds = make(map[testID]string), make(map[string]string)
	r.running = make(map[testID]bool)
	r.failedIn, r.passedIn = make(map[string]int), make(map[string]int)
}

func (r *report) stepOK() bool { return len(r.failed) == r.failedBefore }

// line takes one line of a command's output. What is no event is shown as it is.
func (r *report) line(line []byte) {
	var e event
	if err := json.Unmarshal(line, &e); err != nil || e.Action == "" {
		r.out.Write(line)
		return
	}
	r.events++
	id := testID{e.Package, e.Test}
	switch e.Action {
	case "run":
		r.tests++
		r.running[id] = true
	case "output":
		r.keep(id, e.Output)
	case "build-output":
		r.builds[e.ImportPath] += e.Output
	case "pass", "fail", "skip":
		delete(r.running, id)
		if id.test == "" {
			r.endPackage(e)
		} else {
			r.endTest(id, e)
		}
		delete(r.output, id)
	}
}

// keep appends to a test's output, without the lines that only tell its progress.
func (r *report) keep(id testID, text string) {
	if strings.HasPrefix(text, "=== ") {
		return
	}
	text = r.output[id] + text
	if len(text) > maxOutput {
		text = text[len(text)-maxOutput:]
	}
	r.output[id] = text
}

func (r *report) endTest(id testID, e event) {
	top := !strings.Contains(id.test, "/")
	switch e.Action {
	case "pass":
		r.passed++
		r.passedIn[id.pkg]++
		if top && e.Elapsed >= slow {
			fmt.Fprintf(r.out, "   %6.1f s  %s\n", e.Elapsed, id.test)
		}
	case "fail":
		r.failedIn[id.pkg]++
		r.fail(id.String(), r.output[id])
	case "skip":
		reason := skipReason(r.output[id])
		if r.mayskip.MatchString(id.test) {
			fmt.Fprintf(r.out, "   left out  %s: %s\n", id.test, reason)
			return
		}
		r.skipped++
		r.skips = append(r.skips, id.String()+": "+reason)
	}
}

// skipReason is what a skipped test said, without the line about its end.
func skipReason(output string) string {
	said, _, _ := strings.Cut(output, "--- SKIP")
	return strings.Join(strings.Fields(said), " ")
}

// endPackage reports a package. One may fail without any of its tests: it does
// not compile, or its process died.
func (r *report) endPackage(e event) {
	lost := r.lose(e.Package)
	switch {
	case e.Action == "skip": // no test files
	case e.Action == "pass" && lost == 0:
		if r.passedIn[e.Package] > 0 {
			fmt.Fprintf(r.out, "ok %6.1f s  %s (%d)\n", e.Elapsed, e.Package, r.passedIn[e.Package])
		}
	case r.failedIn[e.Package]+lost == 0:
		r.fail(e.Package, r.builds[e.FailedBuild]+r.output[testID{e.Package, ""}])
	default:
		fmt.Fprintf(r.out, "FAIL %4.1f s  %s\n", e.Elapsed, e.Package)
	}
}

// lose counts tests of a package as failed that began and never ended; "" is
// for all packages.
func (r *report) lose(pkg string) int {
	var lost []testID
	for id := range r.running {
		if pkg == "" || id.pkg == pkg {
			lost = append(lost, id)
		}
	}
	slices.SortFunc(lost, func(a, b testID) int { return strings.Compare(a.String(), b.String()) })
	for _, id := range lost {
		delete(r.running, id)
		r.fail(id.String()+" (did not end)", r.output[id])
	}
	return len(lost)
}

func (r *report) fail(name, output string) {
	r.failed = append(r.failed, name)
	fmt.Fprintf(r.out, "--- FAILED: %s\n%s", name, output)
	if output != "" && !strings.HasSuffix(output, "\n") {
		fmt.Fprintln(r.out)
	}
}

// finish ends a step whose command ended with err.
func (r *report) finish(name string, err error) {
	r.lose("")
	switch {
	case r.events == 0 && err == nil:
		r.passed++
	case r.events > 0 && err == nil && r.tests == 0:
		r.fail(name, "it ran no tests")
	case err != nil && r.stepOK():
		r.fail(name, err.Error())
	}
}

// verdict prints the outcome, the last line for all to see, and tells whether all
// is well.
func (r *report) verdict() bool {
	fmt.Fprintln(r.out)
	for _, name := range r.failed {
		fmt.Fprintf(r.out, "failed: %s\n", name)
	}
	for _, skip := range r.skips {
		fmt.Fprintf(r.out, "skipped, which counts as a failure here: %s\n", skip)
	}
	fmt.Fprintf(r.out, "%d passed, %d failed", r.passed, len(r.failed))
	if r.skipped > 0 {
		fmt.Fprintf(r.out, ", %d skipped", r.skipped)
	}
	fmt.Fprintln(r.out)
	return len(r.failed) == 0 && r.skipped == 0 && r.passed > 0
}
