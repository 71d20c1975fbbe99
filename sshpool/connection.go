package sshpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
)

// ErrNoPlace is matched by the error of [Connection.Spare] when a session would
// cost others a place.
var ErrNoPlace = errors.New("no place to spare")

// A Connection is one of a host's connections, for commands that are about it or
// about the host, and not what it is there for. Connections can be compared. The
// zero value is none.
type Connection struct{ c *conn }

// Connection returns the one that the session is, or was, on.
func (s *Session) Connection() Connection { return Connection{s.conn} }

// Connections returns those that are open, the oldest first.
func (h *Host) Connections() []Connection {
	h.mu.Lock()
	defer h.mu.Unlock()
	var open []Connection
	for _, c := range h.conns {
		if !c.ended {
			open = append(open, Connection{c})
		}
	}
	return open
}

// Peer is the address that the connection leads to; the zero address if something else
// than a direct TCP connection leads there.
func (c Connection) Peer() netip.Addr {
	if tcp, ok := c.c.net.RemoteAddr().(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap().WithZone("")
	}
	return netip.Addr{}
}

// Ended returns a channel that is closed when the connection has ended, or is
// about to.
func (c Connection) Ended() <-chan struct{} { return c.c.dying }

// AfterEnd has f called once the connection has ended, at once if it has. The cause
// matches [ErrClosed] when this side closed it. f must not block.
func (c Connection) AfterEnd(f func(cause error)) {
	h := c.c.host
	h.mu.Lock()
	ended, cause := c.c.ended, c.c.endErr
	if !ended {
		c.c.afterEnd = append(c.c.afterEnd, f)
	}
	h.mu.Unlock()
	if ended {
		f(cause)
	}
}

// SetTag notes something about the connection for its user.
func (c Connection) SetTag(tag any) { c.c.tag.Store(&tag) }

// Tag returns what SetTag was given last; nil if it never was.
func (c Connection) Tag() any {
	if tag := c.c.tag.Load(); tag != nil {
		return *tag
	}
	return nil
}

type tag = atomic.Pointer[any]

// Spare is [Host.Session] on this very connection, for a short command that is to
// cost nobody anything. It waits for no place and has no further connection made:
// the error matches [ErrNoPlace] when the connection is full, when somebody waits
// for a place, and where there may be only one, be that known or not. As the host's
// limit is learnt from a refusal, the first such session should be asked for while
// there is another.
func (c Connection) Spare(ctx context.Context, command string) (*Session, error) {
	if err := c.c.takeSpare(); err != nil {
		return nil, err
	}
	s, err := c.c.open(ctx, command)
	if _, refused := err.(*refusedError); refused {
		return nil, fmt.Errorf("%s: %w: %w", c.c.host.cfg.Name, ErrNoPlace, err)
	}
	return s, err
}

func (c *conn) takeSpare() error {
	h := c.host
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return fmt.Errorf("%s: %w", h.cfg.Name, ErrClosed)
	case isClosed(c.dying):
		return c.lost()
	case c.ended || c.retired || c.fullLocked() || h.waiting > 0 || c.coolUntil.After(time.Now()):
	case h.limit == 1, h.limit == 0 && c.peak < 2 && c.places == 0 && !h.cfg.Local:
	default:
		c.takeLocked()
		return nil
	}
	return fmt.Errorf("%s: %w", h.cfg.Name, ErrNoPlace)
}

// Hasten makes a host that waits to connect again do so within d.
func (h *Host) Hasten(d time.Duration) {
	select {
	case h.hurry <- d:
	default: // one is there already, and not yet seen
	}
}

// hasten moves the next attempt forward, if it is due later than in d.
func (o *owner) hasten(d time.Duration) {
	at := time.Now().Add(d)
	if !o.retryAt.After(at) {
		return
	}
	o.retryAt, o.news = at, true
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.status.RetryAt.IsZero() {
		o.status.RetryAt = at
	}
}

// Wake is for when the clock has jumped, as it does while a computer sleeps: what
// waits to connect again does so now, and a connection must show life within
// patience, or counts as lost. It does not wait.
func (p *Pool) Wake(patience time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for h := range p.hosts {
		h.wake(patience)
	}
}

func (h *Host) wake(patience time.Duration) {
	h.Kick()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	for _, c := range h.conns {
		if c.net != nil && !c.ended {
			h.wg.Go(func() { c.mustAnswer(patience) })
		}
	}
}

// mustAnswer ends the connection if it shows no life in time: an answer, or, where
// that waits behind much else, any byte of the second half of the time. What comes
// before may be older than the jump: it lay in the kernel's buffer.
func (c *conn) mustAnswer(patience time.Duration) {
	answered := make(chan struct{})
	c.host.wg.Go(func() { // ends with the connection
		defer close(answered)
		c.askAnew()
	})
	half := time.NewTicker(patience / 2)
	defer half.Stop()
	before := int64(-1)
	for range 2 {
		select {
		case <-c.dying:
			return
		case <-answered:
			return
		case <-half.C:
		}
		received := c.net.received.Load()
		if received == before {
			c.kill(fmt.Errorf("no sign of life for %v after the clock had jumped", patience))
		}
		before = received
	}
}
