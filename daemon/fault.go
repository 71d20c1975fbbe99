package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/sshpool"
)

// What is tried on a machine, in the words of a machineError. The start of a
// process there is told with its command instead.
const (
	doingSession     = "open a session"
	doingStoreLook   = "look at its store"
	doingMissing     = "ask which inputs are missing"
	doingInputs      = "copy inputs"
	doingSlot        = "wait for a slot"
	doingBuild       = "build"
	doingOutputQuery = "query outputs"
	doingOutputs     = "copy outputs"
)

// A machineError is a failure that is the machine's, or of the way to it: the
// build may succeed on another one.
type machineError struct {
	machine string // store URI
	doing   string // what was tried, such as doingInputs
	err     error
}

func (e *machineError) Error() string {
	return fmt.Sprintf("machine %s: %s: %v", e.machine, e.doing, e.err)
}
func (e *machineError) Unwrap() error { return e.err }

// A localError is a failure of this host: its store, its disk, its Nix daemon.
// Another machine would not help.
type localError struct {
	doing string
	err   error
}

func (e *localError) Error() string { return fmt.Sprintf("local store: %s: %v", e.doing, e.err) }
func (e *localError) Unwrap() error { return e.err }

// failureReasons are the kinds of failed attempts, as label values, by what was
// tried.
var failureReasons = map[string]string{
	doingSession:     "session",
	doingStoreLook:   "store",
	doingMissing:     "copy_inputs",
	doingInputs:      "copy_inputs",
	doingBuild:       "build",
	doingOutputQuery: "copy_outputs",
	doingOutputs:     "copy_outputs",
}

// The kinds of failed attempts that go by how they failed.
const (
	failureLost   = "connection_lost"
	failureKilled = "killed" // the builder, perhaps for want of memory
	failureStart  = "start"  // of the remote process
)

// failureKinds are all of them.
func failureKinds() []string {
	kinds := append(slices.Collect(maps.Values(failureReasons)), failureLost, failureKilled, failureStart)
	slices.Sort(kinds)
	return slices.Compact(kinds)
}

// failureReason is a machine's failure as a label value.
func failureReason(err *machineError) string {
	if _, lost := errors.AsType[*sshpool.LostError](err); lost {
		return failureLost
	}
	return cmp.Or(failureReasons[err.doing], failureStart)
}

var (
	// errCancelled ends a build that nobody waits for any longer, or that
	// somebody cancelled on purpose.
	errCancelled = errors.New("cancelled")
	// errShutdown ends what runs when the daemon stops.
	errShutdown = errors.New("nix-dispatchd is shutting down")
	// errMoved interrupts an attempt whose build has been given another machine.
	errMoved = errors.New("moved to another machine")
)

// An outcome is how a build ended, for everyone who followed it.
type outcome struct {
	status   dispatchv1.BuildStatus
	err      string // "" on success
	machine  string // store URI; "" if none built it
	duration time.Duration
	// unfinished is set when the daemon's own end cut the build off: another daemon
	// may build it.
	unfinished bool
}

// buildStatus is Nix's status in the API's numbering, which keeps 0 free. A
// status of a newer Nix that the API does not know is a failure of unknown kind.
func buildStatus(s nix.BuildStatus) dispatchv1.BuildStatus {
	if s > nix.NoSubstituters {
		return dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE
	}
	return dispatchv1.BuildStatus(s + 1) //nolint:gosec // bounded by the line above
}

// outcomeOf says how an attempt ended that brought no result of the machine's.
func outcomeOf(err error) outcome {
	o := outcome{status: dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE, err: err.Error()}
	if errors.Is(err, errCancelled) || errors.Is(err, errShutdown) {
		o.status = dispatchv1.BuildStatus_BUILD_STATUS_CANCELLED
	}
	o.unfinished = errors.Is(err, errShutdown)
	if over, ok := errors.AsType[*limitError](err); ok {
		o.status = over.status
	}
	if m, ok := errors.AsType[*machineError](err); ok {
		o.machine = m.machine
	}
	return o
}
