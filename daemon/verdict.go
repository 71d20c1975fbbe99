package daemon

import (
	"context"
	"errors"
	"fmt"
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
	// byDisk: so it may, for this one's disk is full.
	byDisk
	// byKilling: something on the machine ended a process of the build, out of
	// memory for example. Another machine may have more; once.
	byKilling
	// unclear: the machine's Nix failed before it ran the builder, in words that are
	// not known here. Most are of its state (no user to build as, a directory that it
	// may not use), some of the derivation. Another machine may do better; once.
	unclear
)

// verdicts tell what a failure that a machine reports means, by words that its
// message holds outside of the builder's log. The first that fits decides; what
// fits none is the derivation's fault, so that nothing is repeated in vain, but for
// what Nix throws before the builder runs, an InputRejected in one version and a
// MiscFailure in another.
//
// The words are Nix's own, the same in 2.8.0, 2.26.3 and 2.34.8 unless said:
// build/derivation-goal.cc, build/derivation-building-goal.cc and
// unix/build/derivation-builder.cc of src/libstore.
var verdicts = []struct {
	words string
	blame blame
}{
	{"lack of free disk space", byDisk},
	{"No space left on device", byDisk},
	{"database or disk is full", byDisk}, // SQLite
	// The machine's line claims a system or a feature that its Nix does not have.
	{"is required to build", byMachine}, // up to 2.28
	{"platform mismatch", byMachine},
	{"missing system features", byMachine},
	// An input that had arrived is gone.
	{"is not valid", byMachine},
	{"does not exist in the store", byMachine},

	{"failed due to signal 9", byKilling},
}

// final are the statuses that no words change. Limits are the callers', and
// enforced here; what was built and refused would be so elsewhere.
var final = []nix.BuildStatus{
	nix.OutputRejected, nix.TimedOut, nix.LogLimitExceeded, nix.NotDeterministic, nix.CachedFailure,
}

// judge says whose fault a failure is. Builds that run outside of a sandbox,
// those of fixed outputs, fail as TransientFailure whatever the reason; any other
// that does was short of disk space or of a substitute
// (src/libstore/unix/build/derivation-builder.cc).
func judge(r nix.BuildResult, drv *nix.Derivation) blame {
	if slices.Contains(final, r.Status) {
		return byDerivation
	}
	message := withoutLog(nix.PlainText(r.ErrorMsg))
	for _, v := range verdicts {
		if strings.Contains(message, v.words) {
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

// withoutLog takes the lines of the builder's log out of a message: Nix quotes
// the last of them, each after "> ". A builder may print what it likes.
func withoutLog(message string) string {
	lines := slices.DeleteFunc(strings.Split(message, "\n"), func(line string) bool {
		return strings.HasPrefix(strings.TrimSpace(line), ">")
	})
	return strings.Join(lines, "\n")
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
		m.condition.foundFull(fmt.Sprintf("a build found no space left there at %s", moment(time.Now())), m.keeper.mayAsk(), time.Now())
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
