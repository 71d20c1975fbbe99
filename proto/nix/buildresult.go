package nix

import (
	"fmt"
	"time"
)

// A BuildStatus says how a build ended. The numbers are the wire's
// (src/libstore/common-protocol.cc).
type BuildStatus uint64

// The statuses that go over the wire.
const (
	Built                  BuildStatus = 0
	Substituted            BuildStatus = 1
	AlreadyValid           BuildStatus = 2
	PermanentFailure       BuildStatus = 3
	InputRejected          BuildStatus = 4
	OutputRejected         BuildStatus = 5
	TransientFailure       BuildStatus = 6
	CachedFailure          BuildStatus = 7
	TimedOut               BuildStatus = 8
	MiscFailure            BuildStatus = 9
	DependencyFailed       BuildStatus = 10
	LogLimitExceeded       BuildStatus = 11
	NotDeterministic       BuildStatus = 12
	ResolvesToAlreadyValid BuildStatus = 13
	NoSubstituters         BuildStatus = 14
)

var buildStatusNames = [...]string{
	"Built", "Substituted", "AlreadyValid", "PermanentFailure", "InputRejected",
	"OutputRejected", "TransientFailure", "CachedFailure", "TimedOut",
	"MiscFailure", "DependencyFailed", "LogLimitExceeded", "NotDeterministic",
	"ResolvesToAlreadyValid", "NoSubstituters",
}

// String is Nix's name of the status.
func (s BuildStatus) String() string {
	if s < BuildStatus(len(buildStatusNames)) {
		return buildStatusNames[s]
	}
	return fmt.Sprintf("BuildStatus(%d)", uint64(s))
}

// Success tells whether the outputs are valid after a build of this status.
func (s BuildStatus) Success() bool {
	return s <= AlreadyValid || s == ResolvesToAlreadyValid
}

// A BuildResult is a store's answer to a request to build
// (src/libstore/include/nix/store/build-result.hh).
type BuildResult struct {
	Status BuildStatus
	// ErrorMsg is the store's message; "" on success. It is foreign text.
	ErrorMsg string
	// TimesBuilt is 0 where the peer is too old to tell.
	TimesBuilt       uint64
	NonDeterministic bool
	// StartTime and StopTime are zero where the peer does not tell.
	StartTime, StopTime time.Time
	// BuiltOutputs maps output names to paths, as far as the peer tells.
	BuiltOutputs map[string]StorePath
}

// BuildOptions are the limits a caller sets on a build; zero means none.
type BuildOptions struct {
	// MaxSilentTime and Timeout are sent in whole seconds.
	MaxSilentTime, Timeout time.Duration
	// MaxLogSize is in bytes.
	MaxLogSize uint64
	KeepFailed bool
}
