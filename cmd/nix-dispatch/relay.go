package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
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

const (
	// drainTimeout bounds how long the hook waits for Nix to read the last of
	// the log. It looks after firstDrainPoll and then at growing intervals up to
	// lastDrainPoll: Nix mostly reads at once, but a hundred hooks of a busy Nix
	// must not keep it from doing so.
	drainTimeout   = 10 * time.Second
	firstDrainPoll = 200 * time.Microsecond
	lastDrainPoll  = 20 * time.Millisecond
)

// build carries an accepted build through and returns the exit status. Standard
// input ends after the wanted outputs; that is not the end of the build.
func (h *hookProcess) build(ctx context.Context, try *hook.Try, d decision) (status int) {
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
	msg := &dispatchv1.Start{WantedOutputs: start.WantedOutputs, Inputs: make([]string, len(start.Inputs))}
	for i, path := range start.Inputs {
		msg.Inputs[i] = string(path)
	}
	// Send's own error is io.EOF; Recv tells why.
	h.link.stream.Send(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Start{Start: msg}}) //nolint:errcheck // see above
	return h.relay(acts, d.locks)
}

// relay passes on what the daemon says until the build is finished. It reads
// from the daemon only as fast as Nix reads from it: nothing is kept here.
func (h *hookProcess) relay(acts *activities, locks *outputLocks) int {
	for {
		response, err := h.link.stream.Recv()
		if err != nil {
			h.fail(acts, lostDaemon(err))
			return hookFailed
		}
		switch m := response.Message.(type) {
		case *dispatchv1.HookResponse_HandOver:
			if err := locks.handOver(m.HandOver.GetPaths()); err != nil {
				h.fail(acts, err.Error())
				return hookFailed
			}
			h.link.stream.Send(&dispatchv1.HookRequest{ //nolint:errcheck // Recv tells why
				Message: &dispatchv1.HookRequest_HandedOver{HandedOver: &dispatchv1.HandedOver{}},
			})
		case *dispatchv1.HookResponse_Event:
			switch ev := m.Event.GetEvent().(type) {
			case *dispatchv1.BuildEvent_Log:
				if _, err := h.buildLog.Write(ev.Log.GetData()); err != nil {
					return hookFailed // Nix is gone
				}
			case *dispatchv1.BuildEvent_Finished:
				return h.finish(acts, ev.Finished)
			default:
				acts.event(m.Event)
			}
		}
	}
}

func lostDaemon(err error) string {
	if err == io.EOF {
		return "nix-dispatchd ended the build without a result"
	}
	return fmt.Sprintf("nix-dispatchd went away or gave the build up (%s); see its log", status.Convert(err).Message())
}

func (h *hookProcess) finish(acts *activities, f *dispatchv1.Finished) int {
	if f.GetStatus().Succeeded() {
		acts.endCopy(true)
		return 0
	}
	if f.GetMachine() != "" {
		acts.machine = f.GetMachine()
	}
	message := f.GetError()
	if message == "" {
		message = statusName(f.GetStatus())
	}
	h.fail(acts, message)
	switch f.GetStatus() {
	case dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE,
		dispatchv1.BuildStatus_BUILD_STATUS_OUTPUT_REJECTED,
		dispatchv1.BuildStatus_BUILD_STATUS_CACHED_FAILURE,
		dispatchv1.BuildStatus_BUILD_STATUS_LOG_LIMIT_EXCEEDED,
		dispatchv1.BuildStatus_BUILD_STATUS_NOT_DETERMINISTIC:
		return hookPermanentFailed
	case dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT:
		return hookTimedOut
	}
	return hookFailed
}

// fail tells the user of the build's failure, in the words of the stock hook.
func (h *hookProcess) fail(acts *activities, message string) {
	acts.stopAll()
	h.drain() // so that it comes after the log
	h.log.Msg(hook.Error, "error: "+failureText(acts.drvPath, acts.machine, message))
}

// failureText is how a failed build is told; machine may be "".
func failureText(drvPath, machine, message string) string {
	text := fmt.Sprintf("build of '%s'", nix.PlainText(drvPath))
	if machine != "" {
		text += fmt.Sprintf(" on '%s'", nix.PlainText(machine))
	}
	return text + " failed: " + strings.TrimSpace(nix.PlainText(message))
}

// statusName is a status in words, such as "permanent failure".
func statusName(s dispatchv1.BuildStatus) string {
	name := strings.TrimPrefix(s.String(), "BUILD_STATUS_")
	return strings.ReplaceAll(strings.ToLower(name), "_", " ")
}

// drain waits until Nix has read everything: it takes the first end of file on
// either pipe for the end of the build and drops what the other still holds.
func (h *hookProcess) drain() {
	poll := firstDrainPoll
	for end := time.Now().Add(drainTimeout); time.Now().Before(end); time.Sleep(poll) {
		if unread(logWriteFD) == 0 && unread(int(os.Stderr.Fd())) == 0 {
			return
		}
		poll = min(2*poll, lastDrainPoll)
	}
}

// unread is how many bytes wait in the pipe whose write end is fd; 0 if it is no
// pipe or nobody reads it.
func unread(fd int) int {
	poll := []unix.PollFd{{Fd: int32(fd)}}
	if _, err := unix.Poll(poll, 0); err == nil && poll[0].Revents&unix.POLLERR != 0 {
		return 0
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return n
}
