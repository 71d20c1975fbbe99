package sshpool

import (
	"errors"
	"fmt"
)

var (
	// ErrNotUp is matched by the error of [Host.Session] when the host is not
	// up. That error also wraps the reason, where there is one.
	ErrNotUp = errors.New("not connected")

	// ErrClosed is matched by errors of what this side has closed: the pool,
	// the host or the session.
	ErrClosed = errors.New("closed")
)

// A Step is a part of getting a host to run a command. The values are fixed and
// few: fit for a metric's label.
type Step string

// The steps, in their order.
const (
	StepResolve      Step = "resolve"      // the name has no address
	StepConnect      Step = "connect"      // nobody answers at the address
	StepHandshake    Step = "handshake"    // no SSH could be spoken
	StepHostKey      Step = "host key"     // it is not known to be that host
	StepAuthenticate Step = "authenticate" // it does not let us in
	StepOpenSession  Step = "open session" // it refuses to run the command
	StepProbe        Step = "probe"        // the command did not do as expected
)

// A ConnectError says at which step a host could not be brought to run
// commands, and why.
type ConnectError struct {
	Host string // Config.Name
	Step Step
	Err  error
}

// Error names the host, the step and the cause.
func (e *ConnectError) Error() string {
	return fmt.Sprintf("%s: %s: %v", e.Host, e.Step, e.Err)
}

// Unwrap returns the cause.
func (e *ConnectError) Unwrap() error { return e.Err }

// A LostError means that the connection under a session, or while one was being
// opened, was lost. What the remote command did, or still does, is not known.
type LostError struct {
	Host string // Config.Name
	Err  error
}

// Error names the host and how the connection ended.
func (e *LostError) Error() string {
	return fmt.Sprintf("%s: connection lost: %v", e.Host, e.Err)
}

// Unwrap returns how the connection ended. It matches [ErrClosed] when this
// side closed it.
func (e *LostError) Unwrap() error { return e.Err }

// An ExitError means that a command ran and ended other than with status 0.
type ExitError struct {
	// Status is the exit status; 128 if a signal ended the command.
	Status int
	// Signal is the signal's name without SIG, such as "KILL", or empty.
	Signal string
}

// Error says how the command ended.
func (e *ExitError) Error() string {
	if e.Signal != "" {
		return fmt.Sprintf("command was ended by signal %q", e.Signal)
	}
	return fmt.Sprintf("command exited with status %d", e.Status)
}
