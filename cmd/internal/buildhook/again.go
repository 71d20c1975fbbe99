package buildhook

import (
	"fmt"
	"time"

	"nixdispatch/proto/hookcall"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/hook"
)

// maxTaken bounds how many daemons a build may be taken by, one after the other:
// it may be what they die of.
const maxTaken = 20

const (
	// againPause is the time between two questions to a daemon that is not there, or
	// has no room yet.
	againPause = 250 * time.Millisecond
	// maxPut is for how long a daemon that is there may put the build off.
	maxPut = 10 * time.Minute
)

// offerAgain offers a build whose daemon went away, for the reason given, to the
// next one. Nix counts on it, and holds the inputs and outputs meanwhile, but for
// locks that were handed over already. A daemon must answer within the patience
// that Nix's questions have, too.
func (h *hookProcess) offerAgain(try *hook.Try, acts *activities, reason error) error {
	acts.stopAll()
	h.warn(fmt.Sprintf("%v; waiting for the daemon to come back, to build '%s' again", reason, try.DrvPath))
	h.log.Flush()
	again := tryOf(try)
	again.AmWilling, again.Taken = false, true
	began, heard := time.Now(), time.Now()
	for {
		h.link.reset()
		reply, err := h.link.ask(again, h.opts.answerTimeout)
		now := time.Now()
		switch {
		case err == nil && reply.Action == hookcall.Accept:
			acts.place(nix.PlainText(reply.MachineName), "the daemon was restarted")
			return nil
		case err == nil && reply.Action != hookcall.Postpone:
			return fmt.Errorf("the nix-dispatchd that was building it has ended, and the next one does not take it: %s", reply.Reason)
		case err == nil || codeOf(err) == hookcall.Unavailable:
			heard = now // somebody is there, who puts the build off or is about to end
		}
		switch {
		case now.Sub(heard) > h.opts.patience:
			return fmt.Errorf("%w, and it did not come back within %v: %w", reason, h.opts.patience, err)
		case now.Sub(began) > maxPut:
			return fmt.Errorf("%w, and the next one has had no room for %v", reason, maxPut)
		}
		time.Sleep(againPause)
	}
}
