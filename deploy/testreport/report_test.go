package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// emit is a command that prints lines.
func emit(t *testing.T, exit int, lines ...string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "out")
	if err := os.WriteFile(name, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("step: cat %s; exit %d", name, exit)
}

func TestVerdict(t *testing.T) {
	const (
		runA  = `{"Action":"run","Package":"p","Test":"TestA"}`
		runB  = `{"Action":"run","Package":"p","Test":"TestA/b"}`
		pass  = `{"Action":"pass","Package":"p","Elapsed":0.1}`
		fail  = `{"Action":"fail","Package":"p","Elapsed":0.1}`
		passA = `{"Action":"pass","Package":"p","Test":"TestA"}`
		passB = `{"Action":"pass","Package":"p","Test":"TestA/b"}`
		failA = `{"Action":"fail","Package":"p","Test":"TestA"}`
		saysA = `{"Action":"output","Package":"p","Test":"TestA","Output":"    a_test.go:7: want 1\n"}`
		says  = `{"Action":"output","Package":"p","Output":"panic: no\n"}`
		skipA = `{"Action":"skip","Package":"p","Test":"TestA"}`
		skip  = `{"Action":"skip","Package":"p"}`
		build = `{"ImportPath":"p.test","Action":"build-output","Output":"p.go:1: no\n"}`
		bad   = `{"Action":"fail","Package":"p","FailedBuild":"p.test"}`
	)
	for name, tc := range map[string]struct {
		steps   []string
		status  int
		verdict string
		shows   []string
	}{
		"all pass":                {[]string{emit(t, 0, runA, runB, passB, passA, pass)}, 0, "2 passed, 0 failed", []string{"p (2)"}},
		"steps add up":            {[]string{emit(t, 0, runA, passA, pass), "vet: true"}, 0, "2 passed, 0 failed", nil},
		"a test fails":            {[]string{emit(t, 1, runA, saysA, failA, fail)}, 1, "0 passed, 1 failed", []string{"a_test.go:7: want 1", "failed: p TestA"}},
		"a package fails":         {[]string{emit(t, 1, runA, passA, says, fail)}, 1, "1 passed, 1 failed", []string{"panic: no"}},
		"does not compile":        {[]string{emit(t, 1, build, bad)}, 1, "0 passed, 1 failed", []string{"p.go:1: no"}},
		"a test never ends":       {[]string{emit(t, 1, runA, saysA, fail)}, 1, "0 passed, 1 failed", []string{"TestA (did not end)", "want 1"}},
		"output breaks off":       {[]string{emit(t, 0, runA)}, 1, "0 passed, 1 failed", []string{"did not end"}},
		"status alone fails":      {[]string{emit(t, 1, runA, passA, pass)}, 1, "1 passed, 1 failed", []string{"exit status 1"}},
		"no tests":                {[]string{emit(t, 0, skip)}, 1, "0 passed, 1 failed", []string{"ran no tests"}},
		"a check fails":           {[]string{"vet: echo bad; false"}, 1, "0 passed, 1 failed", []string{"bad", "failed: vet"}},
		"a skip is no pass":       {[]string{emit(t, 0, runA, saysA, skipA, pass)}, 1, "0 passed, 0 failed, 1 skipped", []string{"p TestA: a_test.go:7: want 1"}},
		"a skip by name":          {[]string{"-opt-in=^TestA$", emit(t, 0, runA, saysA, skipA, runB, passB, pass)}, 0, "1 passed, 0 failed", []string{"left out  TestA"}},
		"a skip by reason":        {[]string{"-opt-in=want 1$", emit(t, 0, runA, saysA, skipA, runB, passB, pass)}, 0, "1 passed, 0 failed", []string{"left out  TestA"}},
		"steps beside each other": {[]string{emit(t, 0, runA, passA, pass), "+" + emit(t, 1, runA, saysA, failA, runB, passB, fail), "+vet: true"}, 1, "3 passed, 1 failed", []string{"a_test.go:7: want 1", "failed: p TestA"}},
		"goes on after a failure": {[]string{"a: false", "b: true"}, 1, "1 passed, 1 failed", nil},
	} {
		t.Run(name, func(t *testing.T) {
			var out, errs bytes.Buffer
			status := run(t.Context(), tc.steps, &out, &lockedWriter{w: &errs})
			if status != tc.status {
				t.Errorf("status = %d, want %d", status, tc.status)
			}
			lines := strings.Split(strings.TrimSpace(out.String()), "\n")
			if last := lines[len(lines)-1]; last != tc.verdict {
				t.Errorf("last line = %q, want %q", last, tc.verdict)
			}
			for _, want := range tc.shows {
				if !strings.Contains(out.String(), want) {
					t.Errorf("output lacks %q:\n%s", want, out.String())
				}
			}
		})
	}
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"no colon"}, {"-opt-in=(", "a: true"}, {"-odd"}} {
		var out, errs bytes.Buffer
		if status := run(t.Context(), args, &out, &errs); status != 2 {
			t.Errorf("run(%q) = %d, want 2", args, status)
		}
	}
}

// What a command orphans and has ended is gone, as it is where init is the parent.
func TestOrphansAreNoZombies(t *testing.T) {
	out := filepath.Join(t.TempDir(), "pid")
	command := fmt.Sprintf("step: sh -c 'sleep 0.3 & echo $! >%s'; n=0; while test -e /proc/$(cat %[1]s); do n=$((n+1)); test $n -lt 600 || exit 1; sleep 0.1; done", out)
	cmd := exec.Command(os.Args[0], command)
	cmd.Env = append(os.Environ(), "TESTREPORT_TEST_MAIN=1")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: an orphan that has ended is still there after a minute:\n%s", err, said)
	}
}

// Each of two steps ends only when the other has begun.
func TestStepsBesideEachOther(t *testing.T) {
	a, b := filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")
	meet := func(mine, other string) string {
		return fmt.Sprintf("touch %s; n=0; until test -e %s; do n=$((n+1)); test $n -lt 1000 || exit 1; sleep 0.02; done", mine, other)
	}
	var out, errs bytes.Buffer
	if status := run(t.Context(), []string{"a: " + meet(a, b), "+b: " + meet(b, a)}, &out, &lockedWriter{w: &errs}); status != 0 {
		t.Errorf("status = %d\n%s%s", status, out.String(), errs.String())
	}
}

// This test's process is testreport when it is asked to be.
func TestMain(m *testing.M) {
	if os.Getenv("TESTREPORT_TEST_MAIN") != "" {
		main()
	}
	os.Exit(m.Run())
}

// An interrupted testreport leaves no process, whatever its group, and no temporary
// file, and runs what is to be run finally.
func TestInterruptLeavesNothing(t *testing.T) {
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		dir := t.TempDir()
		note := func(name string) string { return filepath.Join(dir, name) }
		command := fmt.Sprintf("step: echo $TMPDIR >%s; touch $TMPDIR/file; sleep 4711 & echo $! >%s; "+
			"setsid sh -c 'trap \"\" INT; echo $$ >%s; echo >%s; while :; do sleep 0.1; done'",
			note("temp"), note("pid-1"), note("pid-2"), note("ready"))
		cmd := exec.Command(os.Args[0], "-finally", "echo >"+note("finally"), command)
		cmd.Env = append(os.Environ(), "TESTREPORT_TEST_MAIN=1")
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, t.Output()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			if _, err := os.Stat(note("ready")); err == nil {
				break
			}
			if time.Now().After(end) {
				t.Fatal("the step has not begun after a minute")
			}
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err == nil {
			t.Errorf("%v: testreport succeeds:\n%s", sig, &out)
		}
		for _, name := range []string{"pid-1", "pid-2"} {
			text, err := os.ReadFile(note(name))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat("/proc/" + strings.TrimSpace(string(text))); err == nil {
				t.Errorf("%v: %s is left running:\n%s", sig, name, &out)
			}
		}
		temp, err := os.ReadFile(note("temp"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(strings.TrimSpace(string(temp))); err == nil {
			t.Errorf("%v: %s is left", sig, temp)
		}
		if _, err := os.Stat(note("finally")); err != nil {
			t.Errorf("%v: the last command was not run: %v", sig, err)
		}
		if lines := strings.Split(strings.TrimSpace(out.String()), "\n"); lines[len(lines)-1] != "0 passed, 1 failed" {
			t.Errorf("%v: the last line is %q", sig, lines[len(lines)-1])
		}
	}
}
