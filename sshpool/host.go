package sshpool

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// A Host is one host of a [Pool]: its connections and its state. Its methods
// are safe for concurrent use.
type Host struct {
	cfg    Config
	opts   Options
	log    *slog.Logger
	cancel context.CancelFunc // ends the owner
	forget func()             // takes the host out of its pool

	kick  chan struct{}      // an attempt is asked for
	hurry chan time.Duration // the next attempt is to be made within that
	again chan struct{}      // ssh_config is to be looked at again
	look  chan struct{}      // something happened the owner should look at
	done  chan struct{}      // closed when the owner and all it started have ended

	// The following fields belong to the attempt to connect, of which there is
	// one at a time.
	warned map[string]bool // what was complained of
	target *Target         // how the host was reached last; nil: not yet
	trace  *tracer         // nil: nobody wants to know of each step

	wg sync.WaitGroup // everything started but the owner; see reserve

	mu      sync.Mutex // protects following fields
	status  Status     // without Connections, Sessions, SessionLimit
	closed  bool
	conns   []*conn       // the first one stays when there is nothing to do
	changed chan struct{} // closed and replaced when waiters should look again
	waiting int           // sessions waiting for a place
	limit   int           // sessions the peer allows on a connection; 0: not known
	lost    error         // how the last connection ended
}

func newHost(cfg Config, opts Options, cancel context.CancelFunc) *Host {
	return &Host{
		cfg:     cfg,
		opts:    opts,
		log:     opts.Logger.With("machine", cfg.Name),
		cancel:  cancel,
		kick:    make(chan struct{}, 1),
		hurry:   make(chan time.Duration, 1),
		again:   make(chan struct{}, 1),
		look:    make(chan struct{}, 1),
		done:    make(chan struct{}),
		changed: make(chan struct{}),
		warned:  make(map[string]bool),
		status:  Status{Name: cfg.Name, State: Connecting, Since: time.Now()},
	}
}

// Status returns the host's state. It does not wait.
func (h *Host) Status() Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	st := h.status
	st.Connections = len(h.conns)
	st.SessionLimit = h.limit
	for _, c := range h.conns {
		st.Sessions += c.places
	}
	return st
}

// Kick makes a host that is waiting to connect again do so now.
func (h *Host) Kick() { signal(h.kick) }

// Close ends all connections and with them their sessions, and returns when
// everything the host started has ended. It may be called more than once.
func (h *Host) Close() {
	h.cancel()
	<-h.done
	h.forget()
}

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default: // one is there already, and not yet seen
	}
}

// An owner is the state of a host's owner between two events. Only the
// goroutine in [Host.run] touches it.
type owner struct {
	*Host
	backoff Backoff
	dialed  chan dialResult
	dialing bool
	stale   bool      // ssh_config is to be looked at again
	retryAt time.Time // no attempt before
	upSince time.Time
	conns   int  // connections at the last look
	news    bool // the status differs from what OnChange was told
}

// A dialResult is what became of an attempt. Without conn and err, nothing had to
// be done.
type dialResult struct {
	conn     *conn
	probed   bool
	replaces bool // the connections there are
	err      error
}

// run is the owner: it ends, with all that was started for the host, when ctx
// does.
func (h *Host) run(ctx context.Context) {
	defer close(h.done)
	o := &owner{
		Host:    h,
		backoff: Backoff{Min: h.opts.BackoffMin, Max: h.opts.BackoffMax},
		dialed:  make(chan dialResult),
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		o.act(ctx)
		timer.Reset(o.untilNext())
		select {
		case <-ctx.Done():
		case r := <-o.dialed:
			o.onDialed(ctx, r)
		case <-h.kick:
			o.retryAt = time.Time{}
		case d := <-h.hurry:
			o.hasten(d)
		case <-h.again:
			o.stale, o.retryAt = true, time.Time{}
		case <-h.look:
		case <-timer.C:
		}
	}
	o.shutdown()
}

// act does what is due now.
func (o *owner) act(ctx context.Context) {
	o.mu.Lock()
	up, conns, lost := o.status.State == Up, len(o.Host.conns), o.lost
	o.lost = nil
	suspect := o.doubtLocked()
	more := conns > 0 && o.waiting > 0 && conns < o.opts.MaxConnections && !o.hasRoomLocked()
	o.mu.Unlock()

	if suspect != nil {
		suspect()
	}
	if conns != o.conns {
		o.conns, o.news = conns, true
	}
	switch {
	case up && conns == 0:
		o.onLost(lost)
	case lost != nil && !errors.Is(lost, ErrClosed):
		o.log.Warn("one of several ssh connections lost", "err", lost, "connections", conns)
	}
	now := time.Now()
	switch {
	case o.dialing || now.Before(o.retryAt):
	case conns == 0 || more && !o.stale:
		o.dial(ctx, conns == 0)
	case o.stale:
		o.renew(ctx)
	}
	o.closeIdle(now)
	if o.news {
		o.news = false
		if o.opts.OnChange != nil {
			o.opts.OnChange(o.Status())
		}
	}
}

// doubtLocked notes whether the host is suspect. It returns what logs a change.
func (o *owner) doubtLocked() (log func()) {
	since := o.suspectLocked()
	if o.status.State != Up {
		since = time.Time{}
	}
	before := o.status.SuspectSince
	o.status.SuspectSince = since
	switch {
	case before.IsZero() && !since.IsZero():
		o.news = true
		return func() { o.log.Warn("the machine does not answer") }
	case !before.IsZero() && since.IsZero():
		o.news = true
		if o.status.State == Up && len(o.Host.conns) > 0 {
			return func() { o.log.Info("the machine answers again", "after", time.Since(before).Round(time.Millisecond)) }
		}
	}
	return nil
}

// untilNext returns how long nothing will be due unless something happens.
func (o *owner) untilNext() time.Duration {
	next := time.Hour
	if d := time.Until(o.retryAt); d > 0 && !o.dialing {
		next = d
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for i, c := range o.Host.conns {
		if i > 0 && c.places == 0 && !c.retired {
			next = min(next, time.Until(c.idleSince.Add(o.opts.IdleTimeout)))
		}
	}
	return next
}

// dial begins an attempt; there is never more than one. It belongs to the host
// and not to whoever waits for a place, so that it is not wasted when they give up.
func (o *owner) dial(ctx context.Context, first bool) {
	o.dialing = true
	o.retryAt = time.Time{}
	if first {
		o.stale = false
	}
	o.mu.Lock()
	if first {
		o.limit = 0 // the peer may have been set up anew
	}
	if !o.status.RetryAt.IsZero() {
		o.status.RetryAt = time.Time{}
		o.news = true
	}
	o.mu.Unlock()
	o.wg.Go(func() {
		c, err := o.connect(ctx, first)
		if err == nil && first {
			err = o.probe(ctx, c)
		}
		o.dialed <- dialResult{conn: c, probed: first, err: err}
	})
}

func (o *owner) onDialed(ctx context.Context, r dialResult) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if r.err == nil && r.conn == nil {
		o.dialing = false
		return
	}
	if r.err == nil && r.conn.ended {
		r.err = &LostError{o.cfg.Name, r.conn.endErr}
	}
	if r.err == nil && len(o.Host.conns) == 0 && !r.probed {
		// Meant as one more, it is now the first.
		o.wg.Go(func() { o.dialed <- dialResult{conn: r.conn, probed: true, err: o.probe(ctx, r.conn)} })
		return
	}
	o.dialing, o.news = false, true
	if r.err != nil {
		o.onFailedLocked(r.err)
		return
	}
	o.status.Connects++
	o.status.Attempts = 0
	o.status.LastError = nil
	r.conn.idleSince = time.Now()
	for _, c := range o.Host.conns {
		c.retired = c.retired || r.replaces
	}
	o.Host.conns = append(o.Host.conns, r.conn)
	if o.status.State == Up {
		o.backoff.Reset()
		o.wakeLocked()
	} else {
		o.upSince = time.Now()
		o.setStateLocked(Up)
	}
	o.log.Info("ssh connection up", "connections", len(o.Host.conns))
}

// onFailedLocked notes that an attempt failed, and when to make the next.
func (o *owner) onFailedLocked(err error) {
	pause := o.backoff.Next()
	o.retryAt = time.Now().Add(pause)
	o.status.ConnectFailures++
	o.status.Attempts++
	o.status.LastError = err
	o.status.RetryAt = o.retryAt
	if len(o.Host.conns) == 0 {
		o.setStateLocked(Down)
	}
	o.log.Warn("ssh connection failed", "err", err, "retry_in", pause.Round(time.Millisecond))
}

// onLost notes that the last connection is gone.
func (o *owner) onLost(err error) {
	// A connection that did not last is one more failure: what comes up and
	// goes down all the time is not tried at the shortest pause for ever.
	if time.Since(o.upSince) >= 10*o.opts.BackoffMin {
		o.backoff.Reset()
	}
	pause := o.backoff.Next()
	o.retryAt = time.Now().Add(pause)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.status.LastError = err
	o.status.RetryAt = o.retryAt
	o.setStateLocked(Down)
	o.log.Warn("ssh connection lost", "err", err, "retry_in", pause.Round(time.Millisecond))
}

func (o *owner) setStateLocked(s State) {
	o.news = true
	if s != Up {
		o.status.SuspectSince = time.Time{}
	}
	if o.status.State != s {
		o.status.State = s
		o.status.Since = time.Now()
	}
	o.wakeLocked()
}

// closeIdle closes connections beyond the first that had nothing to do for
// long, and those that are to take no more sessions once they have none, but
// leaves one.
func (o *owner) closeIdle(now time.Time) {
	o.mu.Lock()
	var idle []*conn
	for i, c := range o.Host.conns {
		long := c.retired || now.Sub(c.idleSince) >= o.opts.IdleTimeout
		if c.places == 0 && long && (i > 0 || c.retired && len(o.Host.conns) > 1) {
			c.retired = true // nobody takes a place while it is being closed
			idle = append(idle, c)
		}
	}
	o.mu.Unlock()
	for _, c := range idle {
		c.kill(fmt.Errorf("connection not needed: %w", ErrClosed))
	}
}

// shutdown ends everything and tells OnChange so.
func (o *owner) shutdown() {
	o.mu.Lock()
	o.closed = true
	conns := slices.Clone(o.Host.conns)
	o.status.LastError = ErrClosed
	o.status.RetryAt = time.Time{}
	o.setStateLocked(Down)
	o.mu.Unlock()
	for _, c := range conns {
		c.kill(ErrClosed)
	}
	if o.dialing {
		if r := <-o.dialed; r.conn != nil {
			r.conn.kill(ErrClosed)
		}
	}
	o.wg.Wait()
	if o.opts.OnChange != nil {
		o.opts.OnChange(o.Status())
	}
}

// probe runs the probe on a connection nobody else knows yet, and closes the
// connection if it fails.
func (h *Host) probe(ctx context.Context, c *conn) (err error) {
	if h.cfg.Probe == nil {
		return nil
	}
	defer func() {
		if err != nil {
			c.kill(err)
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, h.opts.ProbeTimeout)
	defer cancel()
	s, err := h.openOn(ctx, c, h.cfg.ProbeCommand)
	if err == nil {
		// The probe reads and writes without ctx: closing ends that.
		stop := context.AfterFunc(ctx, func() { s.Close() })
		err = h.cfg.Probe(ctx, s)
		stop()
		s.Close()
	}
	if err == nil {
		return nil
	}
	if ctx.Err() == context.DeadlineExceeded {
		err = fmt.Errorf("no answer within %v: %w", h.opts.ProbeTimeout, err)
	}
	if ce, ok := errors.AsType[*ConnectError](err); ok {
		return ce
	}
	return h.fail(StepProbe, CauseCommandUnusable, err, "")
}
