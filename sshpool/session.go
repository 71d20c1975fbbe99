package sshpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
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
	// Stdin is the command's standard input. Closing it gives the command an
	// end of file and leaves the session open.
	Stdin io.WriteCloser
	// Stdout and Stderr are what the command writes. They share the window:
	// when one of them is not read, the other comes to a stop as well, so the
	// caller must always read both.
	Stdout, Stderr io.Reader

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

// Close ends the session and frees its place. It takes a second at most and may
// be called more than once.
//
// If the command has not ended it is sent SIGTERM, where the host's sshd does
// that, and finds its streams closed. Reads and writes that are under way return
// when the peer confirms, at the latest when it is found dead.
func (s *Session) Close() error {
	s.closeOnce.Do(func() {
		close(s.closing)
		s.end()
		s.release()
	})
	return nil
}

const (
	// closeWait is how long Close waits for the end to be sent, so that the
	// next session on a full connection is asked for after it.
	closeWait = time.Second
	// confirmTimeout is how long the peer has to confirm a session's end before
	// its connection gets no more sessions.
	confirmTimeout = 30 * time.Second
	// fateWait is how long a stream's end waits to learn whether the command or
	// the connection ended it. It is only ever used up by a command that
	// closes its output long before it exits.
	fateWait = 250 * time.Millisecond
)

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

// run opens a session and then serves it until nothing more can come of it.
func (c *conn) run(ctx context.Context, command string, result chan<- opened) {
	defer c.host.wg.Done()
	over := c.watch("open session")
	r := &remote{conn: c, sent: make(chan struct{}), known: make(chan struct{})}
	reqs, err := r.start(command)
	over()
	if err != nil {
		if refusal, ok := err.(*refusedError); ok {
			refusal.again = c.host.refused(c)
		}
		c.host.release(c, r.channel != nil)
		deliver(ctx, result, opened{err: err})
		return
	}
	s := &Session{
		end:      r.awaitSent,
		release:  func() { c.host.release(c, true) },
		closing:  make(chan struct{}),
		finished: make(chan struct{}),
	}
	r.session = s
	s.Stdin = remoteStdin{r}
	s.Stdout = remoteStream{r, r.channel}
	s.Stderr = remoteStream{r, r.channel.Stderr()}
	if !deliver(ctx, result, opened{session: s}) {
		c.host.wg.Go(func() { s.Close() })
	}
	r.serve(reqs)
}

// A remote is a session's channel on an SSH connection.
type remote struct {
	conn    *conn
	channel ssh.Channel // nil until accepted
	session *Session
	sent    chan struct{} // closed when the end has been sent
	known   chan struct{} // closed when the exit status is known
	cut     bool          // the connection ended the channel; set before finished is closed
}

// start opens the channel and starts the command.
func (r *remote) start(command string) (<-chan *ssh.Request, error) {
	c := r.conn
	ch, reqs, err := c.ssh.OpenChannel("session", nil)
	if refusal, ok := errors.AsType[*ssh.OpenChannelError](err); ok {
		switch refusal.Reason {
		case ssh.ConnectionFailed, ssh.ResourceShortage:
			return nil, &refusedError{err: err}
		default:
			return nil, &ConnectError{c.host.cfg.Name, StepOpenSession, err}
		}
	}
	if err != nil {
		return nil, r.broken(err)
	}
	r.channel = ch
	c.host.accepted(c)
	ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{command}))
	if err == nil && ok {
		return reqs, nil
	}
	ch.Close()
	c.host.wg.Go(func() { ssh.DiscardRequests(reqs) })
	if err != nil {
		return nil, r.broken(err)
	}
	return nil, &ConnectError{c.host.cfg.Name, StepOpenSession,
		fmt.Errorf("the host refuses to run %q", command)}
}

// broken returns the error for a failure that only a lost connection or a peer
// that breaks the protocol can cause.
func (r *remote) broken(err error) error {
	timer := time.NewTimer(fateWait)
	defer timer.Stop()
	select {
	case <-r.conn.dying:
		return r.conn.lost()
	case <-timer.C:
		return &ConnectError{r.conn.host.cfg.Name, StepOpenSession, err}
	}
}

// serve takes what the peer says about the session, and ends it on Close.
func (r *remote) serve(reqs <-chan *ssh.Request) {
	var exit error
	exited := false
	closing := r.session.closing
	var late <-chan time.Time
	for {
		select {
		case req, ok := <-reqs:
			if !ok {
				r.finish(exit, exited)
				return
			}
			if err, ok := exitOf(req); ok && !exited {
				exit, exited = err, true
				close(r.known)
			}
			req.Reply(false, nil)
		case <-closing:
			closing = nil
			if !exited {
				r.channel.SendRequest("signal", false, ssh.Marshal(struct{ Name string }{"TERM"}))
			}
			r.channel.Close()
			close(r.sent)
			timer := time.NewTimer(confirmTimeout)
			defer timer.Stop()
			late = timer.C
		case <-late:
			// The command may hang in a way that keeps the peer from closing
			// the channel, and a write of ours in it. There is no way to end
			// that without ending other sessions, but it can be contained.
			r.conn.retire()
		}
	}
}

// exitOf reads the two requests that tell a command's end, RFC 4254 section 6.10.
func exitOf(req *ssh.Request) (error, bool) {
	switch req.Type {
	case "exit-status":
		var m struct{ Status uint32 }
		if ssh.Unmarshal(req.Payload, &m) != nil {
			return nil, false
		}
		if m.Status == 0 {
			return nil, true
		}
		return &ExitError{Status: int(m.Status)}, true
	case "exit-signal":
		var m struct {
			Signal     string
			CoreDumped bool
			Message    string
			Language   string
		}
		if ssh.Unmarshal(req.Payload, &m) != nil {
			return nil, false
		}
		return &ExitError{Status: 128, Signal: m.Signal}, true
	default:
		return nil, false
	}
}

// finish settles the session's result when its channel has ended.
func (r *remote) finish(exit error, exited bool) {
	s := r.session
	closed := isClosed(s.closing)
	if !exited && !closed {
		timer := time.NewTimer(fateWait / 2)
		defer timer.Stop()
		select {
		case <-r.conn.dying:
		case <-timer.C:
		}
	}
	r.cut = isClosed(r.conn.dying)
	switch {
	case exited:
		s.err = exit
	case closed:
		s.err = ErrClosed
	case r.cut:
		s.err = r.conn.lost()
	default:
		s.err = &LostError{r.conn.host.cfg.Name, errors.New("the session was ended without an exit status")}
	}
	close(s.finished)
}

// awaitSent waits until the session's end is on its way.
func (r *remote) awaitSent() {
	timer := time.NewTimer(closeWait)
	defer timer.Stop()
	select {
	case <-r.sent:
	case <-r.session.finished:
	case <-timer.C:
	}
}

// fate returns the error for a stream that has ended: clean if the command
// ended it. That an exit status came does not say so, for a host may send it
// before the rest of the output.
func (r *remote) fate(clean error) error {
	s := r.session
	timer := time.NewTimer(fateWait)
	defer timer.Stop()
	select {
	case <-s.finished:
	case <-s.closing:
	case <-r.conn.dying:
	case <-r.known:
	case <-timer.C:
	}
	switch {
	case isClosed(s.closing):
		return ErrClosed
	case isClosed(s.finished):
		if r.cut {
			return r.conn.lost()
		}
		if _, ok := s.err.(*LostError); ok {
			return s.err
		}
		return clean
	case isClosed(r.conn.dying):
		return r.conn.lost()
	default:
		return clean
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

type remoteStream struct {
	r  *remote
	in io.Reader
}

func (s remoteStream) Read(p []byte) (int, error) {
	n, err := s.in.Read(p)
	if err != nil {
		err = s.r.fate(err)
	}
	return n, err
}

type remoteStdin struct{ r *remote }

func (s remoteStdin) Write(p []byte) (int, error) {
	n, err := s.r.channel.Write(p)
	if err != nil {
		err = s.r.fate(io.ErrClosedPipe)
	}
	return n, err
}

func (s remoteStdin) Close() error {
	if err := s.r.channel.CloseWrite(); err != nil {
		return s.r.fate(io.ErrClosedPipe)
	}
	return nil
}
