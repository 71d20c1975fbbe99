package sshpool

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

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
	s := r.newSession()
	if !deliver(ctx, result, opened{session: s}) {
		c.host.wg.Go(func() { s.Close() })
	}
	r.serve(reqs)
}

// newSession makes the session of a command that was started, and starts the
// goroutines that move its data.
func (r *remote) newSession() *Session {
	h := r.conn.host
	s := &Session{
		conn:     r.conn,
		end:      r.awaitSent,
		closing:  make(chan struct{}),
		finished: make(chan struct{}),
	}
	s.release = func() { h.leave(r) }
	r.session = s
	in := newPipeWriter(r.channel, r.fate, s.closing, s.finished)
	out := newPipeReader(r.channel, outChunk, r.fate, s.closing)
	errs := newPipeReader(r.channel.Stderr(), errChunk, r.fate, s.closing)
	s.Stdin, s.Stdout, s.Stderr = in, out, errs
	h.wg.Go(in.pump)
	h.wg.Go(out.pump)
	h.wg.Go(errs.pump)
	return s
}

// A remote is a session's channel on an SSH connection.
type remote struct {
	conn    *conn
	channel ssh.Channel // nil until accepted
	session *Session
	sent    chan struct{} // closed when the end has been sent
	known   chan struct{} // closed when the exit status is known
	cut     bool          // the connection ended the channel; set before finished is closed

	// The following fields are protected by conn.host.mu.
	left bool // its user has given the place back
	over bool // the peer has closed it
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
			return nil, c.host.fail(StepOpenSession, CauseSessionRefused, err, fixRefused)
		}
	}
	if err != nil {
		err = r.broken(err)
		if _, lost := errors.AsType[*LostError](err); lost {
			err = fmt.Errorf("%w: %w", ErrNotUp, err) // nothing was started
		}
		return nil, err
	}
	r.channel = ch
	c.host.accepted(c)
	for _, v := range c.env {
		name, value, _ := strings.Cut(v, "=")
		// sshd takes what its AcceptEnv allows, and says nothing about the rest.
		ch.SendRequest("env", false, ssh.Marshal(struct{ Name, Value string }{name, value}))
	}
	ok, err := ch.SendRequest("exec", true, ssh.Marshal(struct{ Command string }{command}))
	if err == nil && ok {
		return reqs, nil
	}
	ch.Close()
	c.host.wg.Go(func() { ssh.DiscardRequests(reqs) })
	if err != nil {
		return nil, r.broken(err)
	}
	return nil, c.host.fail(StepOpenSession, CauseSessionRefused, fmt.Errorf("the host refuses to run %q", command), fixRefused)
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
		return r.conn.host.fail(StepOpenSession, CauseSessionRefused, err, "")
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
	r.conn.host.settle(r)
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
