package daemon

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// limits are what one caller allows a build; zero means no limit.
type limits struct {
	timeout   time.Duration
	maxSilent time.Duration
	maxLog    int64
}

func limitsFrom(l *dispatchv1.Limits) limits {
	return limits{
		timeout:   max(0, l.GetTimeout().AsDuration()),
		maxSilent: max(0, l.GetMaxSilentTime().AsDuration()),
		maxLog:    int64(min(l.GetMaxLogSize(), 1<<62)), //nolint:gosec // bounded here
	}
}

// proto is what limitsFrom reads.
func (l limits) proto() *dispatchv1.Limits {
	p := &dispatchv1.Limits{MaxLogSize: uint64(l.maxLog)} //nolint:gosec // not negative
	if l.timeout > 0 {
		p.Timeout = durationpb.New(l.timeout)
	}
	if l.maxSilent > 0 {
		p.MaxSilentTime = durationpb.New(l.maxSilent)
	}
	return p
}

// A follower is one caller's interest in a build.
type follower struct {
	b      *build
	uid    uint32 // whose it is
	limits limits
	// leave ends the interest; the build's last follower to leave cancels it, for
	// the reason given. It may be called more than once.
	leave func(why error)
	// last is set when the interest that ended was the last one, so that the build was
	// cancelled. It may be read after leave.
	last bool

	// Those below belong to follow.

	cursor  cursor
	machine string // the store URI that the build was last placed on
}

// logChunk is how much of the log one message carries at most.
const logChunk = 64 << 10

// follow passes the build's news to send until the build has ended or one of the
// caller's limits is passed, and returns how it ended for this caller. A slow
// send delays this follower alone. handOver is called once, when the outputs are
// about to be imported; nil if the caller holds no locks. The error is errShutdown for
// a build that only the daemon's end has ended.
func (f *follower) follow(ctx context.Context, send func(*dispatchv1.BuildEvent) error, handOver func(paths []string) error) (outcome, error) {
	calling := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		f.enforce(ctx, cancel)
	}()
	defer func() { cancel(nil); <-watching }()
	for {
		r := f.b.feed.read(&f.cursor)
		// First, for the log may be long and others wait for the locks.
		if handOver != nil && r.handOver != nil {
			if err := handOver(r.handOver); err != nil {
				return outcome{}, err
			}
			handOver = nil
		}
		if err := f.pass(ctx, r, send); err != nil {
			return outcome{}, err
		}
		if r.outcome != nil && r.outcome.unfinished {
			return outcome{}, errShutdown
		}
		if r.outcome != nil {
			return *r.outcome, nil
		}
		select {
		case <-r.changed:
		case <-ctx.Done():
			if over, ok := context.Cause(ctx).(*limitError); ok { //nolint:errorlint // set by enforce, never wrapped
				if f.last {
					f.b.feed.awaitEnd(calling)
				}
				return outcome{status: over.status, err: over.text, machine: f.machine}, nil
			}
			return outcome{}, context.Cause(ctx)
		}
	}
}

// pass sends what a reading brought: events in order, the log in chunks.
func (f *follower) pass(ctx context.Context, r reading, send func(*dispatchv1.BuildEvent) error) error {
	for _, e := range r.events {
		if p := e.GetPlaced(); p != nil {
			f.machine = p.GetMachine()
		}
		if err := send(e); err != nil {
			return err
		}
	}
	if r.progress != nil {
		if err := send(r.progress); err != nil {
			return err
		}
	}
	for ctx.Err() == nil {
		// No buffer is kept: thousands of builds may wait, and say nothing.
		size := min(f.b.feed.log.length()-f.cursor.log, logChunk)
		if size == 0 {
			break
		}
		data := make([]byte, size)
		n, err := f.b.feed.log.readAt(data, f.cursor.log)
		if err != nil {
			return fmt.Errorf("read the build's log: %w", err)
		}
		f.cursor.log += int64(n)
		e := f.b.event()
		e.Event = &dispatchv1.BuildEvent_Log{Log: &dispatchv1.Log{Data: data[:n]}}
		if err := send(e); err != nil {
			return err
		}
	}
	if lost := f.b.feed.log.lost(); r.outcome != nil && lost != nil {
		e := f.b.event()
		e.Event = &dispatchv1.BuildEvent_Log{Log: &dispatchv1.Log{Data: []byte("\n" + lost.Error() + "\n")}}
		return send(e)
	}
	return nil
}

// A limitError says that a build passed a limit of its caller.
type limitError struct {
	status dispatchv1.BuildStatus
	text   string
}

func (e *limitError) Error() string { return e.text }

// enforce watches the caller's limits while the remote build runs, and the timeout also
// while its inputs are copied, and ends the following when one is passed. It looks at the build itself, not at what the
// caller has read of it.
func (f *follower) enforce(ctx context.Context, cancel context.CancelCauseFunc) {
	if f.limits == (limits{}) {
		return
	}
	for {
		since, limits, changed := f.b.feed.limited(f.limits)
		wait := time.Duration(1<<63 - 1)
		if !since.IsZero() {
			var over *limitError
			if wait, over = limits.check(since, f.b.feed.log, time.Now()); over != nil {
				// At once, for the caller may read nothing for a long time.
				f.leave(over)
				cancel(over)
				return
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// check returns which limit has been passed, or how long until one can be.
func (l limits) check(since time.Time, log *spool, now time.Time) (time.Duration, *limitError) {
	wait := time.Duration(1<<63 - 1)
	if l.maxLog > 0 && log.length() > l.maxLog {
		return 0, &limitError{dispatchv1.BuildStatus_BUILD_STATUS_LOG_LIMIT_EXCEEDED,
			fmt.Sprintf("killed after writing more than %d bytes of log output", l.maxLog)}
	}
	if l.timeout > 0 {
		left := l.timeout - now.Sub(since)
		if left <= 0 {
			return 0, &limitError{dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT,
				fmt.Sprintf("timed out after %d seconds", int(l.timeout.Seconds()))}
		}
		wait = min(wait, left)
	}
	if l.maxSilent > 0 {
		last := log.lastWrite()
		if last.Before(since) {
			last = since
		}
		left := l.maxSilent - now.Sub(last)
		if left <= 0 {
			return 0, &limitError{dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT,
				fmt.Sprintf("timed out after %d seconds of silence", int(l.maxSilent.Seconds()))}
		}
		wait = min(wait, left)
	}
	return wait, nil
}
