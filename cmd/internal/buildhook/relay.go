package buildhook

import (
	"cmp"
	"errors"
	"fmt"
	"runtime/debug"
	"strings"

	"nixdispatch/proto/hookcall"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/hook"
)

// The exit statuses that Nix up to 2.28 tells apart; later ones take every
// status but 0 for a failure.
const (
	hookFailed          = 1
	hookPermanentFailed = 100
	hookTimedOut        = 101
)

// build carries an accepted build through and returns the exit status. Standard
// input ends after the wanted outputs; that is not the end of the build.
func (h *hookProcess) build(try *hook.Try, d decision) (status int) {
	defer h.drain()
	acts := newActivities(h.log, string(try.DrvPath), d.machine)
	defer acts.stopAll()
	defer func() {
		if p := recover(); p != nil {
			h.fail(acts, fmt.Sprintf("a bug in nix-dispatch, please report it: %v\n%s", p, debug.Stack()))
			status = hookFailed
		}
	}()
	h.log.Accept(d.machine)
	h.logRead.Close() // nil is fine
	start, err := h.in.Start()
	if err != nil {
		h.fail(acts, err.Error())
		return hookFailed
	}
	msg := &hookcall.Start{WantedOutputs: start.WantedOutputs, Inputs: make([]string, len(start.Inputs))}
	for i, path := range start.Inputs {
		msg.Inputs[i] = string(path)
	}
	for taken := 1; ; taken++ {
		status, err := h.relay(acts, msg, d.locks)
		if err != nil && taken < maxTaken && codeOf(err) == hookcall.Unavailable {
			if err = h.offerAgain(try, acts, err); err == nil {
				continue
			}
		}
		if err != nil {
			h.fail(acts, err.Error())
			return hookFailed
		}
		return status
	}
}

// relay tells the daemon what to build with and passes on what it says until the
// build is finished, and returns the exit status. It reads from the daemon only
// as fast as Nix reads from it: nothing is kept here. The error has the code
// Unavailable if the daemon went away.
func (h *hookProcess) relay(acts *activities, start *hookcall.Start, locks *outputLocks) (int, error) {
	if err := h.link.call.Start(start); err != nil {
		return 0, lostDaemon(err)
	}
	for {
		if !h.link.call.Ready() {
			h.log.Flush()
		}
		message, err := h.link.call.Next()
		if err != nil {
			return 0, lostDaemon(err)
		}
		switch m := message.(type) {
		case hookcall.HandOver:
			if err := locks.handOver(m.Paths); err != nil {
				return 0, err
			}
			if err := h.link.call.HandedOver(); err != nil {
				return 0, lostDaemon(err)
			}
		case hookcall.Log:
			h.log.Flush()
			if _, err := h.buildLog.Write(m.Data); err != nil {
				return hookFailed, nil // Nix is gone
			}
		case hookcall.Finished:
			return h.finish(acts, m), nil
		default:
			acts.event(m)
		}
	}
}

func lostDaemon(err error) error {
	if e, ok := errors.AsType[*hookcall.StatusError](err); ok && e.Code == hookcall.OK {
		return errors.New("nix-dispatchd ended the build without a result")
	}
	return fmt.Errorf("nix-dispatchd went away or gave the build up (%w); see its log", err)
}

func (h *hookProcess) finish(acts *activities, f hookcall.Finished) int {
	if f.Status.Succeeded() {
		acts.endCopy(true)
		return 0
	}
	if f.Machine != "" {
		acts.machine = f.Machine
	}
	h.failWith(acts, f.Status, f.Error)
	switch f.Status {
	case hookcall.PermanentFailure, hookcall.OutputRejected, hookcall.CachedFailure,
		hookcall.LogLimitExceeded, hookcall.NotDeterministic:
		return hookPermanentFailed
	case hookcall.TimedOut:
		return hookTimedOut
	}
	return hookFailed
}

// fail tells the user of the build's failure, in the words of the stock hook.
func (h *hookProcess) fail(acts *activities, message string) {
	h.failWith(acts, hookcall.StatusUnspecified, message)
}

func (h *hookProcess) failWith(acts *activities, status hookcall.BuildStatus, message string) {
	acts.stopAll()
	h.drain() // so that it comes after the log
	h.log.Msg(hook.Error, "error: "+FailureText(acts.drvPath, acts.machine, status, message))
}

// FailureText is how a failed build is told. The machine may be ""; without a
// message the status is told.
func FailureText(drvPath, machine string, status hookcall.BuildStatus, message string) string {
	text := fmt.Sprintf("build of '%s'", nix.PlainText(drvPath))
	if machine != "" {
		text += fmt.Sprintf(" on '%s'", nix.PlainText(machine))
	}
	return text + " failed: " + strings.TrimSpace(nix.PlainText(cmp.Or(message, status.String())))
}
