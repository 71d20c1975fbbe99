package sshpool

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// This file decides which connection a session goes to.
//
// OpenSSH allows 10 sessions a connection unless its MaxSessions says otherwise,
// and a client is not told: the one too many is refused. So a connection is
// filled until it refuses, and what it had accepted by then is the limit of all
// connections to that host.
//
// A session's place at the peer becomes free when its process has ended, which
// may be a while after its user closed it. Such a session lingers: it still
// counts where the limit is concerned.

const (
	// coolDown is how long a connection that refused a session below its limit,
	// for reasons not known here, gets no other.
	coolDown = 500 * time.Millisecond
	// maxRefusals is how often one call of Session tries.
	maxRefusals = 10
)

// Session runs command on the host, through the host's shell, and returns when
// it has been started. The caller must Close the session.
//
// When the host is not up, Session fails at once with an error that matches
// [ErrNotUp]; on a closed host it matches [ErrClosed]. When all connections are
// full it waits for a place until ctx ends, while the host's owner opens further
// connections. If the connection is lost meanwhile the error is a [*LostError],
// which matches [ErrNotUp] too unless the command may have been started; if the
// host refuses to run the command, a [*ConnectError].
func (h *Host) Session(ctx context.Context, command string) (*Session, error) {
	for refusals := 0; ; refusals++ {
		c, err := h.reserve(ctx)
		if err != nil {
			return nil, err
		}
		s, err := c.open(ctx, command)
		refusal, ok := err.(*refusedError)
		if !ok {
			return s, err
		}
		if !refusal.again || refusals == maxRefusals {
			return nil, h.fail(StepOpenSession, CauseSessionRefused, err, fixRefused)
		}
	}
}

// reserve takes a place on a connection, waiting for one if need be. It also
// adds one to h.wg, for the goroutine that [conn.open] starts: here, because no
// more may be added once closed is set.
func (h *Host) reserve(ctx context.Context) (*conn, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.waiting++
	defer func() { h.waiting-- }()
	for {
		if err := h.notUpLocked(); err != nil {
			return nil, err
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("%s: wait for a session: %w", h.cfg.Name, err)
		}
		c, wait := h.findRoomLocked(time.Now())
		if c != nil {
			c.takeLocked()
			return c, nil
		}
		changed := h.changed
		h.mu.Unlock()
		signal(h.look) // the owner opens one more connection if it may
		timer := time.NewTimer(wait)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
		h.mu.Lock()
	}
}

func (h *Host) notUpLocked() error {
	switch {
	case h.closed:
		return fmt.Errorf("%s: %w", h.cfg.Name, ErrClosed)
	case h.status.State == Up:
		return h.allDyingLocked()
	case h.status.LastError != nil:
		return fmt.Errorf("%s: %w: %w", h.cfg.Name, ErrNotUp, h.status.LastError)
	default:
		return fmt.Errorf("%s: %w: still connecting for the first time", h.cfg.Name, ErrNotUp)
	}
}

// allDyingLocked returns nil if a connection lives. Between the death of the last
// one and the owner's notice of it, which changes the state, the host is not up.
func (h *Host) allDyingLocked() error {
	lost := h.lost
	for _, c := range h.conns {
		if !isClosed(c.dying) {
			return nil
		}
		lost = c.lost()
	}
	if lost == nil {
		lost = errors.New("the connection has just ended")
	}
	return fmt.Errorf("%s: %w: %w", h.cfg.Name, ErrNotUp, lost)
}

// findRoomLocked returns the oldest connection with a free place, so that later
// ones become idle. If there is none it returns when to look again at the latest.
// A dying connection never gets a session, and a suspect one only if all are.
func (h *Host) findRoomLocked(now time.Time) (*conn, time.Duration) {
	wait := time.Minute
	allSuspect := !h.suspectLocked().IsZero()
	for _, c := range h.conns {
		switch {
		case c.ended || c.retired || c.fullLocked() || isClosed(c.dying):
		case !c.suspect.IsZero() && !allSuspect:
		case c.coolUntil.After(now):
			wait = min(wait, c.coolUntil.Sub(now))
		default:
			return c, 0
		}
	}
	return nil, wait
}

func (h *Host) hasRoomLocked() bool {
	c, _ := h.findRoomLocked(time.Now())
	return c != nil
}

// refused notes that the peer refused a session on c, whose place is still
// taken. It reports whether trying again can help: not if this was the only
// session, and the peer never accepted one on this connection.
func (h *Host) refused(c *conn) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c.peak == 0 && c.places == 1 {
		return false
	}
	h.limit = max(h.limit, c.peak)
	if c.accepted < h.limit || h.limit == 0 {
		c.coolUntil = time.Now().Add(coolDown)
	}
	return true
}

// accepted notes that the peer accepted a session on c. Answers to sessions
// asked for together may be seen in another order than they came, so a limit
// learnt from a refusal can still grow.
func (h *Host) accepted(c *conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c.accepted++
	c.peak = max(c.peak, c.accepted)
	if h.limit > 0 && c.peak > h.limit {
		h.limit = c.peak
		h.wakeLocked()
	}
}

// release gives back the place of a session that could not be opened, or, on a
// local host, has been closed.
func (h *Host) release(c *conn, accepted bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if accepted {
		c.accepted--
	}
	h.releaseLocked(c)
}

func (h *Host) releaseLocked(c *conn) {
	c.places--
	if c.places == 0 {
		c.idleSince = time.Now()
		signal(h.look)
	}
	h.wakeLocked()
}

// leave gives back the place of a session that its user has closed.
func (h *Host) leave(r *remote) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.left = true
	if r.over {
		r.conn.accepted--
	} else {
		r.conn.lingering++
	}
	h.releaseLocked(r.conn)
}

// settle notes that the peer has closed a session.
func (h *Host) settle(r *remote) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.over = true
	if r.left {
		r.conn.accepted--
		r.conn.lingering--
		h.wakeLocked()
	}
}

// remove takes out a connection that has ended with err.
func (h *Host) remove(c *conn, err error) {
	for _, f := range h.takeOut(c, err) {
		f(err)
	}
}

// takeOut is remove but for telling those who wanted to know, whom it returns.
func (h *Host) takeOut(c *conn, err error) (afterEnd []func(error)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c.ended, c.endErr = true, err
	for i := range h.conns {
		if h.conns[i] == c {
			h.conns = append(h.conns[:i], h.conns[i+1:]...)
			h.lost = &LostError{h.cfg.Name, err}
			break
		}
	}
	h.wakeLocked()
	signal(h.look)
	return c.afterEnd
}

func (h *Host) wakeLocked() {
	close(h.changed)
	h.changed = make(chan struct{})
}

// takeLocked takes a place on c and announces the goroutine that will use it.
func (c *conn) takeLocked() {
	if c.places == 0 && !c.host.worksLocked() {
		signal(c.nudge)
		for _, other := range c.host.conns {
			signal(other.nudge)
		}
	}
	c.places++
	c.host.wg.Add(1)
}

func (c *conn) fullLocked() bool {
	return c.host.limit > 0 && c.places+c.lingering >= c.host.limit
}
