package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/sshpool"
)

func TestWhatAnAttemptCosts(t *testing.T) {
	t.Parallel()
	m := new(machine)
	lost := &sshpool.LostError{Host: "m", Err: io.ErrUnexpectedEOF}
	refused := &sshpool.ConnectError{Step: sshpool.StepOpenSession, Err: errors.New("refused")}
	seen := make(map[string]bool)
	for _, tt := range []struct {
		row  string // of endings
		err  error
		want cost
	}{
		{"the scheduler moved the build", errMoved, costNothing},
		{"the scheduler moved the build", m.fault(doingSession, errMoved), costNothing},
		{"a remote process kept from an earlier build had ended", errStale, costNothing},
		{"the machine does not trust the user: the next attempt sends derivations", errDistrusted, costNothing},
		{"a fault of this host", &localError{doing: "import", err: errors.New("disk full")}, costBuild},
		{"a fault of this host", errors.New("a derivation that cannot be read"), costBuild},
		{"the machine is not connected", m.fault(doingSession, fmt.Errorf("m: %w: %w", sshpool.ErrNotUp, refused)), costPause},
		{"the machine has left the list", m.fault(doingSession, sshpool.ErrClosed), costPause},
		{"the machine has left the list", m.fault(doingBuild, &sshpool.LostError{Host: "m", Err: sshpool.ErrClosed}), costPause},
		{"the remote process ended while the build waited", m.fault(doingSlot, errSessionGone), costPause},
		{"the remote process ended while the build waited", m.fault(doingInputs, errSessionGone), costPause},
		{"the connection was lost before anything was tried", m.fault(doingSession, lost), costPause},
		{"the connection was lost before anything was tried", m.fault("start nix-store", lost), costPause},
		{"the connection was lost before anything was tried", m.fault(doingStoreLook, lost), costPause},
		{"the connection was lost before anything was tried", m.fault(doingMissing, lost), costPause},
		{"the connection was lost while something was tried", m.fault(doingInputs, lost), costLoss},
		{"the connection was lost while something was tried", m.fault(doingBuild, lost), costLoss},
		{"the connection was lost while something was tried", m.fault(doingOutputQuery, lost), costLoss},
		{"the connection was lost while something was tried", m.fault(doingOutputs, lost), costLoss},
		{"no session, no greeting, or not a store that may be used", m.fault(doingSession, refused), costPause},
		{"no session, no greeting, or not a store that may be used", m.fault("start nix-store", &nixFault{err: errors.New("not found")}), costPause},
		{"no session, no greeting, or not a store that may be used", m.fault(doingStoreLook, errOwnStore), costPause},
		{"the machine failed", m.fault(doingMissing, &worker.RemoteError{Message: "database is locked"}), costAttempt},
		{"the machine failed", m.fault(doingMissing, errCopyStalled), costAttempt},
		{"the machine failed", m.fault(doingInputs, io.ErrUnexpectedEOF), costAttempt},
		{"the machine failed", m.fault(doingBuild, &complaint{words: "No space left on device", full: true}), costAttempt},
		{"the machine failed", m.fault(doingOutputQuery, errors.New("not valid there")), costAttempt},
		{"the machine failed", m.fault(doingOutputs, errors.New("hash mismatch")), costAttempt},
	} {
		seen[tt.row] = true
		if got := costOf(tt.err); got != tt.want {
			t.Errorf("%v: cost %v, want %v", tt.err, got, tt.want)
		}
		doing := ""
		if fault, ok := errors.AsType[*machineError](tt.err); ok {
			doing = fault.doing
		}
		for _, e := range endings {
			if e.fits(tt.err, doing) {
				if e.name != tt.row {
					t.Errorf("%v: %q, want %q", tt.err, e.name, tt.row)
				}
				break
			}
		}
	}
	for _, e := range endings {
		if !seen[e.name] {
			t.Errorf("no test for %q", e.name)
		}
	}
}

func TestTally(t *testing.T) {
	t.Parallel()
	const patience = time.Minute
	failure := errors.New("failed")
	at := func(f func(t *testing.T, tally *tally, m *absences)) func(*testing.T) {
		return func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tally, m := newTally(), new(absences)
				tally.begin(m)
				f(t, &tally, m)
			})
		}
	}
	t.Run("what is tried counts", at(func(t *testing.T, tally *tally, m *absences) {
		for n := 1; n <= maxAttempts; n++ {
			tally.add(costPause, failure, patience) // counts for nothing
			rest, over := tally.add(costAttempt, failure, patience)
			if (over != nil) != (n == maxAttempts) || over == nil && rest < restMin/2 {
				t.Errorf("failure %d: rest %v, over %v", n, rest, over)
			}
		}
	}))
	t.Run("what is not tried pauses, until patience is over", at(func(t *testing.T, tally *tally, m *absences) {
		start, tries := time.Now(), 0
		for {
			pause, over := tally.add(costPause, failure, patience)
			if over != nil {
				break
			}
			if tries++; pause < pauseMin/2 {
				t.Fatalf("pause %v", pause)
			}
			time.Sleep(pause)
		}
		if took := time.Since(start); took < patience || took > patience+2*pauseMax || tries > 100 {
			t.Errorf("given up after %v and %d tries, want %v", took, tries, patience)
		}
	}))
	t.Run("patience begins again after something was tried", at(func(t *testing.T, tally *tally, m *absences) {
		for range 5 {
			for range 2 {
				if _, over := tally.add(costPause, failure, patience); over != nil {
					t.Fatalf("over: %v", over)
				}
				time.Sleep(patience - time.Second)
			}
			tally.add(costLoss, failure, patience)
		}
	}))
	t.Run("lost connections count if the machine stays away", at(func(t *testing.T, tally *tally, m *absences) {
		for n := range 10 {
			m.note(sshpool.Status{State: sshpool.Down, Since: time.Now()})
			if _, over := tally.add(costLoss, failure, patience); (over != nil) != (n == maxAttempts) {
				t.Fatalf("loss %d: over %v", n, over)
			} else if over != nil {
				return
			}
			time.Sleep(awayLong)
			m.note(sshpool.Status{State: sshpool.Up, Since: time.Now()})
			tally.begin(m)
		}
	}))
	t.Run("lost connections count if the machine is still away", at(func(t *testing.T, tally *tally, m *absences) {
		for n := range maxAttempts {
			m := new(absences) // of another machine
			tally.begin(m)
			m.note(sshpool.Status{State: sshpool.Down, Since: time.Now()})
			if _, over := tally.add(costLoss, failure, patience); over != nil {
				t.Fatalf("loss %d: over %v", n, over)
			}
			time.Sleep(awayLong)
		}
		if _, over := tally.add(costLoss, failure, patience); over == nil {
			t.Error("tried on, though three machines went down under it")
		}
	}))
	t.Run("lost connections count if the machine was rebooted", at(func(t *testing.T, tally *tally, m *absences) {
		for n := range 10 {
			m.booted(fmt.Sprint("boot-", n))
			m.booted("") // a connection that does not tell
			tally.begin(m)
			if _, over := tally.add(costLoss, failure, patience); (over != nil) != (n == maxAttempts) {
				t.Fatalf("loss %d: over %v", n, over)
			} else if over != nil {
				return
			}
		}
	}))
	t.Run("other lost connections do not count, and are bounded", at(func(t *testing.T, tally *tally, m *absences) {
		for n := 1; ; n++ {
			m.note(sshpool.Status{State: sshpool.Down, Since: time.Now()})
			m.booted("the same")
			pause, over := tally.add(costLoss, failure, patience)
			if over != nil {
				if n != maxLosses {
					t.Errorf("given up after %d losses, want %d", n, maxLosses)
				}
				return
			}
			if pause < pauseMin/2 || pause > pauseMax {
				t.Fatalf("loss %d: pause %v", n, pause)
			}
			time.Sleep(awayLong - time.Second)
			m.note(sshpool.Status{State: sshpool.Up, Since: time.Now()})
			tally.begin(m)
		}
	}))
}

// TestConnectionLostManyTimes cuts off the only machine that can do eight builds, each
// time when some of them are being built.
func TestConnectionLostManyTimes(t *testing.T) {
	t.Parallel()
	const builds, cuts = 8, 10
	m := oneMachine("ssh")
	m.slots = builds
	var ended atomic.Int32
	m.shell = shellOf(m, &ended, func() string { return "gone" })
	var lasting atomic.Bool
	lasting.Store(true)
	m.build = func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
		if lasting.Load() {
			return untilGone(ctx, req)
		}
		return m.site.recipe(req.DrvPath).build(m.store, req)
	}
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, options: func(o *Options) { o.LoadInterval = time.Minute }})
	s.eventually("the machine has reported its load", func() bool { return s.machineStatus(m).GetLoad() != nil })
	stories := make(chan *story, builds)
	for n := range builds {
		h := s.hook()
		h.accepted(s.drv(fmt.Sprint("long-", n), drvConfig{}))
		go func() { stories <- h.finish() }()
	}
	for range cuts {
		s.eventually("some are being built", func() bool { return m.building() > 0 })
		m.ssh.Cut()
		s.eventually("they have ended there", func() bool { return m.building() == 0 })
	}
	lasting.Store(false)
	s.eventually("some are being built, or have been", func() bool { return len(m.built()) > cuts })
	m.ssh.Cut() // those that began before
	for range builds {
		(<-stories).mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	}
}

// TestNothingTriedIsNoAttempt has the only machine refuse sessions for longer than
// three attempts take.
func TestNothingTriedIsNoAttempt(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	s := newSite(t, m)
	m.ssh.RefuseExec(true)
	h := s.hook()
	h.accepted(s.drv("patient", drvConfig{}))
	var once sync.Once
	failures := 0
	h.onEvent = func(e *dispatchv1.BuildEvent) {
		if e.GetQueued() != nil {
			if failures++; failures > maxAttempts {
				once.Do(func() { m.ssh.RefuseExec(false) })
			}
		}
	}
	// Its Nix is tried in the background: what the machine is parked for is forgotten, as
	// if that had succeeded each time.
	done := make(chan *story)
	go func() { done <- h.finish() }()
	for {
		select {
		case st := <-done:
			st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
			if failures <= maxAttempts {
				t.Errorf("%d attempts failed, want more than %d", failures, maxAttempts)
			}
			return
		case <-time.After(10 * time.Millisecond):
			s.inUse(m).condition.probed(nil, time.Now())
			s.inUse(m).keeper.tell()
		}
	}
}
