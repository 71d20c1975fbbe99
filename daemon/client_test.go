package daemon

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/hook"
)

// A hookClient is a hook process. Its methods are for one goroutine.
type hookClient struct {
	t      *testing.T
	site   *site
	stream grpc.BidiStreamingClient[dispatchv1.HookRequest, dispatchv1.HookResponse]
	// leave ends the process.
	leave context.CancelFunc
	// keepLocks leaves HandOver without an answer.
	keepLocks bool
	machine   string // that the reply named
	// onHandOver is called when the daemon asks for the locks.
	onHandOver func(paths []string)
	// onEvent is called with each event.
	onEvent func(*dispatchv1.BuildEvent)

	handOvers [][]string
}

// hello is what the hook of a Nix says that cannot build anything itself.
func (s *site) hello() *dispatchv1.Hello {
	return &dispatchv1.Hello{Builders: s.d.opts.Builders, Environment: []string{"NIX_STORE_DIR=" + s.dir, "NIX_DAEMON_SOCKET_PATH=" + s.local.socket}}
}

// hook starts a hook process; change may alter what it says first.
func (s *site) hook(change ...func(*dispatchv1.Hello)) *hookClient {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	s.t.Cleanup(cancel)
	stream, err := s.client.Hook(ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	h := &hookClient{t: s.t, site: s, stream: stream, leave: cancel}
	hello := s.hello()
	for _, c := range change {
		c(hello)
	}
	h.say(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Hello{Hello: hello}})
	return h
}

func (h *hookClient) say(r *dispatchv1.HookRequest) {
	h.t.Helper()
	if err := h.stream.Send(r); err != nil && !errors.Is(err, io.EOF) { // Recv tells why
		h.t.Errorf("hook sends: %v", err)
	}
}

// ask sends a Try without waiting for the reply.
func (h *hookClient) ask(drvPath string, amWilling bool) {
	h.t.Helper()
	h.say(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Try{
		Try: &dispatchv1.Try{DrvPath: drvPath, System: nixSystem(), AmWilling: amWilling}}})
}

func (h *hookClient) try(r *recipe, amWilling bool) *dispatchv1.Reply {
	h.t.Helper()
	h.ask(string(r.path), amWilling)
	return h.reply()
}

func (h *hookClient) reply() *dispatchv1.Reply {
	h.t.Helper()
	msg, err := h.stream.Recv()
	if err != nil {
		h.t.Fatalf("hook waits for a reply: %v", err)
	}
	if msg.GetReply() == nil {
		h.t.Fatalf("hook got %v, want a reply", msg)
	}
	return msg.GetReply()
}

// start says which inputs the build has.
func (h *hookClient) start(r *recipe) {
	h.t.Helper()
	h.say(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_Start{
		Start: &dispatchv1.Start{Inputs: pathNames(r.inputClosure())}}})
}

// accepted offers the build, which must be taken, and starts it.
func (h *hookClient) accepted(r *recipe) *dispatchv1.Reply {
	h.t.Helper()
	reply := h.try(r, false)
	if reply.GetAction() != dispatchv1.Reply_ACTION_ACCEPT {
		h.t.Fatalf("reply = %v, want it accepted", reply)
	}
	h.machine = reply.GetMachineName()
	h.start(r)
	return reply
}

// A story is what a caller was told of a build.
type story struct {
	machine  string // that the reply named, a neutral name left out
	events   []*dispatchv1.BuildEvent
	log      string
	finished *dispatchv1.Finished
	err      error // of the stream, where it did not end with Finished
}

// tell adds an event.
func (s *story) tell(e *dispatchv1.BuildEvent) {
	switch {
	case e.GetLog() != nil:
		s.log += string(e.GetLog().GetData())
	case e.GetFinished() != nil:
		s.finished = e.GetFinished()
	default:
		s.events = append(s.events, e)
	}
}

// phases are the kinds of events, repetitions left out.
func (s *story) phases() string {
	var names []string
	for _, e := range s.events {
		name := ""
		switch e.GetEvent().(type) {
		case *dispatchv1.BuildEvent_Queued:
			name = "queued"
		case *dispatchv1.BuildEvent_Placed:
			name = "placed"
		case *dispatchv1.BuildEvent_Copying:
			name = "copying"
		case *dispatchv1.BuildEvent_Building:
			name = "building"
		case *dispatchv1.BuildEvent_Fetching:
			name = "fetching"
		}
		if len(names) == 0 || names[len(names)-1] != name {
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
}

// placed are the machines the build was placed on, in order.
func (s *story) placed() []string {
	var uris []string
	if s.machine != "" {
		uris = append(uris, s.machine)
	}
	for _, e := range s.events {
		if p := e.GetPlaced(); p != nil {
			uris = append(uris, p.GetMachine())
		}
	}
	return uris
}

func (s *story) status() dispatchv1.BuildStatus { return s.finished.GetStatus() }

// finish reads until the build has ended and gives up the locks when asked.
func (h *hookClient) finish() *story {
	h.t.Helper()
	s := new(story)
	if h.machine != hook.NeutralMachine {
		s.machine = h.machine
	}
	for s.finished == nil {
		msg, err := h.stream.Recv()
		if err != nil {
			s.err = err
			return s
		}
		switch {
		case msg.GetEvent() != nil:
			s.tell(msg.GetEvent())
			if h.onEvent != nil {
				h.onEvent(msg.GetEvent())
			}
		case msg.GetHandOver() != nil:
			paths := msg.GetHandOver().GetPaths()
			h.handOvers = append(h.handOvers, paths)
			if h.onHandOver != nil {
				h.onHandOver(paths)
			}
			if !h.keepLocks {
				h.say(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_HandedOver{HandedOver: &dispatchv1.HandedOver{}}})
			}
		default:
			h.t.Errorf("hook got %v after acceptance", msg)
		}
	}
	return s
}

// build has a fresh hook process build a derivation.
func (s *site) build(r *recipe) *story {
	s.t.Helper()
	h := s.hook()
	h.accepted(r)
	return h.finish()
}

// mustBuild fails the test unless the build succeeds and its outputs are valid.
func (s *site) mustBuild(r *recipe) *story {
	s.t.Helper()
	st := s.build(r)
	st.mustBe(s.t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	for _, p := range r.outPaths() {
		if !s.local.valid(p) {
			s.t.Fatalf("output %s is not valid after the build", p)
		}
	}
	return st
}

func (s *story) mustBe(t *testing.T, want dispatchv1.BuildStatus) {
	t.Helper()
	if s.err != nil {
		t.Fatalf("stream ended with %v, want Finished with %v", s.err, want)
	}
	if s.status() != want {
		t.Fatalf("build ended with %v (%s), want %v", s.status(), s.finished.GetError(), want)
	}
}

// A realising is a Build call.
type realising struct {
	plan    *dispatchv1.Plan
	stories map[nix.StorePath]*story
	order   []nix.StorePath // in which builds finished
	summary *dispatchv1.Summary
	// detached is what the build is known by that goes on.
	detached uint64
	err      error
}

// realise calls Build and reads all it says.
func (s *site) realise(req *dispatchv1.BuildRequest) *realising {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := s.client.Build(ctx, req)
	if err != nil {
		s.t.Fatal(err)
	}
	return readBuild(stream)
}

func readBuild(stream interface {
	Recv() (*dispatchv1.BuildResponse, error)
}) *realising {
	r := &realising{stories: make(map[nix.StorePath]*story)}
	for {
		msg, err := stream.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				r.err = err
			}
			return r
		}
		switch {
		case msg.GetPlan() != nil:
			r.plan = msg.GetPlan()
		case msg.GetSummary() != nil:
			r.summary = msg.GetSummary()
		case msg.GetDetached() != nil:
			r.detached = msg.GetDetached().GetBuildId()
		default:
			e := msg.GetEvent()
			p := nix.StorePath(e.GetDrvPath())
			if r.stories[p] == nil {
				r.stories[p] = new(story)
			}
			r.stories[p].tell(e)
			if e.GetFinished() != nil {
				r.order = append(r.order, p)
			}
		}
	}
}

// closed tells whether ch is closed within the test's patience.
func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	case <-time.After(patience):
		return false
	}
}

// dialTest makes a client of another socket than the site's.
func dialTest(t *testing.T, socket string) dispatchv1.DispatchServiceClient {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return dispatchv1.NewDispatchServiceClient(conn)
}
