package sshpool

import (
	"context"
	"fmt"
	"io"
	"sync"
)

// A Session is a running command. Its three streams may be used from three
// goroutines, each by one at a time; Wait, Done and Close from any.
//
// When the connection under it is lost, every stream and Wait return a
// [*LostError]: a clean end of Stdout means the command closed it.
//
// Data flows in windows of 2 MiB for each session, fixed in x/crypto/ssh: no
// more than that arrives per round trip (20 MB/s at 100 ms).
type Session struct {
	// Stdin is the command's standard input. A write returns when the data is
	// in one of two buffers of 32 KiB. Closing it gives the command an end of
	// file, after all that was written, and leaves the session open.
	Stdin io.WriteCloser
	// Stdout and Stderr are what the command writes. They share the window:
	// when one of them is not read, the other comes to a stop as well, so the
	// caller must always read both.
	Stdout, Stderr io.Reader

	conn     *conn
	end      func()        // begins to end the command; returns soon
	release  func()        // gives the place back
	closing  chan struct{} // closed by Close
	finished chan struct{} // closed when the command has ended, or will not be heard of again
	err      error         // of Wait; may be read once finished is closed

	closeOnce sync.Once
}

// Done returns a channel that is closed when Wait would return.
func (s *Session) Done() <-chan struct{} { return s.finished }

// Wait waits for the command's end and returns nil if it exited with status 0.
// Otherwise the error is an [*ExitError], a [*LostError] if the connection was
// lost first, or [ErrClosed] if Close was called first.
func (s *Session) Wait() error {
	select {
	case <-s.finished:
		return s.err
	case <-s.closing:
	}
	select {
	case <-s.finished:
		return s.err
	default:
		return ErrClosed
	}
}

// Close ends the session and frees its place. Reads and writes that are under
// way return [ErrClosed]. It takes a second at most and may be called more than
// once.
//
// A command that has not ended finds its streams closed and is sent SIGTERM.
// OpenSSH's sshd delivers the signal only if the user is not root and the command
// not forced (session.c, session_signal_req); a command that then neither reads
// nor writes may go on, and its session counts at the peer until it ends.
func (s *Session) Close() error {
	s.closeOnce.Do(func() {
		close(s.closing)
		s.end()
		s.release()
	})
	return nil
}

// A refusedError is the peer's refusal of one more session on a connection.
type refusedError struct {
	err   error
	again bool // it can help to try again
}

func (e *refusedError) Error() string { return fmt.Sprintf("the host refuses the session: %v", e.err) }
func (e *refusedError) Unwrap() error { return e.err }

type opened struct {
	session *Session
	err     error
}

// open starts command on c, whose place was taken with takeLocked. The place is
// given back when opening fails or the session is closed. If ctx ends first,
// open returns at once and a session that comes late is closed.
func (c *conn) open(ctx context.Context, command string) (*Session, error) {
	result := make(chan opened)
	if c.host.cfg.Local {
		go c.runLocal(ctx, command, result)
	} else {
		go c.run(ctx, command, result)
	}
	select {
	case r := <-result:
		return r.session, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: open session: %w", c.host.cfg.Name, ctx.Err())
	}
}

// deliver hands a session to whoever opened it, or reports that they are gone.
func deliver(ctx context.Context, result chan<- opened, r opened) bool {
	select {
	case result <- r:
		return true
	case <-ctx.Done():
		return false
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
