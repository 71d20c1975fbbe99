package sshpool

import "time"

// A State is what can be expected of a host.
type State int

// The states of a host.
const (
	// Connecting: the first attempt to connect has not ended yet.
	Connecting State = iota
	// Up: there is a connection, and it passed the probe.
	Up
	// Down: the last attempt failed, or the connection was lost. The host
	// stays Down while it is tried again.
	Down
)

// String returns "connecting", "up" or "down".
func (s State) String() string {
	switch s {
	case Connecting:
		return "connecting"
	case Up:
		return "up"
	case Down:
		return "down"
	default:
		return "unknown"
	}
}

// A Status is a host's state at one moment.
type Status struct {
	Name  string // Config.Name
	State State
	Since time.Time // when State became what it is

	// SuspectSince is since when the host has been suspect: nothing was received from
	// it for a while though an answer is due. It is zero if the host is not suspect,
	// and always unless it is Up. Its sessions go on, and new ones may be opened.
	SuspectSince time.Time

	// LastError is why the host is Down: a [*ConnectError], a [*LostError], or
	// [ErrClosed]. While the host is Up it is nil, or why one more connection
	// could not be made.
	LastError error

	// Attempts counts the failures to connect in a row.
	Attempts int
	// RetryAt is when the next attempt begins. It is zero while one is under
	// way and when none is due.
	RetryAt time.Time

	Connections  int // open now
	Sessions     int // open now, or being opened
	SessionLimit int // sessions the host allows on a connection; 0 means not known

	// Connects and ConnectFailures count attempts since the host was added.
	Connects, ConnectFailures uint64
}
