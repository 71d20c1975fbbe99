package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/sshpool"
)

// A blame says whose fault a build's failure is, as the machine reports it.
type blame int

const (
	// byDerivation: it would fail elsewhere too, so it has failed.
	byDerivation blame = iota
	// byMachine: the build may succeed on another machine.
	byMachine
	// byDisk: so it may, for this one says that its disk is full.
	byDisk
	// byKilling: something on the machine ended a process of the build, out of
	// memory for example. Another machine may have more; once.
	byKilling
	// unclear: the machine's Nix failed before it ran the builder, in words that are
	// not known here. Most are of its state (no user to build as, a directory that it
	// may not use), some of the derivation. Another machine may do better; once.
	unclear
)

// verdicts tell what a failure that a machine reports means, by the sentences of Nix in
// its message. The first that fits decides. What fits none is the derivation's fault, so
// that nothing is repeated for nothing, except what Nix throws before the builder runs, an
// InputRejected in one version and a MiscFailure in another.
//
// A derivation puts words into many messages: the values of exportReferencesGraph,
// __impureHostDeps and most other attributes, with quotes and line breaks in them. So each
// sentence is recognised by its place: Nix's words at the beginning, which no derivation
// can precede, or at the very end, where Nix closes a quotation that a derivation ends.
// The last lines of the builder's log are in between, each after "> ".
// And no verdict does more than to have the build tried elsewhere: only what a machine
// itself tells of its disk keeps other builds away from it.
//
// The sentences are the same in 2.8.0, 2.26.3 and 2.34.8 unless said:
// build/derivation-goal.cc, build/derivation-building-goal.cc, sqlite.cc and
// unix/build/derivation-builder.cc of src/libstore.
var verdicts = []struct {
	name  string
	fits  func(f *failure) bool
	blame blame
}{
	{"the disk is full after the builder failed", func(f *failure) bool {
		return f.builderFailed() && f.last() == "note: build failure may have been caused by lack of free disk space"
	}, byDisk},
	{"Nix found no space", func(f *failure) bool {
		return !f.builderFailed() && f.ends(noSpace) && !f.quotes(noSpace)
	}, byDisk},
	{"Nix found no space for its database", func(f *failure) bool {
		return !f.builderFailed() && databaseFull.MatchString(f.text) && !f.quotes("disk is full")
	}, byDisk},
	// The machine's line claims a system or a feature that its Nix does not have.
	{"not of the right kind, up to 2.28", func(f *failure) bool {
		return strings.HasPrefix(f.text, "a '"+f.drv.Platform+"' with features {") &&
			strings.Contains(f.text, "} is required to build '"+string(f.drvPath)+"', but I am a '")
	}, byMachine},
	{"not of the right kind", func(f *failure) bool {
		return f.cannotBuild() && (f.reason() == "Reason: platform mismatch" || f.reason() == "Reason: missing system features")
	}, byMachine},
	{"an input that had arrived is gone", func(f *failure) bool {
		return f.namesInput("path '", "' is not valid") ||
			f.namesInput("dependency '", "' of '"+string(f.drvPath)+"' does not exist, and substitution is disabled")
	}, byMachine},
	{"the builder was killed", func(f *failure) bool {
		return strings.HasPrefix(f.text, "builder for '"+string(f.drvPath)+"' failed due to signal 9 ") ||
			f.cannotBuild() && strings.HasPrefix(f.reason(), "Reason: builder failed due to signal 9 ")
	}, byKilling},
}

// noSpace is the system's word for a full disk.
const noSpace = "No space left on device"

// databaseFull is SQLite's, with the file's name after it.
var databaseFull = regexp.MustCompile(`: database or disk is full(, database or disk is full)? \(in '[^']*'\)$`)

// A failure is one that a machine reports of a derivation.
type failure struct {
	text    string // what Nix says
	drvPath nix.StorePath
	drv     *nix.Derivation
	inputs  []nix.StorePath
}

// line is a line of the message, "" if it has fewer.
func (f *failure) line(n int) string {
	if lines := strings.Split(f.text, "\n"); n < len(lines) {
		return lines[n]
	}
	return ""
}

func (f *failure) last() string { return f.text[strings.LastIndexByte(f.text, '\n')+1:] }

// cannotBuild tells whether the message begins as those of 2.34 do that give a reason.
func (f *failure) cannotBuild() bool { return f.line(0) == "Cannot build '"+string(f.drvPath)+"'." }

// reason is the line with the reason, of such a message.
func (f *failure) reason() string { return f.line(1) }

// builderFailed tells whether the message says how the builder ended.
func (f *failure) builderFailed() bool {
	return strings.HasPrefix(f.text, "builder for '"+string(f.drvPath)+"' failed ") ||
		f.cannotBuild() && strings.HasPrefix(f.reason(), "Reason: builder failed ")
}

// ends tells whether the message ends in words that the system adds after a colon.
func (f *failure) ends(words string) bool { return strings.HasSuffix(f.text, ": "+words) }

// namesInput tells whether the message is one sentence about an input of the derivation.
func (f *failure) namesInput(before, after string) bool {
	rest, isSentence := strings.CutPrefix(f.text, before)
	name, ends := strings.CutSuffix(rest, after)
	return isSentence && ends && slices.Contains(f.inputs, nix.StorePath(name))
}

// quotes tells whether a derivation has words in it that Nix may have quoted.
func (f *failure) quotes(words string) bool {
	has := func(s string) bool { return strings.Contains(s, words) }
	if slices.ContainsFunc(f.drv.Args, has) || has(f.drv.Builder) || has(f.drv.Platform) {
		return true
	}
	for name, value := range f.drv.Env {
		if has(name) || has(value) || name == "__json" && jsonHas(value, has) {
			return true
		}
	}
	return false
}

// jsonHas tells whether a string in a JSON text is such as has looks for. In what is no
// JSON there may be anything.
func jsonHas(text string, has func(string) bool) bool {
	tokens := json.NewDecoder(strings.NewReader(text))
	for {
		token, err := tokens.Token()
		if err != nil {
			return !errors.Is(err, io.EOF)
		}
		if s, ok := token.(string); ok && has(s) {
			return true
		}
	}
}

// final are the statuses that no words change. Limits are the callers', and
// enforced here; what was built and refused would be so elsewhere.
var final = []nix.BuildStatus{
	nix.OutputRejected, nix.TimedOut, nix.LogLimitExceeded, nix.NotDeterministic, nix.CachedFailure,
}

// judge says whose fault a failure is, of a derivation for which the machine has inputs.
// Builds that run outside of a sandbox, those of fixed outputs, fail as TransientFailure
// whatever the reason; any other that does was short of disk space or of a substitute
// (src/libstore/unix/build/derivation-builder.cc).
func judge(r nix.BuildResult, drvPath nix.StorePath, drv *nix.Derivation, inputs []nix.StorePath) blame {
	if slices.Contains(final, r.Status) {
		return byDerivation
	}
	f := &failure{text: strings.TrimPrefix(strings.TrimSpace(nix.PlainText(r.ErrorMsg)), "error: "), drvPath: drvPath, drv: drv, inputs: inputs}
	for _, v := range verdicts {
		if v.fits(f) {
			return v.blame
		}
	}
	if r.Status == nix.TransientFailure && !drv.ContentAddressed() {
		return byMachine
	}
	if r.Status == nix.MiscFailure || r.Status == nix.InputRejected {
		return unclear
	}
	return byDerivation
}

// An unclearError is a failure that may be the fault of the machine that reported
// it: one of byKilling, or unclear. The outcome is what the machine said.
type unclearError struct {
	outcome outcome
	killed  bool
}

func (e *unclearError) Error() string { return e.outcome.err }

// reason is one of failureKinds.
func (e *unclearError) reason() string {
	if e.killed {
		return failureKilled
	}
	return failureReasons[doingBuild]
}

// A complaint is a failure that a machine's Nix reported in order, and that is the
// machine's: its Nix works.
type complaint struct {
	words string
	full  bool // its disk is
}

func (c *complaint) Error() string { return c.words }

// blamed is learn for an attempt that has failed, and returns why it has. That is
// settled before: what is learnt may have the machine parked, and the build moved,
// which ends ctx, and the failure would count as none.
func (m *machine) blamed(ctx context.Context, err error) error {
	why := contextCause(ctx, err)
	m.learn(ctx, err)
	return why
}

// learn notes what an attempt's end tells of the machine. ctx is the attempt's.
func (m *machine) learn(ctx context.Context, err error) {
	if m.keeper == nil || ctx.Err() != nil {
		return // what we end says nothing
	}
	fault, isFault := errors.AsType[*machineError](err)
	_, isUnclear := errors.AsType[*unclearError](err)
	switch {
	case err == nil, isUnclear:
		m.condition.worked()
		return
	case !isFault, connectionFailed(err):
		return
	case isFull(fault):
		// What it says may be a derivation's words. What it measures decides; a machine
		// that cannot be asked is not kept from other builds.
		m.keeper.askNow()
	case complains(err):
		return
	default:
		m.condition.failed(err, time.Now())
	}
	m.keeper.tell()
	m.keeper.kick()
}

// connectionFailed tells whether an attempt failed with its connection, of which the
// scheduler hears in another way, or before anything was tried.
func connectionFailed(err error) bool {
	_, lost := errors.AsType[*sshpool.LostError](err)
	return lost || errors.Is(err, sshpool.ErrNotUp) || errors.Is(err, sshpool.ErrClosed) || errors.Is(err, errSessionGone)
}

// complains tells whether the machine's Nix itself reported the failure.
func complains(err error) bool {
	_, complaint := errors.AsType[*complaint](err)
	_, remote := errors.AsType[*worker.RemoteError](err)
	return complaint || remote
}

// isFull tells whether a machine failed because its disk is full. What is printed
// while it builds may be the builder's words, and does not count.
func isFull(fault *machineError) bool {
	if c, ok := errors.AsType[*complaint](fault); ok {
		return c.full
	}
	known := explainWords(fault.Error())
	return fault.doing != doingBuild && known != nil && known.cause == causeDiskFull
}
