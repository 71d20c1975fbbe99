package sshpool

import (
	"context"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"
)

// A StepReport tells of a step on the way to a host that went well.
type StepReport struct {
	Step Step
	Took time.Duration
	// Detail is what was found, in words for a person. It may hold foreign text.
	Detail string
	// Warnings are about the configuration that counted in this step.
	Warnings []string
}

// A Check is one connection to a host, made apart from any [Pool] to see how that
// goes. It is not safe for concurrent use.
type Check struct {
	h *Host
	c *conn
}

// Connect makes a connection as a [Pool] would that has none to the host. report
// is told of each step that went well, in order and before the next begins; a
// local host has none. The error is a [*ConnectError] that names the step at which
// it ended. Of opts, OnChange counts for nothing, nor does the Probe of cfg.
//
// The caller must Close the result.
func Connect(ctx context.Context, cfg Config, opts Options, report func(StepReport)) (*Check, error) {
	h := newHost(cfg, opts.withDefaults(), func() {})
	h.trace = &tracer{report: report, last: time.Now()}
	c, err := h.connect(ctx, true)
	if err != nil {
		h.wg.Wait() // a proxy may be about to end
		return nil, err
	}
	return &Check{h, c}, nil
}

// Session runs command on the host and returns when it has been started, or an
// error as those of [Host.Session]. The caller must Close the session.
func (k *Check) Session(ctx context.Context, command string) (*Session, error) {
	return k.h.openOn(ctx, k.c, command)
}

// Close ends the connection and its sessions, and returns when everything that was
// started for it has ended. It may be called more than once.
func (k *Check) Close() {
	k.c.kill(ErrClosed)
	k.h.wg.Wait()
}

// openOn runs command on a connection that others do not know of.
func (h *Host) openOn(ctx context.Context, c *conn, command string) (*Session, error) {
	h.mu.Lock()
	c.takeLocked()
	h.mu.Unlock()
	s, err := c.open(ctx, command)
	if _, ok := err.(*refusedError); ok {
		err = h.fail(StepOpenSession, CauseSessionRefused, err, fixRefused)
	}
	return s, err
}

const fixRefused = "look at what sshd there allows this user: MaxSessions, ForceCommand, authorized_keys"

// A tracer tells of the steps of one attempt to connect. A nil one tells nobody.
type tracer struct {
	report   func(StepReport)
	last     time.Time // when the last step ended
	warnings []string
}

// done tells that a step has gone well just now.
func (t *tracer) done(step Step, detail string) { t.doneAt(time.Now(), step, detail) }

func (t *tracer) doneAt(at time.Time, step Step, detail string) {
	if t == nil {
		return
	}
	r := StepReport{Step: step, Took: at.Sub(t.last), Detail: detail, Warnings: t.warnings}
	t.last, t.warnings = at, nil
	t.report(r)
}

// warn adds a warning to the next step.
func (t *tracer) warn(warning string) {
	if t != nil {
		t.warnings = append(t.warnings, warning)
	}
}

// A resolveMark notes when a [net.Dialer] has found out the address, and goes on
// to connect to it.
type resolveMark struct {
	once sync.Once
	at   time.Time
	addr string
}

func (m *resolveMark) control(_ context.Context, _, addr string, _ syscall.RawConn) error {
	m.once.Do(func() { m.at, m.addr = time.Now(), addr })
	return nil
}

// connected tells of the steps of a dial that has ended: after the name had an
// address, and with a connection or not.
func (t *tracer) connected(m *resolveMark, nc net.Conn) {
	if t == nil {
		return
	}
	unused := false
	m.once.Do(func() { unused = true }) // nobody writes to it after this
	if !unused {
		host, _, _ := net.SplitHostPort(m.addr)
		t.doneAt(m.at, StepResolve, host)
	}
	if nc != nil {
		t.done(StepConnect, nc.RemoteAddr().String())
	}
}

// greeted tells of the steps up to the host's key: what came over the transport
// says that there is one, if a proxy made it.
func (t *tracer) greeted(l *liveConn, target *Target) {
	if t == nil {
		return
	}
	head, at := l.beginning()
	if by := target.proxied(); by != "" && !at.IsZero() {
		t.doneAt(at, StepConnect, by)
	}
	if version := versionLine(head); version != "" {
		t.done(StepHandshake, version)
	}
}

// proxied says by what the target is reached, "" if not by a proxy.
func (t *Target) proxied() string {
	switch {
	case t.ProxyJump != "":
		return "by ProxyJump " + t.ProxyJump
	case t.ProxyCommand != "":
		return fmt.Sprintf("by ProxyCommand %q", t.ProxyCommand)
	default:
		return ""
	}
}
