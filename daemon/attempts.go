package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"nixdispatch/sshpool"
)

// This file decides what an attempt costs its build that ended without a verdict.

const (
	// maxAttempts bounds the attempts that count.
	maxAttempts = 3
	// maxLosses bounds the connections that a build may lose while something was
	// tried. They do not count by themselves: the link may be bad for a long time, and
	// the machine and the build in order.
	maxLosses = 128
	// awayLong is how long a machine is away that has probably crashed: a connection
	// that is merely lost is made again sooner.
	awayLong = 20 * time.Second
)

// A cost is what the end of an attempt costs its build.
type cost int

const (
	// costNothing: the build goes on at once. It was moved, or will be tried in another
	// way.
	costNothing cost = iota
	// costPause: nothing was tried on the machine, so the attempt does not count. The
	// build goes elsewhere, or pauses. A build for which that goes on for --machine-wait
	// has failed.
	costPause
	// costLoss: the connection was lost while something was tried. The attempt counts
	// only if the machine was away for long, or was rebooted.
	costLoss
	// costAttempt: the attempt counts.
	costAttempt
	// costBuild: the build has failed; another machine would not help.
	costBuild
)

// endings are the ways in which an attempt ends without a verdict, and what each
// costs. The first that fits decides.
var endings = []struct {
	name string
	fits func(err error, doing string) bool
	cost cost
}{
	{"the scheduler moved the build", isError(errMoved), costNothing},
	{"a remote process kept from an earlier build had ended", isError(errStale), costNothing},
	{"the machine does not trust the user: the next attempt sends derivations", isError(errDistrusted), costNothing},
	{"a fault of this host", func(_ error, doing string) bool { return doing == "" }, costBuild},
	{"the machine is not connected", isError(sshpool.ErrNotUp), costPause},
	{"the machine has left the list", isError(sshpool.ErrClosed), costPause},
	{"the remote process ended while the build waited", isError(errSessionGone), costPause},
	{"the connection was lost before anything was tried", func(err error, doing string) bool { return isLost(err) && !tries(doing) }, costPause},
	{"the connection was lost while something was tried", func(err error, _ string) bool { return isLost(err) }, costLoss},
	{"no session, no greeting, or not a store that may be used", func(_ error, doing string) bool { return !tries(doing) && doing != doingMissing }, costPause},
	{"the machine failed", func(error, string) bool { return true }, costAttempt},
}

func isError(target error) func(error, string) bool {
	return func(err error, _ string) bool { return errors.Is(err, target) }
}

func isLost(err error) bool {
	_, lost := errors.AsType[*sshpool.LostError](err)
	return lost
}

// tries tells whether something was being tried on the machine: paths travelled, or
// the build ran.
func tries(doing string) bool {
	return slices.Contains([]string{doingInputs, doingBuild, doingOutputQuery, doingOutputs}, doing)
}

// costOf returns what an attempt costs that ended with err.
func costOf(err error) cost {
	doing := ""
	if fault, ok := errors.AsType[*machineError](err); ok {
		doing = fault.doing
	}
	for _, e := range endings {
		if e.fits(err, doing) {
			return e.cost
		}
	}
	return costAttempt
}

// A tally keeps count of a build's attempts. The zero value has none. Not safe for
// concurrent use.
type tally struct {
	failed int    // attempts that count
	losses []stay // that the connection ended
	now    stay   // the attempt in progress
	// idle is since when attempts have ended before anything was tried; zero if the
	// last one did not.
	idle time.Time

	// rests are the pauses after failures that count, pauses those after the others.
	rests, pauses sshpool.Backoff
}

// A stay is an attempt on a machine that had been absent for a number of times.
type stay struct {
	at     *absences
	before int
}

func newTally() tally {
	return tally{
		rests:  sshpool.Backoff{Min: restMin, Max: restMax},
		pauses: sshpool.Backoff{Min: pauseMin, Max: pauseMax},
	}
}

// begin notes that an attempt begins on the machine whose absences are given.
func (t *tally) begin(at *absences) { t.now = stay{at, at.times(time.Now())} }

// add counts an attempt that ended in err, which cost c, and returns how long the
// build keeps away from that machine. With an error the build has failed, as patience
// is over or too many attempts failed.
func (t *tally) add(c cost, err error, patience time.Duration) (time.Duration, error) {
	now := time.Now()
	if c == costPause {
		if t.idle.IsZero() {
			t.idle = now
		}
		if waited := now.Sub(t.idle); waited >= patience {
			return 0, fmt.Errorf("for %v no attempt got as far as a build: %w", waited.Round(time.Second), err)
		}
		return t.pauses.Next(), nil
	}
	t.idle = time.Time{}
	if c == costAttempt {
		t.failed++
	} else {
		t.losses = append(t.losses, t.now)
	}
	if t.failed+t.crashes(now) >= maxAttempts {
		return 0, err
	}
	if len(t.losses) >= maxLosses {
		return 0, fmt.Errorf("the connection was lost %d times: %w", len(t.losses), err)
	}
	if c == costAttempt {
		return t.rests.Next(), nil
	}
	t.pauses.Reset()
	return t.pauses.Next(), nil
}

// crashes counts the connections that were lost because the machine went down, as far
// as that is known yet.
func (t *tally) crashes(now time.Time) int {
	n := 0
	for _, s := range t.losses {
		if s.at.times(now) > s.before {
			n++
		}
	}
	return n
}

// absences count how often a machine went down in a way that is more than the loss of a
// connection: it was away for long, or was rebooted. The zero value counts none. Safe
// for concurrent use.
type absences struct {
	mu   sync.Mutex
	long int
	down time.Time // since when it has been away; zero while it is there
	boot string    // the last that it told; "" if it has told none
}

// note notes the state of the machine's connections.
func (a *absences) note(s sshpool.Status) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case s.State == sshpool.Down:
		a.down = s.Since
	case s.State == sshpool.Up && !a.down.IsZero():
		if s.Since.Sub(a.down) >= awayLong {
			a.long++
		}
		a.down = time.Time{}
	}
}

// booted notes the boot ID that the machine reports.
func (a *absences) booted(boot string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if boot == "" || boot == a.boot {
		return
	}
	if a.boot != "" {
		a.long++
	}
	a.boot = boot
}

// times returns how often it went down by now.
func (a *absences) times(now time.Time) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.down.IsZero() && now.Sub(a.down) >= awayLong {
		return a.long + 1
	}
	return a.long
}

// attempts tries the build until a machine gives a verdict, the build fails through a
// fault of this host, or its attempts are used up.
func (d *Daemon) attempts(ctx context.Context, b *build, log *slog.Logger) (outcome, error) {
	doubted := false
	for {
		o, err := d.attempt(ctx, b)
		if u, ok := errors.AsType[*unclearError](err); ok {
			if doubted || !d.dispatcher.othersFor(b, b.at) {
				return u.outcome, nil
			}
			doubted = true
			log.Warn("the failure may be the machine's, trying another one", "machine", u.outcome.machine, "killed", u.killed, "err", err)
			d.metrics.attemptFailed(u.outcome.machine, u.reason())
			d.retry(b, &machineError{u.outcome.machine, doingBuild, err}, b.tally.rests.Next())
			continue
		}
		switch {
		case err == nil && o.status.Succeeded():
			return o, nil
		case ctx.Err() != nil: // a machine may call the end that we made a failure
			return o, context.Cause(ctx)
		case err == nil:
			return o, nil
		}
		c := costOf(err)
		if c == costNothing {
			log.Debug("attempt broken off", "reason", err)
			continue
		}
		if c == costBuild {
			return o, err
		}
		fault, _ := errors.AsType[*machineError](err)
		if c != costPause || !connectionFailed(err) {
			d.metrics.attemptFailed(fault.machine, failureReason(fault))
		}
		pause, over := b.tally.add(c, err, d.opts.MachineWait)
		if over != nil {
			return o, over
		}
		log.Warn("machine failed the build, trying again", "failures", b.tally.failed, "losses", len(b.tally.losses), "err", err)
		d.retry(b, fault, pause)
	}
}
