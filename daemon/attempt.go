package daemon

import (
	"context"
	"errors"
	"strings"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
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
	if err := a.copyInputs(ctx, paths); err != nil {
		return outcome{}, a.distrust(err, "")
	}
	at := scheduler.MachineID(a.m.line.StoreURI)
	a.d.dispatcher.staged(a.b, at)
	if err := a.d.dispatcher.awaitSlot(ctx, a.b, at); err != nil {
		return outcome{}, err
	}
	result, took, err := a.build()
	if _, lost := errors.AsType[*sshpool.LostError](err); lost {
		a.d.holdSlot(a.b, at)
		return outcome{}, err
	}
	if err != nil {
		return outcome{}, a.distrust(err, "")
	}
	if !result.Status.Success() {
		if err := a.distrust(nil, result.ErrorMsg); err != nil {
			return outcome{}, err
		}
		return a.outcome(result, took), nil
	}
	a.d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.Built(a.b.id) })
	if err := a.fetchOutputs(ctx); err != nil {
		return outcome{}, err
	}
	return a.outcome(result, took), nil
}

func (a *attempt) outcome(r nix.BuildResult, took time.Duration) outcome {
	return outcome{
		status:   buildStatus(r.Status),
		err:      r.ErrorMsg,
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
	var result nix.BuildResult
	var err error
	// The limits are each caller's own and enforced here; the machine gets none.
	if a.whole {
		result, err = a.r.store.realise(a.b.drvPath, nix.BuildOptions{})
	} else {
		paths, _ := a.b.inputs.await(context.Background()) // they were there when the attempt began
		result, err = a.r.store.build(a.b.drvPath, a.b.drv.Basic(paths), nix.BuildOptions{})
	}
	took := time.Since(start)
	if err != nil {
		return result, took, a.fault("build", err)
	}
	return result, took, nil
}

// fault blames the machine, quoting what its process printed last.
func (a *attempt) fault(doing string, err error) error {
	return a.m.fault(doing, withStderr(err, a.r.stderr))
}

// refusals are what a Nix daemon says to a user it does not trust: 2.8, then
// later ones (src/libstore/local-store.cc and daemon.cc).
var refusals = []string{
	"lacks a valid signature",
	"lacks a signature by a trusted key",
	"you are not privileged to build input-addressed derivations",
	"you are not privileged to build derivations",
}

// distrust looks for a refusal in an error, in the machine's own words: the
// serve protocol cannot say beforehand whether a user is trusted. The first
// refusal of a machine is remembered and becomes errDistrusted.
func (a *attempt) distrust(err error, words string) error {
	if err != nil {
		words = err.Error()
	}
	if a.whole {
		return err
	}
	for _, refusal := range refusals {
		if strings.Contains(words, refusal) {
			a.m.untrusted.Store(true)
			a.m.log.Warn("the SSH user is not trusted on the machine: derivations are sent whole",
				"hint", "add the user to trusted-users in the machine's nix.conf")
			return errDistrusted
		}
	}
	return err
}
