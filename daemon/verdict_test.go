package daemon

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

// The messages are those of real builds with the Nix named.
func TestJudge(t *testing.T) {
	ordinary, fixed := new(nix.Derivation), new(nix.Derivation)
	const drvPath, input = "/nix/store/x.drv", nix.StorePath("/nix/store/in")
	ordinary.Platform, fixed.Platform = "x86_64-linux", "x86_64-linux"
	ordinary.Outputs = map[string]nix.DerivationOutput{"out": {Path: "/nix/store/x"}}
	fixed.Outputs = map[string]nix.DerivationOutput{"out": {Path: "/nix/store/x", HashAlgo: "sha256", Hash: "00"}}
	const full = "builder for '/nix/store/x.drv' failed with exit code 1;\nlast 1 log lines:\n> %s\nFor full logs, run 'nix log /nix/store/x.drv'."
	logged := func(line string) string { return strings.ReplaceAll(full, "%s", line) }
	for _, tt := range []struct {
		name    string
		status  nix.BuildStatus
		message string
		drv     *nix.Derivation
		want    blame
	}{
		{"fails", nix.PermanentFailure, logged("oops"), ordinary, byDerivation},
		{"fails and speaks of disks", nix.PermanentFailure, logged("cp: No space left on device"), ordinary, byDerivation},
		{"a download that fails", nix.TransientFailure, logged("curl: (6) no such host"), fixed, byDerivation},
		{"a download that speaks of disks", nix.TransientFailure, logged("lack of free disk space"), fixed, byDerivation},
		{"disk full, 2.8", nix.TransientFailure,
			logged("write error") + "\nnote: build failure may have been caused by lack of free disk space", ordinary, byDisk},
		{"disk full while downloading", nix.TransientFailure,
			logged("write error") + "\nnote: build failure may have been caused by lack of free disk space", fixed, byDisk},
		{"disk full, the store's", nix.MiscFailure, "error: writing to file: \x1b[31;1mNo space left on device\x1b[0m", ordinary, byDisk},
		{"the database's disk full, 2.8", nix.MiscFailure, "executing SQLite statement 'insert': database or disk is full (in '/nix/var/nix/db/db.sqlite')", ordinary, byDisk},
		{"the database's disk full, 2.34", nix.MiscFailure,
			"executing SQLite statement 'insert': database or disk is full, database or disk is full (in '/nix/var/nix/db/db.sqlite')", ordinary, byDisk},
		{"substitutes failed", nix.TransientFailure, "some substitutes for the outputs of derivation failed", ordinary, byMachine},
		{"no such feature, 2.26", nix.MiscFailure,
			"a 'x86_64-linux' with features {kvm} is required to build '/nix/store/x.drv', but I am a 'x86_64-linux' with features {}", ordinary, byMachine},
		{"no such feature, 2.34", nix.InputRejected,
			"Cannot build '/nix/store/x.drv'.\nReason: \x1b[31;1mmissing system features\x1b[0m\nRequired features: {kvm}", ordinary, byMachine},
		{"no such system, 2.34", nix.InputRejected, "Cannot build '/nix/store/x.drv'.\nReason: platform mismatch", ordinary, byMachine},
		{"an input is gone", nix.MiscFailure, "error: path '/nix/store/in' is not valid", ordinary, byMachine},
		{"an input is gone", nix.MiscFailure, "dependency '/nix/store/in' of '/nix/store/x.drv' does not exist, and substitution is disabled", ordinary, byMachine},
		{"a path that is no input", nix.MiscFailure, "path '/nix/store/other' is not valid", ordinary, unclear},
		{"killed, 2.26", nix.PermanentFailure, "builder for '/nix/store/x.drv' failed due to signal 9 (Killed)", ordinary, byKilling},
		{"killed, 2.34", nix.PermanentFailure, "Cannot build '/nix/store/x.drv'.\nReason: builder failed due to signal 9 (Killed).", ordinary, byKilling},
		{"killed by itself", nix.PermanentFailure, "builder for '/nix/store/x.drv' failed due to signal 15 (Terminated)", ordinary, byDerivation},
		{"an output that is refused", nix.OutputRejected, "path '/nix/store/x' is not valid", ordinary, byDerivation},
		{"hash mismatch", nix.OutputRejected, "hash mismatch in fixed-output derivation '/nix/store/x.drv'", fixed, byDerivation},
		{"timed out", nix.TimedOut, "timed out after 3 seconds", ordinary, byDerivation},
		{"log limit", nix.LogLimitExceeded, "killed after writing more than 3 bytes of log output", ordinary, byDerivation},
		{"not deterministic", nix.NotDeterministic, "may not be deterministic", ordinary, byDerivation},
		{"no user to build as", nix.MiscFailure, "all build users are currently in use; consider creating additional users and adding them to the 'nixbld' group", ordinary, unclear},
		{"a directory to build in, 2.34", nix.MiscFailure, "error: Path \"/nix/var/nix/builds\" is world-writable or a symlink. That's not allowed for security.", ordinary, unclear},
		{"unknown", 99, "a later Nix's", ordinary, byDerivation},
	} {
		if got := judge(nix.BuildResult{Status: tt.status, ErrorMsg: tt.message}, drvPath, tt.drv, []nix.StorePath{input}); got != tt.want {
			t.Errorf("%s: blame %v, want %v", tt.name, got, tt.want)
		}
	}
}

// said are sentences that decide, in messages of builds of /nix/store/x.drv.
var said = []string{
	"No space left on device",
	"x: No space left on device",
	"database or disk is full",
	"x: database or disk is full (in 'x')",
	"note: build failure may have been caused by lack of free disk space",
	"a 'x86_64-linux' with features {} is required to build '/nix/store/x.drv', but I am a 'x86_64-linux' with features {}",
	"Cannot build '/nix/store/x.drv'.\nReason: platform mismatch",
	"Cannot build '/nix/store/x.drv'.\nReason: missing system features",
	"path '/nix/store/in' is not valid",
	"dependency '/nix/store/in' of '/nix/store/x.drv' does not exist, and substitution is disabled",
	"builder for '/nix/store/x.drv' failed due to signal 9 (Killed)",
	"Cannot build '/nix/store/x.drv'.\nReason: builder failed due to signal 9 (Killed).",
}

// quoting are messages of Nix, of the three versions, into which a derivation puts words,
// in place of @.
var quoting = []string{
	"'exportReferencesGraph' contains a non-store path '@'",
	"odd number of tokens in 'exportReferencesGraph': '@'",
	"invalid file name '@' in 'exportReferencesGraph'",
	"path '@' is not in the Nix store",
	"name '@' is not valid",
	"derivation '/nix/store/x.drv' requested impure path '@', but it was not in allowed-impure-host-deps",
	"getting attributes of required path '@': No such file or directory",
	"unsupported builtin builder '@'",
	"executing '@': No such file or directory",
	"derivation contains an illegal reference specifier '@'",
	"attribute '@' of derivation '/nix/store/x.drv' must be a list of strings",
	"Expected JSON value to be of type 'array' but it is of type 'string': \"@\"",
	"builder for '/nix/store/x.drv' failed with exit code 1;\nlast 1 log lines:\n> @\nFor full logs, run 'nix log /nix/store/x.drv'.",
	"Cannot build '/nix/store/x.drv'.\nReason: builder failed with exit code 1.\nLast 1 log lines:\n> @\nFor full logs, run:\n  nix log /nix/store/x.drv",
	"Cannot build '/nix/store/x.drv'.\nReason: builder failed with exit code 1.\nLast 1 log lines:\n> x\n> @\nFor full logs, run:\n  nix log /nix/store/x.drv",
}

// TestDerivationCannotBlameAMachine has derivations put what decides into messages of Nix.
func TestDerivationCannotBlameAMachine(t *testing.T) {
	t.Parallel()
	const drvPath = "/nix/store/x.drv"
	drv := new(nix.Derivation)
	drv.Platform = "x86_64-linux"
	drv.Outputs = map[string]nix.DerivationOutput{"out": {Path: "/nix/store/x"}}
	for _, message := range quoting {
		for _, words := range said {
			for _, around := range []string{"@", "/@", "\n@\n", "'\n@", "'@", "\x1b[35;1m@\x1b[0m", "> x\n@", "'\n> x\n@\n> '"} {
				if strings.Contains(message, "\n> @") && strings.Contains(around+words, "\n") {
					continue // a line of a log is one line
				}
				text := strings.ReplaceAll(message, "@", strings.ReplaceAll(around, "@", words))
				for _, status := range []nix.BuildStatus{nix.PermanentFailure, nix.MiscFailure, nix.InputRejected} {
					want := unclear
					if status == nix.PermanentFailure {
						want = byDerivation
					}
					if got := judge(nix.BuildResult{Status: status, ErrorMsg: text}, drvPath, drv, []nix.StorePath{"/nix/store/in"}); got != want {
						t.Errorf("%v %q: blame %v, want %v", status, text, got, want)
					}
				}
			}
		}
	}
}

// TestWordsOfADerivationAreNotBelieved has a message end in words that are in the
// derivation as well: whoever said them, they do not decide.
func TestWordsOfADerivationAreNotBelieved(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*nix.Derivation){
		"builder":  func(d *nix.Derivation) { d.Builder = "/No space left on device" },
		"argument": func(d *nix.Derivation) { d.Args = []string{"x", "No space left on device"} },
		"platform": func(d *nix.Derivation) { d.Platform = "No space left on device" },
		"value":    func(d *nix.Derivation) { d.Env = map[string]string{"x": "'No space left on device'"} },
		"name":     func(d *nix.Derivation) { d.Env = map[string]string{"No space left on device": ""} },
		"JSON":     func(d *nix.Derivation) { d.Env = map[string]string{"__json": `{"x":["\u004eo space left on device"]}`} },
		"JSON key": func(d *nix.Derivation) { d.Env = map[string]string{"__json": `{"\u004eo space left on device":1}`} },
		"no JSON":  func(d *nix.Derivation) { d.Env = map[string]string{"__json": `{x`} },
		"none":     func(d *nix.Derivation) { d.Env = map[string]string{"__json": `{"x":["y"]}`, "x": "y"} },
	} {
		drv := new(nix.Derivation)
		change(drv)
		want := unclear
		if name == "none" {
			want = byDisk
		}
		if got := judge(nix.BuildResult{Status: nix.MiscFailure, ErrorMsg: "writing: No space left on device"}, "/nix/store/x.drv", drv, nil); got != want {
			t.Errorf("%s: blame %v, want %v", name, got, want)
		}
	}
}

// about is a result with the name of the derivation in it, in place of DRV.
func about(r nix.BuildResult, req wiretest.BuildRequest) nix.BuildResult {
	r.ErrorMsg = strings.ReplaceAll(r.ErrorMsg, "DRV", string(req.DrvPath))
	return r
}

// TestUnclearFailureIsTriedOnceElsewhere has every builder process killed, or no
// machine able to run one.
func TestUnclearFailureIsTriedOnceElsewhere(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		result nix.BuildResult
		want   dispatchv1.BuildStatus
	}{
		{nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "builder for 'DRV' failed due to signal 9 (Killed)"}, dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE},
		{nix.BuildResult{Status: nix.MiscFailure, ErrorMsg: "error: cannot fork"}, dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE},
	} {
		for _, machines := range []int{1, 2, 3} {
			var all []*fakeMachine
			for _, name := range []string{"m1", "m2", "m3"}[:machines] {
				m := namedMachine("ssh-ng", name)
				m.build = func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult { return about(tt.result, req) }
				all = append(all, m)
			}
			s := newSite(t, all...)
			st := s.build(s.drv("thing", drvConfig{}))
			if st.status() != tt.want || !strings.Contains(st.finished.GetError(), strings.TrimPrefix(tt.result.ErrorMsg, "builder for 'DRV' ")) {
				t.Errorf("%d machines: finished = %v, want the machine's verdict, %v", machines, st.finished, tt.result)
			}
			placed := st.placed()
			if want := min(machines, 2); len(placed) != want || len(slices.Compact(slices.Sorted(slices.Values(placed)))) != want {
				t.Errorf("%d machines: %s: tried on %v, want %d different ones", machines, tt.result.ErrorMsg, placed, want)
			}
		}
	}
}

// TestKilledBuildSucceedsElsewhere has one machine without memory.
func TestKilledBuildSucceedsElsewhere(t *testing.T) {
	t.Parallel()
	m, m2 := namedMachine("ssh", "m1"), namedMachine("ssh", "m2")
	m.build = func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult {
		return about(nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "builder for 'DRV' failed due to signal 9 (Killed)"}, req)
	}
	s := newSite(t, m, m2)
	st := s.mustBuild(s.drv("thing", drvConfig{}))
	if diff := cmp.Diff([]string{m.uri(), m2.uri()}, st.placed()); diff != "" {
		t.Errorf("placed (-want +got):\n%s", diff)
	}
}
