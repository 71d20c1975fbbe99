package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/hook"
)

const (
	// askAgain and askAgainTimeout bound what a daemon that did not answer once
	// costs a Nix that asks for many builds.
	askAgain        = 3 * time.Second
	askAgainTimeout = 250 * time.Millisecond
)

// helloOf picks the settings that the daemon may know.
func helloOf(s *hook.Settings) *dispatchv1.Hello {
	limits := &dispatchv1.Limits{MaxLogSize: s.MaxBuildLogSize}
	if s.Timeout > 0 {
		limits.Timeout = durationpb.New(s.Timeout)
	}
	if s.MaxSilentTime > 0 {
		limits.MaxSilentTime = durationpb.New(s.MaxSilentTime)
	}
	return &dispatchv1.Hello{
		Builders:               s.Builders,
		BuildersUseSubstitutes: s.BuildersUseSubstitutes,
		Store:                  s.Store,
		LocalSystems:           s.Systems,
		LocalFeatures:          s.SystemFeatures,
		MaxJobs:                s.MaxJobs,
		Limits:                 limits,
		KeepFailed:             s.KeepFailed,
	}
}

// A daemonLink is the hook's call to the daemon, made again after it broke.
type daemonLink struct {
	hello  *dispatchv1.Hello
	conn   *daemonConn
	stream grpc.BidiStreamingClient[dispatchv1.HookRequest, dispatchv1.HookResponse]
	cancel context.CancelFunc
}

// connect begins to connect and does not wait.
func (l *daemonLink) connect(socket string) {
	conn, err := dial(socket)
	if err != nil { // only of options that do not fit together
		panic("nix-dispatch: " + err.Error())
	}
	conn.cc.Connect()
	l.conn = conn
}

// reset ends the call and the connection; a build that the daemon accepted is
// given up with it.
func (l *daemonLink) reset() {
	if l.cancel != nil {
		l.cancel()
	}
	if l.conn != nil {
		l.conn.Close()
	}
	l.conn, l.stream, l.cancel = nil, nil, nil
}

var errNoAnswer = errors.New("it does not answer")

// ask puts one question and waits for the answer, at most timeout for
// everything. A call that broke since the last question is made anew: the
// daemon may have been restarted meanwhile. After an error the link must be
// reset.
func (l *daemonLink) ask(ctx context.Context, socket string, try *hook.Try, timeout time.Duration) (*dispatchv1.Reply, error) {
	end := time.Now().Add(timeout)
	stale := l.stream != nil
	reply, err := l.askOnce(ctx, socket, try, timeout)
	if stale && status.Code(err) == codes.Unavailable {
		l.reset()
		return l.askOnce(ctx, socket, try, time.Until(end))
	}
	return reply, err
}

func (l *daemonLink) askOnce(ctx context.Context, socket string, try *hook.Try, timeout time.Duration) (*dispatchv1.Reply, error) {
	if l.conn == nil {
		l.connect(socket)
	}
	first := l.stream == nil
	if first {
		ctx, l.cancel = context.WithCancel(ctx)
	}
	timer := time.AfterFunc(timeout, l.cancel)
	reply, err := l.exchange(ctx, first, try)
	if !timer.Stop() { // the call is cancelled, even if an answer came with it
		return nil, errNoAnswer
	}
	return reply, err
}

func (l *daemonLink) exchange(ctx context.Context, first bool, try *hook.Try) (*dispatchv1.Reply, error) {
	if first {
		stream, err := l.conn.Hook(ctx)
		if err != nil {
			return nil, err
		}
		l.stream = stream
		// Send's own error is io.EOF; Recv tells why.
		stream.Send(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Hello{Hello: l.hello}}) //nolint:errcheck // see above
	}
	l.stream.Send(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Try{Try: &dispatchv1.Try{ //nolint:errcheck // see above
		AmWilling:        try.AmWilling,
		System:           try.System,
		DrvPath:          string(try.DrvPath),
		RequiredFeatures: try.RequiredFeatures,
	}}})
	response, err := l.stream.Recv()
	if err != nil {
		return nil, err
	}
	reply := response.GetReply()
	if reply == nil {
		return nil, status.Errorf(codes.Internal, "it answered with something else than a reply")
	}
	return reply, nil
}

// consult turns the daemon's answer, or the lack of one, into a decision.
func (h *hookProcess) consult(ctx context.Context, try *hook.Try) decision {
	timeout := h.opts.answerTimeout
	if h.outage.notAsked(h.settings.CouldBuildLocally(try)) {
		return h.withoutDaemon(try)
	}
	if !h.outage.began.IsZero() {
		timeout = min(timeout, askAgainTimeout)
	}
	reply, err := h.link.ask(ctx, h.opts.socket, try, timeout)
	if err != nil {
		return h.failedToAsk(try, err)
	}
	h.outage, h.restartTold = outage{}, false
	h.memory.forget()
	d := decision{action: reply.Action, machine: reply.MachineName, reason: reply.Reason, warn: reply.Warn}
	if reply.Action == dispatchv1.Reply_ACTION_UNSPECIFIED {
		h.link.reset()
		d = decision{action: dispatchv1.Reply_ACTION_STOCK, warn: true, reason: "nix-dispatch: the daemon gave no answer that this hook knows"}
	}
	return d
}

func (h *hookProcess) failedToAsk(try *hook.Try, err error) decision {
	conn := h.link.conn
	dialErr := conn.dialErr.Load()
	connected := conn.connected.Load()
	reason := nix.PlainText(conn.whyNot(err))
	h.link.reset()
	code := status.Code(err)
	switch {
	case code == codes.PermissionDenied || dialErr != nil && errors.Is(*dialErr, os.ErrPermission):
		return decision{
			action: dispatchv1.Reply_ACTION_STOCK, warn: true,
			reason: fmt.Sprintf("nix-dispatch: the daemon refuses this user: %s; using Nix's own build hook", reason),
		}
	case errors.Is(err, errNoAnswer):
		reason = err.Error()
	case code == codes.Unavailable && connected:
		warn := !h.restartTold
		h.restartTold = true
		return decision{
			action: dispatchv1.Reply_ACTION_POSTPONE, warn: warn,
			reason: fmt.Sprintf("nix-dispatch: waiting for the daemon, which is restarting: %s", reason),
		}
	case code != codes.Unavailable:
		return decision{
			action: dispatchv1.Reply_ACTION_STOCK, warn: true,
			reason: fmt.Sprintf("nix-dispatch: the daemon failed: %s; using Nix's own build hook", reason),
		}
	}
	h.missed(reason)
	return h.withoutDaemon(try)
}
