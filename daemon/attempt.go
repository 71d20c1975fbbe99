package daemon

import (
	"context"
	"errors"
	"strings"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/scheduler"
	"nixdispatch/sshpool"
)

// An attempt is one build on one machine, over one remote process: its inputs
// go up, it is built, and its outputs come down. An attempt that fails leaves
// no verdict, and the build may have another.
type attempt struct {
	d *Daemon
	b *build
	m *machine
	r *remote
	// race has the attempts at the build that run at the same time.
	race *race
	// place is what the scheduler decided; running is set while the build has its
	// slot and may be running.
	place   placement
	running bool
	// given is the closure of the derivation's inputs.
	given []nix.StorePath
	// whole is set for machines that do not trust us: they build only what
	// follows from derivations they have, so all of those go up, and the inputs
	// that need no trust. That holds for fixed outputs too: anybody may build
	// them, but the programs that fetch them are inputs like any other.
	whole bool
}

// errDistrusted ends an attempt on a machine that turned out not to trust us,
// where the protocol does not tell beforehand. The next one on it knows.
var errDistrusted = errors.New("the machine does not trust the SSH user")

// errStale ends an attempt whose remote process, which had served other builds,
// did not outlive the time between.
var errStale = errors.New("the remote process had ended")

// run returns the machine's verdict, or the error that kept it from one.
func (a *attempt) run(ctx context.Context) (outcome, error) {
	a.whole = a.m.untrusted.Load()
	paths, err := a.inputs(ctx)
	if err != nil {
		return outcome{}, err
	}
	if err := a.timed(&a.b.account.uploading, func() error { return a.copyInputs(ctx, paths) }); err != nil {
		return outcome{}, a.distrust(err)
	}
	a.b.feed.stopCopying()
	if err := a.timed(&a.b.account.queued, func() error { return a.awaitSlot(ctx) }); err != nil {
		return outcome{}, err
	}
	result, took, err := a.build()
	a.b.account.building += took
	if err != nil {
		return outcome{}, a.lostOrDistrusted(err)
	}
	a.running = false
	if !result.Status.Success() && a.refused(firstLine(result.ErrorMsg)) {
		a.d.dispatcher.restart(a.b)
		return outcome{}, errDistrusted
	}
	if !result.Status.Success() {
		o, err := a.failed(result, took)
		if err == nil && !a.race.win(a.b) {
			return outcome{}, errOutrun
		}
		return o, err
	}
	if !a.race.win(a.b) {
		return outcome{}, errOutrun
	}
	a.d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.Built(a.b.id) })
	if err := a.timed(&a.b.account.downloading, func() error { return a.fetchOutputs(ctx) }); err != nil {
		return outcome{}, err
	}
	return a.outcome(result, took), nil
}

// timed adds to spent what fn takes.
func (a *attempt) timed(spent *time.Duration, fn func() error) error {
	start := time.Now()
	defer func() { *spent += time.Since(start) }()
	return fn()
}

// failed says what a failure that the machine reports comes to.
func (a *attempt) failed(r nix.BuildResult, took time.Duration) (outcome, error) {
	o := a.outcome(r, took)
	switch judge(r, a.b.drvPath, a.b.drv, a.given) {
	case byMachine:
		return outcome{}, a.m.fault(doingBuild, &complaint{words: o.err})
	case byDisk:
		return outcome{}, a.m.fault(doingBuild, &complaint{words: o.err, full: true})
	case byKilling:
		return outcome{}, &unclearError{outcome: o, killed: true}
	case unclear:
		return outcome{}, &unclearError{outcome: o}
	default:
		return o, nil
	}
}

// errSessionGone ends an attempt whose remote process ended while the build
// waited there for a slot. Nothing was tried, so nothing has failed.
var errSessionGone = errors.New("the remote process ended while the build waited for a slot")

// awaitSlot tells the scheduler that the inputs are there and waits for its
// leave to build.
func (a *attempt) awaitSlot(ctx context.Context) error {
	a.d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.Staged(a.b.id, a.place.machine) })
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		select {
		case <-a.r.session.Done():
			cancel(a.fault(doingSlot, errSessionGone))
		case <-ctx.Done():
		}
	}()
	err := a.d.dispatcher.awaitSlot(ctx, a.b, a.place)
	cancel(nil)
	<-gone
	a.running = err == nil
	return err
}

// lostOrDistrusted says what the failure of a running build means for its slot. It
// stays running unless the end of the remote process is confirmed.
func (a *attempt) lostOrDistrusted(err error) error {
	if _, lost := errors.AsType[*sshpool.LostError](err); lost {
		a.loseSlot()
		return err
	}
	if err = a.distrust(err); errors.Is(err, errDistrusted) {
		a.running = false
		a.d.dispatcher.restart(a.b)
	}
	return err
}

// loseSlot keeps the slot taken: nobody knows whether the build still runs.
func (a *attempt) loseSlot() {
	a.running = false
	session := a.r.session
	a.d.holdSlot(a.b, a.place.machine, func(ctx context.Context) string { return a.m.awaitGone(ctx, session) })
}

func (a *attempt) outcome(r nix.BuildResult, took time.Duration) outcome {
	return outcome{
		status:   buildStatus(r.Status),
		err:      nix.PlainText(r.ErrorMsg),
		machine:  a.m.line.StoreURI,
		duration: took,
	}
}

// build runs the remote build. A slot is held.
func (a *attempt) build() (nix.BuildResult, time.Duration, error) {
	e := a.b.event()
	e.Event = &dispatchv1.BuildEvent_Building{Building: &dispatchv1.Building{}}
	a.b.feed.post(e)
	a.r.startLog(a.b.feed)
	start := time.Now()
	a.b.feed.startBuilding(start)
	defer a.b.feed.stopBuilding()
	defer a.d.hedges.add(a)()
	running := a.d.metrics.running(a.m.line.StoreURI)
	running.Inc()
	defer running.Dec()
	var result nix.BuildResult
	var err error
	// The limits are each caller's own and enforced here; the machine gets none.
	if a.whole {
		result, err = a.r.store.realise(a.b.drvPath, nix.BuildOptions{})
	} else {
		result, err = a.r.store.build(a.b.drvPath, a.b.drv.Basic(a.given), nix.BuildOptions{})
	}
	took := time.Since(start)
	if err != nil {
		return result, took, a.fault(doingBuild, err)
	}
	return result, took, nil
}

// fault blames the machine, quoting what its process printed last.
func (a *attempt) fault(doing string, err error) error {
	return a.m.fault(doing, withStderr(a.r.stall.explain(err), a.r.stderr))
}

// distrust looks for a refusal of our user in an error of the machine's Nix: the
// serve protocol cannot say beforehand whether a user is trusted, nor can old
// Nix daemons. The first refusal is remembered, until the machine is probed
// again, and becomes errDistrusted.
func (a *attempt) distrust(err error) error {
	words := a.r.stderr.last()
	if remote, ok := errors.AsType[*worker.RemoteError](err); ok {
		words = remote.Message
	}
	if a.refused(words) {
		return errDistrusted
	}
	return err
}

// refused looks for a refusal in the words of the machine's Nix, and remembers it.
func (a *attempt) refused(words string) bool {
	if a.whole || a.r.store.trust() == worker.Trusted || !refuses(words) {
		return false
	}
	a.m.untrusted.Store(true)
	a.m.log.Warn("the SSH user is not trusted on the machine: derivations are sent whole",
		"hint", "add the user to trusted-users in the machine's nix.conf")
	return true
}

// firstLine is the part of a failed build's message that is Nix's own: the
// builder's last words follow it.
func firstLine(message string) string {
	line, _, _ := strings.Cut(message, "\n")
	return line
}

// refuses tells whether a line of a Nix daemon's words says that it does not
// trust the user (src/libstore/local-store.cc and daemon.cc; Nix 2.8 has "a valid
// signature"). What a builder prints has no such beginning of a line, unless it
// means to.
func refuses(words string) bool {
	for line := range strings.Lines(nix.PlainText(words)) {
		line = strings.TrimPrefix(strings.TrimSpace(line), "error: ")
		if strings.HasPrefix(line, "you are not privileged to build ") ||
			strings.HasPrefix(line, "cannot add path '") &&
				(strings.Contains(line, "lacks a valid signature") || strings.Contains(line, "lacks a signature by a trusted key")) {
			return true
		}
	}
	return false
}
