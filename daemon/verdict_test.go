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
		{"the database's disk full", nix.MiscFailure, "executing SQLite statement: database or disk is full", ordinary, byDisk},
		{"substitutes failed", nix.TransientFailure, "some substitutes for the outputs of derivation failed", ordinary, byMachine},
		{"no such feature, 2.26", nix.MiscFailure,
			"a 'x86_64-linux' with features {kvm} is required to build '/nix/store/x.drv', but I am a 'x86_64-linux' with features {}", ordinary, byMachine},
		{"no such feature, 2.34", nix.InputRejected,
			"Cannot build '/nix/store/x.drv'.\nReason: \x1b[31;1mmissing system features\x1b[0m\nRequired features: {kvm}", ordinary, byMachine},
		{"no such system, 2.34", nix.InputRejected, "Cannot build '/nix/store/x.drv'.\nReason: platform mismatch", ordinary, byMachine},
		{"an input is gone", nix.MiscFailure, "path '/nix/store/in' is not valid", ordinary, byMachine},
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
		if got := judge(nix.BuildResult{Status: tt.status, ErrorMsg: tt.message}, tt.drv); got != tt.want {
			t.Errorf("%s: blame %v, want %v", tt.name, got, tt.want)
		}
	}
}

// TestUnclearFailureIsTriedOnceElsewhere has every builder process killed, or no
// machine able to run one.
func TestUnclearFailureIsTriedOnceElsewhere(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		result nix.BuildResult
		want   dispatchv1.BuildStatus
	}{
		{nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "builder for 'x' failed due to signal 9 (Killed)"}, dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE},
		{nix.BuildResult{Status: nix.MiscFailure, ErrorMsg: "error: cannot fork"}, dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE},
	} {
		for _, machines := range []int{1, 2, 3} {
			var all []*fakeMachine
			for _, name := range []string{"m1", "m2", "m3"}[:machines] {
				m := namedMachine("ssh-ng", name)
				m.build = func(context.Context, wiretest.BuildRequest) nix.BuildResult { return tt.result }
				all = append(all, m)
			}
			s := newSite(t, all...)
			st := s.build(s.drv("thing", drvConfig{}))
			if st.status() != tt.want || !strings.Contains(st.finished.GetError(), tt.result.ErrorMsg) {
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
	m.build = func(context.Context, wiretest.BuildRequest) nix.BuildResult {
		return nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "builder for 'x' failed due to signal 9 (Killed)"}
	}
	s := newSite(t, m, m2)
	st := s.mustBuild(s.drv("thing", drvConfig{}))
	if diff := cmp.Diff([]string{m.uri(), m2.uri()}, st.placed()); diff != "" {
		t.Errorf("placed (-want +got):\n%s", diff)
	}
}
