package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/proto/nix"
)

func checkMachines(t *testing.T, stdin string, args ...string) (status int, out, errs string) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	status = run(t.Context(), append([]string{"nix-dispatch", "machines"}, args...), stdio{strings.NewReader(stdin), &stdout, &stderr})
	return status, stdout.String(), stderr.String()
}

var localSystem = nix.SystemName(runtime.GOOS, runtime.GOARCH)

func TestMachinesCheckPrintsJSON(t *testing.T) {
	const text = "ssh://mac?b=1&a=x aarch64-darwin,x86_64-darwin /k 4 2.5 kvm,a c,b YQ==\nhost\nlocal , - 0 3.1"
	status, out, errs := checkMachines(t, text, "check", "--json", "-")
	if status != exitOK {
		t.Errorf("status %d, stderr %s", status, errs)
	}
	var got []map[string]any
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	none := []any{}
	want := []map[string]any{
		{
			"storeUri": "ssh://mac?a=x&b=1", "systems": []any{"aarch64-darwin", "x86_64-darwin"}, "sshKey": "/k", "maxJobs": 4.0,
			"speedFactor": 2.5, "supportedFeatures": []any{"a", "kvm"}, "mandatoryFeatures": []any{"b", "c"}, "sshPublicHostKey": "YQ==",
		},
		{
			"storeUri": "ssh://host", "systems": []any{localSystem}, "sshKey": "", "maxJobs": 1.0,
			"speedFactor": 1.0, "supportedFeatures": none, "mandatoryFeatures": none, "sshPublicHostKey": "",
		},
		{
			"storeUri": "local", "systems": none, "sshKey": "", "maxJobs": 0.0,
			"speedFactor": 3.1, "supportedFeatures": none, "mandatoryFeatures": none, "sshPublicHostKey": "",
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("machines (-want +got):\n%s", diff)
	}
	if !strings.Contains(out, "?a=x&b=1") {
		t.Errorf("the URI is mangled in %s", out)
	}
	for _, warning := range []string{"public host key", "max jobs"} {
		if !strings.Contains(errs, warning) {
			t.Errorf("no warning of the %s in %s", warning, errs)
		}
	}
}

func TestMachinesCheckPrintsLinesThatReadTheSameAgain(t *testing.T) {
	const text = "ssh-ng://u@h:22 b,a /k 4 2.5 kvm c YQ==\nhost\nlocal , - 0 1e-3"
	status, out, _ := checkMachines(t, "", "check", "--builders", text)
	if status != exitOK || strings.Count(out, "\n") != 3 {
		t.Errorf("status %d, want three lines:\n%s", status, out)
	}
	if !strings.HasPrefix(out, "ssh-ng://u@h:22 a,b ") {
		t.Errorf("first line:\n%s", out)
	}
	if _, again, _ := checkMachines(t, out, "check", "-"); again != out {
		t.Errorf("printed\n%sread again as\n%s", out, again)
	}
}

func TestMachinesCheckShowsBadEntriesAndPrintsTheOthers(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	included := "ok2\nworse - - - quick\n"
	if err := os.WriteFile(filepath.Join(dir, "more"), []byte(included), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "machines"), []byte("ok1\nbad - - many\n@more\n@missing\n@machines\nodd\x1b[1m\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	status, out, errs := checkMachines(t, "", "check", "machines")
	if status != exitFailed {
		t.Errorf("status %d, want %d", status, exitFailed)
	}
	if !strings.Contains(out, "ssh://ok1 ") || !strings.Contains(out, "ssh://ok2 ") || strings.Count(out, "\n") != 2 {
		t.Errorf("want ok1 and ok2:\n%s", out)
	}
	for _, want := range []string{
		`error: machines:2: column #3 (max jobs): found "many", expected a whole number`,
		`error: more:2: column #4 (speed factor): found "quick", expected a finite number`,
		"machines -> machines", `error: machines:6: column #0 (store URI): found "odd\x1b[1m"`,
	} {
		if !strings.Contains(errs, want) {
			t.Errorf("stderr does not say %q:\n%s", want, errs)
		}
	}
	if strings.Count(errs, "\n") != 4 {
		t.Errorf("want four lines:\n%s", errs)
	}
	if status, out, _ = checkMachines(t, "", "check", "--json", "--builders", "bad - - many"); status != exitFailed || out != "[]\n" {
		t.Errorf("no good entry: status %d, printed %q, want %d and an empty array", status, out, exitFailed)
	}
}

func TestMachinesCheckQuotesWhatATerminalMightActOn(t *testing.T) {
	status, out, _ := checkMachines(t, "h - - - - a\x1b[2J\u009b", "check", "-")
	if status != exitOK || strings.ContainsAny(out, "\x1b\u009b") || !strings.Contains(out, `"a\x1b[2J\u009b"`) {
		t.Errorf("status %d, printed %q", status, out)
	}
}

func TestMachinesCheckEmptyBuildersIsNoMachine(t *testing.T) {
	if status, out, errs := checkMachines(t, "", "check", "--json", "--builders", ""); status != exitOK || out != "[]\n" || errs != "" {
		t.Errorf("status %d, stdout %q, stderr %q", status, out, errs)
	}
}

func TestMachinesCheckFailsWithoutTheNamedFile(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "machines")
	for _, file := range []string{missing, t.TempDir()} {
		status, out, errs := checkMachines(t, "", "check", file)
		if status != exitFailed || out != "" || !strings.Contains(errs, file) {
			t.Errorf("%s: status %d, stdout %q, stderr %q", file, status, out, errs)
		}
	}
	status, _, errs := checkMachines(t, strings.Repeat("#", nix.MaxMachinesSize+1), "check", "-")
	if status != exitFailed || !strings.Contains(errs, "larger than") {
		t.Errorf("too much input: status %d, stderr %q", status, errs)
	}
}

func TestMachinesUsage(t *testing.T) {
	for _, args := range [][]string{
		{}, {"list"}, {"check", "a", "b"}, {"check", "--builders", "x", "file"}, {"check", "--builders"}, {"check", "--nope"},
	} {
		if status, out, errs := checkMachines(t, "", args...); status != exitUsage || out != "" || errs == "" {
			t.Errorf("%q: status %d, stdout %q, stderr %q", args, status, out, errs)
		}
	}
	if status, out, errs := checkMachines(t, "", "check", "--help"); status != exitOK || !strings.Contains(out+errs, "Examples:") {
		t.Errorf("--help: status %d, %q", status, out+errs)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestMachinesCheckNoticesThatNobodyReadsIt(t *testing.T) {
	for _, args := range [][]string{{"check", "--builders", "h"}, {"check", "--json", "--builders", "h"}} {
		var stderr bytes.Buffer
		if status := run(t.Context(), append([]string{"nix-dispatch", "machines"}, args...), stdio{nil, brokenWriter{}, &stderr}); status != exitFailed || !strings.Contains(stderr.String(), "broken pipe") {
			t.Errorf("%q: status %d, stderr %q", args, status, &stderr)
		}
	}
}
