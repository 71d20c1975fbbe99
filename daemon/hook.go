package daemon

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net/netip"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/hook"
	"nixdispatch/scheduler"
)

// startWait bounds how long an accepted hook may take to say what to build with.
// Nix sends it at once.
const startWait = time.Minute

// A hookConversation is one Hook call: one hook process, from its settings to
// the end of the one build it may get.
type hookConversation struct {
	d        *Daemon
	stream   grpc.BidiStreamingServer[dispatchv1.HookRequest, dispatchv1.HookResponse]
	caller   caller
	settings *dispatchv1.Hello
	store    *localStore // that they mean; nil before the first question
	// lease is on the list that the settings mean; nil before the first question.
	lease *lease
	// requests are what the hook says; closed when it has gone.
	requests chan *dispatchv1.HookRequest
	// broken is why, if it did not end the call itself; set before requests is closed.
	broken error
	late   chan struct{} // closed when the first of them is overdue
}

// Hook serves a hook process. See the method's comment in dispatch.proto.
func (s *server) Hook(stream grpc.BidiStreamingServer[dispatchv1.HookRequest, dispatchv1.HookResponse]) error {
	c, _ := callerFrom(stream.Context())
	h := &hookConversation{d: s.d, stream: stream, caller: c, requests: make(chan *dispatchv1.HookRequest), late: make(chan struct{})}
	go h.receive() // ends with the stream, which ends when Hook returns
	defer func() {
		if h.lease != nil {
			h.lease.release()
		}
	}()
	// Nix may take its time for a question, but a hook says at once who it is.
	late := time.AfterFunc(h.d.helloWait, func() { close(h.late) })
	first, err := h.next()
	if late.Stop(); err != nil || first == nil {
		return err
	}
	if h.settings = first.GetHello(); h.settings == nil {
		return status.Error(codes.InvalidArgument, "the first message of a Hook call must be Hello")
	}
	callUseFrom(stream.Context()).serves(h.origin())
	for {
		msg, err := h.next()
		if err != nil || msg == nil {
			return err
		}
		try := msg.GetTry()
		if try == nil {
			return status.Error(codes.InvalidArgument, "expected Try")
		}
		reply, f := h.decide(try)
		h.d.log.Debug("hook asked", "drv_path", try.GetDrvPath(), "reply", reply.GetAction(), "reason", reply.GetReason())
		if f != nil {
			return h.follow(f, reply)
		}
		if err := h.sendReply(reply); err != nil {
			return err
		}
	}
}

// receive passes on what the hook says until the stream ends.
func (h *hookConversation) receive() {
	defer close(h.requests)
	for {
		msg, err := h.stream.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				h.broken = err
			}
			return
		}
		select {
		case h.requests <- msg:
		case <-h.stream.Context().Done():
			return
		}
	}
}

// next waits for the hook's next word; nil if it has gone.
func (h *hookConversation) next() (*dispatchv1.HookRequest, error) {
	select {
	case msg := <-h.requests:
		if msg == nil {
			return nil, h.broken
		}
		return msg, nil
	case <-h.late:
		return nil, status.Errorf(codes.InvalidArgument, "no Hello within %s", h.d.helloWait)
	case <-h.d.life.Done():
		return nil, toStatus(errShutdown)
	}
}

// origin is whose build the hook is for.
func (h *hookConversation) origin() origin { return originOf(h.caller, h.settings.GetClient()) }

func (h *hookConversation) sendReply(r *dispatchv1.Reply) error {
	return h.stream.Send(&dispatchv1.HookResponse{Message: &dispatchv1.HookResponse_Reply{Reply: r}})
}

// A hookFollower is a hook process's interest in a build, and its Nix's locks.
type hookFollower struct{ *follower }

// follow accepts and stays with the hook until its build has ended.
func (h *hookConversation) follow(f *hookFollower, accept *dispatchv1.Reply) error {
	defer f.leave(errCancelled)
	use := h.d.usage.Count(h.origin().user(), usage.Builds, 1)
	defer use.Release()
	defer h.d.dispatcher.noLocks(f)
	if err := h.sendReply(accept); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(h.stream.Context())
	var listening sync.WaitGroup
	listening.Go(func() { h.listen(ctx, f, cancel) })
	defer listening.Wait()
	defer cancel(nil)
	news := hookNews{machine: accept.GetMachineName()}
	send := func(e *dispatchv1.BuildEvent) error {
		if !news.worth(e) {
			return nil
		}
		return h.stream.Send(&dispatchv1.HookResponse{Message: &dispatchv1.HookResponse_Event{Event: e}})
	}
	handOver := func(paths []string) error {
		return h.stream.Send(&dispatchv1.HookResponse{
			Message: &dispatchv1.HookResponse_HandOver{HandOver: &dispatchv1.HandOver{Paths: paths}}})
	}
	o, err := f.follow(ctx, send, handOver)
	if errors.Is(err, errShutdown) {
		return toStatus(err) // the hook asks the next daemon
	}
	if err != nil {
		return err
	}
	use.Release() // before the hook is told
	return send(finished(f.b, o))
}

// hookNews tells which events are news to a hook: it knows the machine from the
// reply, and the start of the build matters to it only as the end of the copying.
// For the rest it need not be woken; there is one for every build.
type hookNews struct {
	machine string // that it was last told
	copying bool
}

func (n *hookNews) worth(e *dispatchv1.BuildEvent) bool {
	switch m := e.GetEvent().(type) {
	case *dispatchv1.BuildEvent_Placed:
		known := n.machine == m.Placed.GetMachine()
		n.machine = m.Placed.GetMachine()
		return !known || n.copying
	case *dispatchv1.BuildEvent_Queued:
		n.machine = ""
	case *dispatchv1.BuildEvent_Copying:
		n.copying = true
	case *dispatchv1.BuildEvent_Building:
		copied := n.copying
		n.copying = false
		return copied
	}
	return true
}

// listen takes Start and HandedOver until ctx ends.
func (h *hookConversation) listen(ctx context.Context, f *hookFollower, cancel context.CancelCauseFunc) {
	late := time.AfterFunc(startWait, func() {
		cancel(status.Errorf(codes.InvalidArgument, "no Start within %s of acceptance", startWait))
	})
	defer late.Stop()
	for {
		var msg *dispatchv1.HookRequest
		select {
		case msg = <-h.requests:
		case <-ctx.Done():
			return
		}
		switch m := msg.GetMessage().(type) {
		case nil:
			cancel(cmp.Or(h.broken, status.Error(codes.InvalidArgument, "the hook has nothing more to say")))
			return
		case *dispatchv1.HookRequest_Start:
			late.Stop()
			paths, err := h.inputs(ctx, f.b.drv, m.Start)
			if err != nil {
				cancel(status.Error(codes.InvalidArgument, err.Error()))
				return
			}
			f.b.inputs.provide(paths)
		case *dispatchv1.HookRequest_HandedOver:
			h.d.dispatcher.noLocks(f)
		default:
			cancel(status.Error(codes.InvalidArgument, "expected Start or HandedOver"))
			return
		}
	}
}

// inputs are what the build may see. Those who own the store are believed: their
// Nix has worked them out. Others could have outputs built from something else
// than the derivation says.
func (h *hookConversation) inputs(ctx context.Context, drv *nix.Derivation, start *dispatchv1.Start) ([]nix.StorePath, error) {
	if h.caller.commands() {
		return storePaths(start.GetInputs())
	}
	return h.store.inputClosure(ctx, drv)
}

func finished(b *build, o outcome) *dispatchv1.BuildEvent {
	e := b.event()
	e.Event = &dispatchv1.BuildEvent_Finished{Finished: &dispatchv1.Finished{
		Status: o.status, Error: o.err, Machine: o.machine, BuildDuration: durationpb.New(o.duration),
	}}
	return e
}

// decide answers Try: the rows of the reply table that the hook does not decide
// by itself. An accepted try comes with a follower.
func (h *hookConversation) decide(try *dispatchv1.Try) (*dispatchv1.Reply, *hookFollower) {
	if h.d.refusing() {
		return reply(dispatchv1.Reply_ACTION_POSTPONE, "nix-dispatchd is shutting down"), nil
	}
	if strings.TrimSpace(h.settings.GetBuilders()) == "" {
		return reply(dispatchv1.Reply_ACTION_DECLINE_PERMANENTLY, "no machines are set"), nil
	}
	var err error
	if h.store, err = h.d.stores.find(h.settings.GetStore(), h.settings.GetEnvironment()); err != nil {
		return reply(dispatchv1.Reply_ACTION_STOCK, err.Error()), nil
	}
	if err := h.useList(); err != nil {
		return reply(dispatchv1.Reply_ACTION_STOCK, err.Error()), nil
	}
	if h.lease.key == noList {
		return reply(dispatchv1.Reply_ACTION_DECLINE_PERMANENTLY, "the builders setting has no machines"), nil
	}
	drvPath, err := nix.ParseStorePath(try.GetDrvPath())
	if err != nil {
		return reply(dispatchv1.Reply_ACTION_STOCK, err.Error()), nil
	}
	// Those who own the store are believed, for their Nix has looked.
	if !h.caller.commands() {
		if err := h.store.checkValid(h.stream.Context(), drvPath); err != nil {
			return reply(dispatchv1.Reply_ACTION_STOCK, err.Error()), nil
		}
	}
	drv, err := h.store.derivation(drvPath)
	if err != nil {
		return reply(dispatchv1.Reply_ACTION_STOCK, err.Error()), nil
	}
	if !drv.AllOutputsKnown() {
		return reply(dispatchv1.Reply_ACTION_STOCK, "its output paths are not known beforehand"), nil
	}
	return h.offer(try, drvPath, drv)
}

// useList leases the list that the builders setting means. The daemon's own may
// have been read anew since the last question.
func (h *hookConversation) useList() error {
	if h.lease != nil && h.lease.set != nil {
		return nil
	}
	var err error
	h.lease, err = h.d.lease(h.settings.GetBuilders(), h.caller)
	return err
}

// offer puts the derivation to the scheduler.
func (h *hookConversation) offer(try *dispatchv1.Try, drvPath nix.StorePath, drv *nix.Derivation) (*dispatchv1.Reply, *hookFollower) {
	b := h.d.newBuild(h.store, drvPath, drv, h.settings.GetBuildersUseSubstitutes(), h.caller)
	b.wantedFor(h.origin(), 0)
	b.local, b.lease = !try.GetTaken() && h.couldBuildLocally(drv), h.lease
	if b.local && h.d.leftLocal.has(b.drvKey()) {
		return reply(dispatchv1.Reply_ACTION_DECLINE, "nix-dispatch build left it to the local Nix"), nil
	}
	if uri := h.sentBy(); uri != "" {
		r := reply(dispatchv1.Reply_ACTION_DECLINE, "the build was sent here by "+uri+
			", which is also in this host's list of machines; it is built here and not sent on, for it could come back and wait for itself")
		r.Warn = !b.local
		return r, nil
	}
	f := &hookFollower{follower: &follower{limits: limitsFrom(h.settings.GetLimits())}}
	settled := h.d.awaitNamed(h.lease)
	decision := h.d.offerHook(b, f, try.GetAmWilling())
	if decision.Reply == scheduler.Decline && decision.Situation == scheduler.FullLocalFree && !settled {
		return reply(dispatchv1.Reply_ACTION_POSTPONE, "the machines that were named are being connected to"), nil
	}
	switch decision.Reply {
	case scheduler.Accept, scheduler.AcceptQueued:
		r := reply(dispatchv1.Reply_ACTION_ACCEPT, decision.Why)
		r.MachineName, r.BuildId = cmp.Or(decision.Machine.URI(), hook.NeutralMachine), uint64(f.b.id)
		return r, f
	case scheduler.Postpone:
		return reply(dispatchv1.Reply_ACTION_POSTPONE, decision.Why), nil
	default:
		if decision.Situation == scheduler.Impossible && h.lease.list.unsupportedCouldRun(drv) {
			return reply(dispatchv1.Reply_ACTION_STOCK, "only a machine of a kind that nix-dispatch does not serve could build it"), nil
		}
		if decision.Situation == scheduler.Impossible {
			h.d.metrics.leftUnplaceable(drv)
		}
		r := reply(dispatchv1.Reply_ACTION_DECLINE, h.d.dispatcher.explain(b.request()).Text(maxExplained))
		r.Warn = !b.local
		return r, nil
	}
}

// maxExplained bounds how many machines a message tells about.
const maxExplained = 20

// sentBy is the machine of the list that has sent the build here over SSH; "" if none
// has. Its Nix holds the locks of the outputs until this host has built them, so that a
// build which goes back there waits for itself. Hosts that are reached through others
// are not recognised.
func (h *hookConversation) sentBy() (uri string) {
	peer, err := netip.ParseAddr(h.settings.GetClient().GetSshPeer())
	if err != nil || !h.caller.commands() {
		return ""
	}
	for _, e := range h.d.machines.at(func(e *entry) bool { return e.list == h.lease.key }) {
		for _, c := range e.m.host.Connections() {
			if c.Peer() == peer {
				return e.line.StoreURI
			}
		}
	}
	return ""
}

// couldBuildLocally tells whether the asking Nix could build it by itself.
func (h *hookConversation) couldBuildLocally(drv *nix.Derivation) bool {
	local := hook.Settings{
		MaxJobs:        h.settings.GetMaxJobs(),
		Systems:        h.settings.GetLocalSystems(),
		SystemFeatures: h.settings.GetLocalFeatures(),
	}
	return local.CouldBuildLocally(&hook.Try{System: drv.Platform, RequiredFeatures: drv.RequiredSystemFeatures()})
}

func reply(action dispatchv1.Reply_Action, reason string) *dispatchv1.Reply {
	return &dispatchv1.Reply{Action: action, Reason: reason}
}

// storePaths parses what a caller or a machine sent.
func storePaths(names []string) ([]nix.StorePath, error) {
	paths := make([]nix.StorePath, len(names))
	for n, name := range names {
		p, err := nix.ParseStorePath(name)
		if err != nil {
			return nil, err
		}
		paths[n] = p
	}
	return paths, nil
}
