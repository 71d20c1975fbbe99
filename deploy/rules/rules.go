package main

// A rule is one that the product must keep, the code that keeps it, and a test that
// fails without it.
type rule struct {
	// name says what holds.
	name string
	// file, relative to the top of the checkout, has the code that keeps the rule: the
	// text with, which stands there once. The text without is what is left when the rule
	// is removed, and still compiles.
	file, with, without string
	// pkg and test name a test that make test runs and that fails then. test is its name.
	pkg, test string
}

// rules are the most important ones: who may do what, what is trusted, and what becomes
// of a build.
var rules = []rule{
	// Who may do what.
	{
		"a stranger may not call",
		"daemon/peercred.go", "\treturn ok && c.in(gid)\n", "\treturn ok || c.in(gid)\n",
		"./daemon", "TestGate",
	},
	{
		"a group is the process's, not its user's",
		"daemon/peercred.go", "return c.gid == gid || slices.Contains(c.groups, gid) }", "return c.gid == gid || c.uid > 0 || slices.Contains(c.groups, gid) }",
		"./daemon", "TestGate",
	},
	{
		"only root and the daemon's user may command it",
		"daemon/peercred.go", "return c.uid == 0 || c.uid == uint32(os.Geteuid())", "return c.uid >= 0 || c.uid == uint32(os.Geteuid())",
		"./daemon", "TestStrangersCommandNothing",
	},
	{
		"a log is for those who asked for its build",
		"daemon/owners.go", "return c.commands() || slices.Contains(of, c.uid) || slices.Contains(of, 0)", "return c.commands() || len(of) > 0",
		"./daemon", "TestSecurityLogs",
	},
	{
		"only who asked for a build may cancel it",
		"daemon/sharing.go", "if !by.commands() && !b.onlyForLocked(by.uid) {", "if !by.commands() && !b.onlyForLocked(by.uid) && false {",
		"./daemon", "TestWhoMayCancel",
	},
	{
		"only root and --machines-group may name machines",
		"daemon/lists.go", "\tif !d.mayName(by) {", "\tif !d.mayName(by) && false {",
		"./daemon", "TestWhoMayNameMachines",
	},
	{
		"only root may raise a priority",
		"daemon/origin.go", "case p > 0 && !c.commands():", "case p > 0 && !c.commands() && false:",
		"./daemon", "TestWhoMaySayWhatPriority",
	},
	{
		"only root says for whom it asks",
		"daemon/origin.go", "case client == nil || !c.commands():", "case client == nil:",
		"./daemon", "TestOrigin",
	},
	{
		"a caller's word on the inputs of a build is not taken",
		"daemon/hook.go", "\tif h.caller.commands() {\n\t\treturn storePaths(start.GetInputs())", "\tif h.caller.uid > 0 {\n\t\treturn storePaths(start.GetInputs())",
		"./daemon", "TestSecurityHookThatLies",
	},
	{
		"the hook passes on an allow-list of settings",
		"proto/nix/hook/settings.go", "\tset, ok := setters[name]\n\tif !ok {\n\t\treturn nil\n", "\tset, ok := setters[name]\n\tif !ok {\n\t\ts.Systems = append(s.Systems, value)\n\t\treturn nil\n",
		"./proto/nix/hook", "TestReaderKeepsOnlySettingsOfUse",
	},
	// What is trusted.
	{
		"an unknown host key is refused",
		"sshpool/hostkey.go", "case v.cause == CauseHostKeyUnknown && t.Strict >= StrictNew:", "case v.cause == CauseHostKeyUnknown:",
		"./sshpool", "TestKnownHosts",
	},
	{
		"a changed host key is refused",
		"sshpool/hostkey.go", "case v.cause == CauseHostKeyChanged && t.Strict == StrictOff:", "case v.cause == CauseHostKeyChanged:",
		"./sshpool", "TestKnownHosts",
	},
	{
		"a revoked host key is refused, whatever else is waived",
		"sshpool/hostkey.go", "if e := k.findRevoked(key); e != nil {", "if e := k.findRevoked(key); e != nil && false {",
		"./sshpool", "TestRevocationIsCheckedFirst",
	},
	{
		"the host key that a machines line gives is the only one",
		"sshpool/hostkey.go", "\t\tif bytes.Equal(want.Marshal(), key.Marshal()) {", "\t\tif want.Type() == key.Type() {",
		"./sshpool", "TestGivenHostKeys",
	},
	{
		"a fixed output has the content that its derivation names",
		"daemon/outputinfo.go", "\ti.CA = \"\"\n\tfor _, o := range a.b.drv.Outputs {\n\t\tif o.Path == i.Path {", "\tfor _, o := range a.b.drv.Outputs {\n\t\tif o.Path == i.Path && i.CA == \"\" {",
		"./daemon", "TestMachineLiesAboutAnOutput",
	},
	{
		"a machine's word on references is checked",
		"daemon/outputinfo.go", "\tif len(invalid) > 0 {", "\tif len(invalid) > 0 && false {",
		"./daemon", "TestMachineFaultsMoveTheBuild",
	},
	{
		"words in a derivation park no machine",
		"daemon/verdict.go", "return !f.builderFailed() && f.ends(noSpace) && !f.quotes(noSpace)", "return strings.Contains(f.text, noSpace)",
		"./daemon", "TestDerivationCannotBlameAMachine",
	},
	{
		"only the outputs of the build are imported",
		"daemon/outputinfo.go", "\t\tif !slices.Contains(paths, i.Path) {", "\t\tif !slices.Contains(paths, i.Path) && len(paths) == 0 {",
		"./daemon", "TestOnlyOutputsAreImported",
	},
	{
		"a machine whose store is this host's builds nothing",
		"daemon/ownstore.go", "\tcase same:\n", "\tcase same && false:\n",
		"./daemon", "TestOwnStoreIsRefused",
	},
	// Where a build goes.
	{
		"a machine runs at most max-jobs builds",
		"scheduler/machine.go", "m.state == Parked) && m.pool.free(m, m.pool.busy) > 0", "m.state == Parked)",
		"./scheduler", "TestSlotsOfAURIAreNumbered",
	},
	{
		"a machine builds for its systems",
		"scheduler/machine.go", `if system != "builtin" && !m.systems[system] {`, `if system == "" && !m.systems[system] {`,
		"./scheduler", "TestEligible",
	},
	{
		"a machine has the features that a build requires",
		"scheduler/machine.go", "\t\tif !m.supported[f] {", "\t\tif !m.supported[f] && false {",
		"./scheduler", "TestEligible",
	},
	{
		"a machine's mandatory features are required",
		"scheduler/machine.go", "features, f); !found {", "features, f); !found && false {",
		"./scheduler", "TestEligible",
	},
	{
		"a drained machine gets no new builds",
		"scheduler/machine.go", "return m.index >= 0 && m.up() }", "return m.index >= 0 && (m.up() || m.state == Draining) }",
		"./scheduler", "TestScenarios",
	},
	{
		"users take turns",
		"scheduler/class.go", "\tcase a.caller.placed != b.caller.placed:\n\t\treturn a.caller.placed < b.caller.placed\n", "",
		"./scheduler", "TestScenarios",
	},
	{
		"a caller with builds in line gets no reserved place for priority 0",
		"scheduler/caller.go", "l.priority >= priority || priority <= 0 {", "l.priority >= priority {",
		"./scheduler", "TestScenarios",
	},
	// What becomes of it.
	{
		"the slot of a build whose connection was lost stays taken",
		"scheduler/queue.go", "\tm.held++ // first, so that m is never empty in between\n", "",
		"./scheduler", "TestScenarios",
	},
	{
		"a build avoids the machine that failed it",
		"scheduler/queue.go", "\tb.req.Exclude = append(b.req.Exclude, failed)\n", "",
		"./scheduler", "TestScenarios",
	},
	{
		"attempts are bounded",
		"daemon/attempts.go", "if t.failed+t.crashes(now) >= maxAttempts {", "if t.failed+t.crashes(now) >= 1000*maxAttempts {",
		"./daemon", "TestTally",
	},
	{
		"a lost connection is no attempt if nothing was tried",
		"daemon/attempts.go", "return isLost(err) && !tries(doing) }, costPause}", "return isLost(err) && !tries(doing) }, costAttempt}",
		"./daemon", "TestWhatAnAttemptCosts",
	},
	{
		"a caller's limits end its build",
		"daemon/follower.go", "\t\tif left <= 0 {\n\t\t\treturn 0, &limitError{dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT,\n\t\t\t\tfmt.Sprintf(\"timed out after %d seconds\", ", "\t\tif left <= 0 && false {\n\t\t\treturn 0, &limitError{dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT,\n\t\t\t\tfmt.Sprintf(\"timed out after %d seconds\", ",
		"./daemon", "TestLimitCheck",
	},
	{
		"the hook hands over its own locks",
		"cmd/internal/buildhook/locks.go", "\tif err := unix.Unlink(l.path); err != nil {", "\tif err := unix.Access(l.path, 0); err != nil {",
		"./cmd/internal/buildhook", "TestHookHandsTheLocksOverOnce",
	},
	{
		"the hook leaves another's lock alone",
		"cmd/internal/buildhook/locks.go", "\tif held.Dev != there.Dev || held.Ino != there.Ino {", "\tif held.Dev != there.Dev {",
		"./cmd/internal/buildhook", "TestHookLeavesAStrangersLockAlone",
	},
	{
		"an import waits for the lock of another process",
		"daemon/fetch.go", "\t\tif !held {\n\t\t\treturn false, nil", "\t\tif !held || true {\n\t\t\treturn false, nil",
		"./daemon", "TestImportWaitsForALockOfAStranger",
	},
	{
		"inputs on a machine have temporary roots",
		"daemon/remote_stores.go", "\tif err := s.c.AddTempRoots(paths); err != nil {", "\tif err := s.c.AddTempRoots(nil); err != nil {",
		"./daemon", "TestBuildFromInputsToOutputs",
	},
	{
		"an end is known everywhere before the callers hear of it",
		"daemon/history/read.go", "\tpending := db.pendingWanted(&q) // before the file is read, see the package's comment\n", "\tvar pending []Row\n",
		"./daemon/history", "TestRowsAreReadBeforeTheyAreWritten",
	},
}
