package buildhook

import (
	"errors"
	"fmt"
	"os"
	"time"

	"nixdispatch/proto/hookcall"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/hook"
)

// helloOf picks the settings that the daemon may know.
func helloOf(s *hook.Settings) *hookcall.Hello {
	return &hookcall.Hello{
		Builders:               s.Builders,
		BuildersUseSubstitutes: s.BuildersUseSubstitutes,
		Store:                  s.Store,
		LocalSystems:           s.Systems,
		LocalFeatures:          s.SystemFeatures,
		MaxJobs:                s.MaxJobs,
		Timeout:                s.Timeout,
		MaxSilentTime:          s.MaxSilentTime,
		MaxLogSize:             s.MaxBuildLogSize,
		KeepFailed:             s.KeepFailed,
		Environment:            nix.StoreEnvironment(os.Getenv),
		Client:                 clientOf(os.Getppid()),
	}
}

// A daemonLink is the hook's call to the daemon, made again after it broke.
type daemonLink struct {
	socket string
	hello  *hookcall.Hello
	call   *hookcall.Call // nil while there is none
}

// reset ends the call; a build that the daemon accepted is given up with it.
func (l *daemonLink) reset() {
	if l.call != nil {
		l.call.Close()
	}
	l.call = nil
}

// ask puts one question and waits for the answer, at most timeout for
// everything. A call that broke since the last question is made anew: the
// daemon may have been restarted meanwhile. After an error the link must be
// reset.
func (l *daemonLink) ask(try *hookcall.Try, timeout time.Duration) (*hookcall.Reply, error) {
	deadline := time.Now().Add(timeout)
	stale := l.call != nil
	reply, err := l.askOnce(try, deadline)
	if stale && codeOf(err) == hookcall.Unavailable {
		l.reset()
		return l.askOnce(try, deadline)
	}
	return reply, err
}

func (l *daemonLink) askOnce(try *hookcall.Try, deadline time.Time) (*hookcall.Reply, error) {
	if l.call == nil {
		call, err := hookcall.Dial(l.socket, deadline)
		if err != nil {
			return nil, err
		}
		l.call = call
		if err := call.Hello(l.hello, deadline); err != nil {
			return nil, err
		}
	}
	return l.call.Try(try, deadline)
}

// tryOf is Nix's question for the daemon.
func tryOf(try *hook.Try) *hookcall.Try {
	return &hookcall.Try{
		AmWilling:        try.AmWilling,
		System:           try.System,
		DrvPath:          string(try.DrvPath),
		RequiredFeatures: try.RequiredFeatures,
	}
}

// codeOf is the code of a call that the daemon ended, OK if that is not what
// happened.
func codeOf(err error) hookcall.Code {
	if e, ok := errors.AsType[*hookcall.StatusError](err); ok {
		return e.Code
	}
	return hookcall.OK
}

// consult turns the daemon's answer, or the lack of one, into a decision.
func (h *hookProcess) consult(try *hook.Try) decision {
	timeout := h.opts.answerTimeout
	if h.outage.notAsked(h.settings.CouldBuildLocally(try), h.opts.askAgain) {
		return h.withoutDaemon(try)
	}
	if !h.outage.began.IsZero() {
		timeout = min(timeout, h.opts.askAgainTimeout)
	}
	reply, err := h.link.ask(tryOf(try), timeout)
	if err != nil {
		h.link.reset()
		return h.failedToAsk(try, err)
	}
	h.outage, h.restartTold = outage{}, false
	h.memory.forget()
	if reply.Action <= hookcall.Unspecified || reply.Action > hookcall.Stock {
		h.link.reset()
		return decision{action: hookcall.Stock, warn: true, reason: "nix-dispatch: the daemon gave no answer that this hook knows"}
	}
	return decision{action: reply.Action, machine: reply.MachineName, reason: reply.Reason, warn: reply.Warn}
}

func (h *hookProcess) failedToAsk(try *hook.Try, err error) decision {
	reason := nix.PlainText(err.Error())
	_, unreachable := errors.AsType[*os.PathError](err)
	code := codeOf(err)
	switch {
	case code == hookcall.PermissionDenied || errors.Is(err, os.ErrPermission):
		return decision{
			action: hookcall.Stock, warn: true,
			reason: fmt.Sprintf("nix-dispatch: the daemon refuses this user: %s; using Nix's own build hook", reason),
		}
	case code == hookcall.Unavailable:
		warn := !h.restartTold
		h.restartTold = true
		return decision{
			action: hookcall.Postpone, warn: warn,
			reason: fmt.Sprintf("nix-dispatch: waiting for the daemon, which is restarting: %s", reason),
		}
	case unreachable || errors.Is(err, hookcall.ErrNoAnswer):
		h.missed(reason)
		return h.withoutDaemon(try)
	default:
		return decision{
			action: hookcall.Stock, warn: true,
			reason: fmt.Sprintf("nix-dispatch: the daemon failed: %s; using Nix's own build hook", reason),
		}
	}
}
