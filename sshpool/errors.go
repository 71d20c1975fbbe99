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
	StepConfig       Step = "ssh config"   // OpenSSH's configuration for it is of no use
	StepResolve      Step = "resolve"      // the name has no address
	StepConnect      Step = "connect"      // nobody answers at the address
	StepHandshake    Step = "handshake"    // no SSH could be spoken
	StepHostKey      Step = "host key"     // it is not known to be that host
	StepAuthenticate Step = "authenticate" // it does not let us in
	StepOpenSession  Step = "open session" // it refuses to run the command
	StepProbe        Step = "probe"        // the command did not do as expected
)

// A Cause is what kind of thing went wrong at a [Step]. The values are fixed and
// few: fit for a metric's label.
type Cause string

// The causes, in the order of the steps they belong to.
const (
	CauseConfig          Cause = "ssh config"         // OpenSSH rejects it, or it cannot be followed
	CauseHostUnknown     Cause = "host unknown"       // the name does not resolve
	CauseRefused         Cause = "connection refused" // nothing listens there
	CauseUnreachable     Cause = "unreachable"        // no way to that address
	CauseTimeout         Cause = "timeout"            // no answer in time
	CauseProxy           Cause = "proxy failed"       // ProxyJump or ProxyCommand ended
	CauseNoSSH           Cause = "no ssh"             // what answers speaks no SSH, or another dialect
	CauseHostKeyUnknown  Cause = "host key unknown"   // and may not be accepted
	CauseHostKeyChanged  Cause = "host key changed"   // another one is known
	CauseHostKeyRevoked  Cause = "host key revoked"   // it must never be accepted
	CauseHostKeyFiles    Cause = "host key files"     // what decides cannot be read
	CauseNoKey           Cause = "no key"             // there is none to offer
	CauseKeyRefused      Cause = "key refused"        // none of those offered lets us in
	CauseSessionRefused  Cause = "session refused"    // no session or command is allowed
	CauseCommandUnusable Cause = "command"            // it runs, and is not what is wanted
)

// A ConnectError says at which step a host could not be brought to run
// commands, and why.
type ConnectError struct {
	Host  string // Config.Name
	Step  Step
	Cause Cause
	Err   error
	// Fix says in a few words what to do about it. It may be empty.
	Fix string
}

// Error names the host, the step, the cause and what to do.
func (e *ConnectError) Error() string {
	text := fmt.Sprintf("%s: %s: %v", e.Host, e.Step, e.Err)
	if e.Fix != "" {
		text += "; " + e.Fix
	}
	return text
}

// Unwrap returns the cause.
func (e *ConnectError) Unwrap() error { return e.Err }

// fail makes a ConnectError of h.
func (h *Host) fail(step Step, cause Cause, err error, fix string) *ConnectError {
	return &ConnectError{Host: h.cfg.Name, Step: step, Cause: cause, Err: err, Fix: fix}
}

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
