package sshpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
)

// A conn is one connection to a host, with the goroutines that serve it. They
// all end with it and are waited for in Host.wg.
type conn struct {
	host *Host
	ssh  ssh.Conn  // nil for a local host
	net  *liveConn // nil for a local host

	keepInterval time.Duration // silence is looked for so often
	keepCount    int           // and so many times is too many

	env []string // to send with each session
	tag tag      // its user's

	question question
	nudge    chan struct{} // attend looks again

	dying    chan struct{} // closed by kill, or when the transport fails
	killOnce sync.Once
	cause    error // why; may be read once dying is closed

	// The following fields are protected by host.mu.
	places    int       // sessions open or being opened
	lingering int       // sessions closed here whose end the peer has not confirmed
	accepted  int       // of places and lingering, those the peer accepted
	peak      int       // the most accepted at any time
	suspect   time.Time // since when; zero if it is not
	coolUntil time.Time // no new sessions before
	idleSince time.Time // when places became 0
	retired   bool      // no new sessions, ever
	ended     bool
	endErr    error
	afterEnd  []func(error)
}

// versionLine is an SSH server's version in what it says first, "" if there is
// none. Other lines may precede it (RFC 4253, section 4.2).
func versionLine(head []byte) string {
	for line := range strings.Lines(string(head)) {
		if strings.HasPrefix(line, "SSH-") {
			return strings.TrimRight(line, "\r\n")
		}
	}
	return ""
}

// connect makes a connection, without telling anyone of it. first says that there
// is no other: then OpenSSH's configuration is asked anew, so that a change of it,
// or of what its Match blocks look at, counts the next time the host is reached.
func (h *Host) connect(ctx context.Context, first bool) (*conn, error) {
	c := &conn{host: h, dying: make(chan struct{})}
	if h.cfg.Local {
		h.wg.Go(func() {
			<-c.dying
			h.remove(c, c.cause)
		})
		return c, nil
	}
	t, err := h.resolveTarget(ctx, first)
	if err != nil {
		return nil, err
	}
	bad := make(badKeys)
	for {
		known := len(bad)
		c, err = h.connectOnce(ctx, t, bad)
		if err == nil {
			return c, nil
		}
		if len(bad) == known || ctx.Err() != nil {
			return nil, err
		}
		h.log.Warn("a key cannot sign, the others are tried", "err", err)
	}
}

// connectOnce makes a connection without the keys known to be bad, and adds to
// them one that turns out to be.
func (h *Host) connectOnce(ctx context.Context, t *Target, bad badKeys) (*conn, error) {
	c := &conn{host: h, dying: make(chan struct{}), nudge: make(chan struct{}, 1), env: t.Env}
	c.keepInterval, c.keepCount = h.opts.KeepaliveInterval, h.opts.KeepaliveCount
	if t.ServerAliveInterval > 0 {
		c.keepInterval = t.ServerAliveInterval
		if t.ServerAliveCountMax > 0 {
			c.keepCount = t.ServerAliveCountMax
		}
	}
	nc, err := h.dialTransport(ctx, t)
	if err != nil {
		return nil, err
	}
	c.net = newLiveConn(nc, c)
	chans, reqs, err := h.handshake(ctx, c, t, bad)
	if err != nil {
		nc.Close()
		return nil, err
	}
	h.wg.Go(func() { ssh.DiscardRequests(reqs) })
	h.wg.Go(func() {
		for ch := range chans {
			ch.Reject(ssh.Prohibited, "this side offers nothing")
		}
	})
	h.wg.Go(func() {
		err := c.ssh.Wait()
		c.kill(fmt.Errorf("peer ended the connection: %w", err))
		h.remove(c, c.cause)
	})
	h.wg.Go(c.attend)
	return c, nil
}

// kill ends the connection, and everything that waits for the peer with it. It
// does not wait. The first cause given is what the sessions and the host get.
func (c *conn) kill(cause error) {
	c.markLost(cause)
	if c.net != nil {
		c.net.Close()
	}
}

// markLost notes the cause before anybody can see the effect: x/crypto gives
// readers of a channel the same io.EOF when the transport fails as when the
// command closes its output.
//
// To whoever reads a stream, io.EOF is its clean end: no cause may match it.
func (c *conn) markLost(cause error) {
	c.killOnce.Do(func() {
		if errors.Is(cause, io.EOF) {
			cause = errPeerClosed
		}
		c.cause = cause
		close(c.dying)
	})
}

var errPeerClosed = errors.New("closed by the peer")

// lost returns the error for those whose session the connection's end ended. It
// may be called once dying is closed.
func (c *conn) lost() error { return &LostError{c.host.cfg.Name, c.cause} }

// retire keeps new sessions off the connection, which ends with its last one.
func (c *conn) retire() {
	c.host.mu.Lock()
	defer c.host.mu.Unlock()
	c.retired = true
	signal(c.host.look)
}

const (
	// slowProgress is how much must have been received in one OpenTimeout for
	// the peer to count as busy and not as stuck: more than keepalives and
	// window adjustments make, less than 1 Mbit/s.
	slowProgress = 64 << 10
	// slowRounds is how many OpenTimeouts a busy peer gets.
	slowRounds = 4
)

// watch kills the connection if what is called is not over in time. The caller
// must call the function it returns when it is.
func (c *conn) watch(what string) (over func()) {
	stop := make(chan struct{})
	c.host.wg.Go(func() {
		timeout := c.host.opts.OpenTimeout
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		before := c.net.received.Load()
		for round := 1; ; round++ {
			select {
			case <-stop:
				return
			case <-timer.C:
			}
			received := c.net.received.Load()
			if received-before < slowProgress || round == slowRounds {
				c.kill(fmt.Errorf("%s: no answer within %v", what, time.Duration(round)*timeout))
				return
			}
			before = received
			timer.Reset(timeout)
		}
	})
	return func() { close(stop) }
}
