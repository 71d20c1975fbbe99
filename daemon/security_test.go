package daemon

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// These are lines of docs/security.md that need callers of other users than the
// test's. deploy/integration has real ones.

// member is a caller who is let in, and neither root nor the daemon's user.
var member = caller{uid: 4242, gid: 4242}

// A callerStream is the server's end of a stream whose other end is a caller.
type callerStream[T any] struct {
	grpc.ServerStream
	ctx  context.Context
	sent []*T
}

func (s *callerStream[T]) Context() context.Context { return s.ctx }

func (s *callerStream[T]) Send(m *T) error {
	s.sent = append(s.sent, m)
	return nil
}

// streamOf makes a stream of a caller's.
func streamOf[T any](t *testing.T, c caller) *callerStream[T] {
	return &callerStream[T]{ctx: peer.NewContext(t.Context(), &peer.Peer{AuthInfo: peerInfo{caller: c}})}
}

// hookStream is a callerStream for Hook.
type hookStream struct {
	callerStream[dispatchv1.HookResponse]
}

func (*hookStream) Recv() (*dispatchv1.HookRequest, error) { return nil, context.Canceled }

// conversation is a Hook call of a caller's that has said which settings it has.
func (s *site) conversation(c caller, settings *dispatchv1.Hello) *hookConversation {
	return &hookConversation{d: s.d, caller: c, settings: settings,
		stream: &hookStream{*streamOf[dispatchv1.HookResponse](s.t, c)}}
}

// A member of the group who talks as a hook does can have built what the store has
// derivations for, and nothing else.
func TestSecurityHookThatLies(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	s := newSite(t, m)
	dep := s.drv("dep", drvConfig{})
	dep.put(s.local.store, "out", dep.out())
	honest := s.drv("honest", drvConfig{inputs: []*recipe{dep}})
	forged := s.drv("forged", drvConfig{})
	s.local.store.Remove(forged.path) // its file is still in the store's directory

	ask := func(change func(*dispatchv1.Hello, *dispatchv1.Try)) (*dispatchv1.Reply, *hookConversation, *hookFollower) {
		settings, try := s.hello(), &dispatchv1.Try{DrvPath: string(honest.path)}
		change(settings, try)
		h := s.conversation(member, settings)
		r, f := h.decide(try)
		return r, h, f
	}
	for _, tt := range []struct {
		name   string
		change func(*dispatchv1.Hello, *dispatchv1.Try)
		want   dispatchv1.Reply_Action
		reason string
	}{
		{"a derivation that the store does not vouch for", func(_ *dispatchv1.Hello, try *dispatchv1.Try) { try.DrvPath = string(forged.path) }, stock, "is not in the local store"},
		{"a path that climbs", func(_ *dispatchv1.Hello, try *dispatchv1.Try) { try.DrvPath = s.dir + "/../" + honest.path.Base() }, stock, ""},
		{"a file that is none of the store's", func(_ *dispatchv1.Hello, try *dispatchv1.Try) { try.DrvPath = "/etc/passwd" }, stock, ""},
		{"a name with a line break", func(_ *dispatchv1.Hello, try *dispatchv1.Try) { try.DrvPath += "\nx.drv" }, stock, ""},
		{"another store", func(h *dispatchv1.Hello, _ *dispatchv1.Try) { h.Store = "/home/mallory/nix" }, stock, "is not a store that this daemon serves"},
		{"another store by its environment", func(h *dispatchv1.Hello, _ *dispatchv1.Try) {
			h.Environment = []string{"NIX_STORE_DIR=/home/mallory/store"}
		}, stock, "is not a store that this daemon serves"},
		{"a variable that is none of the store's", func(h *dispatchv1.Hello, _ *dispatchv1.Try) {
			h.Environment = append(h.Environment, "LD_PRELOAD=/tmp/x.so")
		}, accept, ""},
		{"machines", func(h *dispatchv1.Hello, _ *dispatchv1.Try) { h.Builders = "ssh://mallory" }, stock, "may not name machines"},
		{"a file of machines", func(h *dispatchv1.Hello, _ *dispatchv1.Try) { h.Builders = "@/etc/shadow" }, stock, "may not name machines"},
		{"a build that was taken before", func(_ *dispatchv1.Hello, try *dispatchv1.Try) { try.Taken = true }, accept, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, h, f := ask(tt.change)
			if r.GetAction() != tt.want || !strings.Contains(r.GetReason(), tt.reason) {
				t.Errorf("reply %v, want %v because %q", r, tt.want, tt.reason)
			}
			if f != nil {
				f.leave(errCancelled)
			}
			if h.lease != nil {
				h.lease.release()
			}
		})
	}

	// Whatever inputs the caller claims, the build has its own.
	_, h, f := ask(func(*dispatchv1.Hello, *dispatchv1.Try) {})
	defer f.leave(errCancelled)
	defer h.lease.release()
	inputs, err := h.inputs(t.Context(), f.b.drv, &dispatchv1.Start{Inputs: []string{string(forged.path)}})
	if want := []nix.StorePath{dep.outputs["out"]}; err != nil || !slices.Equal(inputs, want) {
		t.Errorf("inputs %v (%v), want %v", inputs, err, want)
	}
}

// A build's log is its caller's, root's and the daemon's user's; what root asked
// for, which is what goes through nix-daemon, may be read by all who are let in.
func TestSecurityLogs(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh-ng"))
	bad := s.drv("bad", drvConfig{})
	bad.log = []string{"the secret"}
	bad.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "builder failed;\nlast 1 log lines:\n> the secret"}
	alice, bob := caller{uid: 1001}, caller{uid: 1002}
	build := func(by caller) uint64 {
		stream := streamOf[dispatchv1.BuildResponse](t, by)
		if err := (&server{d: s.d}).Build(&dispatchv1.BuildRequest{Derivations: []string{string(bad.path)}}, stream); err != nil {
			t.Fatal(err)
		}
		for _, m := range stream.sent {
			if id := m.GetEvent().GetBuildId(); id != 0 {
				return id
			}
		}
		t.Fatal("no event of the build")
		return 0
	}
	alices, roots := build(alice), build(caller{uid: 0})
	s.ended(2, &dispatchv1.HistoryRequest{})
	me := caller{uid: uint32(os.Geteuid())}
	for _, tt := range []struct {
		who   string
		id    uint64
		by    caller
		reads bool
	}{
		{"alice, hers", alices, alice, true}, {"bob, alice's", alices, bob, false}, {"root, alice's", alices, caller{uid: 0}, true},
		{"the daemon's user, alice's", alices, me, true}, {"bob, root's", roots, bob, true},
	} {
		var err error
		var log string
		s.eventually("the log is kept", func() bool {
			stream := streamOf[dispatchv1.LogResponse](t, tt.by)
			err = (&server{d: s.d}).Log(&dispatchv1.LogRequest{BuildId: tt.id}, stream)
			log = ""
			for _, m := range stream.sent {
				log += string(m.GetData())
			}
			return status.Code(err) != codes.NotFound
		})
		if reads := err == nil && log == "the secret\n"; reads != tt.reads || !tt.reads && (status.Code(err) != codes.PermissionDenied || log != "") {
			t.Errorf("%s: log %q, %v; want it to be read: %v", tt.who, log, err, tt.reads)
		}
		stream := streamOf[dispatchv1.FinishedBuild](t, tt.by)
		if err := (&server{d: s.d}).History(&dispatchv1.HistoryRequest{}, stream); err != nil || len(stream.sent) != 2 {
			t.Fatalf("%s: history %v, %v", tt.who, stream.sent, err)
		}
		for _, row := range stream.sent {
			if row.GetId() == tt.id && strings.Contains(row.GetError(), "secret") != tt.reads {
				t.Errorf("%s: the history says %q", tt.who, row.GetError())
			}
		}
	}
}

// What is longer than a message may be costs the call, not the daemon.
func TestSecurityHugeMessages(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	huge := strings.Repeat("x", maxMessage)
	hook := s.hook(func(h *dispatchv1.Hello) { h.Builders = huge })
	if _, err := hook.stream.Recv(); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("Hook: %v, want RESOURCE_EXHAUSTED", err)
	}
	_, err := s.client.Explain(t.Context(), &dispatchv1.ExplainRequest{System: huge})
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("Explain: %v, want RESOURCE_EXHAUSTED", err)
	}
	// Short enough to be read, and of no use.
	long := huge[:1<<20]
	for name, call := range map[string]func() error{
		"Drain": func() error {
			_, err := s.client.Drain(t.Context(), &dispatchv1.DrainRequest{Machine: long})
			return err
		},
		"Log": func() error { _, err := s.log(&dispatchv1.LogRequest{DrvPath: long}); return err },
		"Explain": func() error {
			_, err := s.client.Explain(t.Context(), &dispatchv1.ExplainRequest{DrvPath: long})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.NotFound && status.Code(err) != codes.InvalidArgument || len(status.Convert(err).Message()) > 2*maxErrorText {
			t.Errorf("%s: %v with %d bytes of message, want it refused in a few words", name, status.Code(err), len(status.Convert(err).Message()))
		}
	}
	s.mustBuild(s.drv("after", drvConfig{}))
}

// Names that are no names are refused before anything is looked for by them.
func TestSecurityNames(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	good := s.drv("good", drvConfig{})
	for _, name := range []string{
		"/etc/passwd", "../../../etc/passwd", s.dir + "/../etc/passwd.drv", s.dir + "/" + good.path.Base() + "/../../x.drv",
		s.dir + "//" + good.path.Base(), string(good.path) + "\x00.drv", string(good.path) + "\n.drv", s.dir + "/.drv", s.dir + "/..", "", "-rf",
	} {
		got := s.realise(&dispatchv1.BuildRequest{Derivations: []string{name}})
		_, explain := s.client.Explain(t.Context(), &dispatchv1.ExplainRequest{DrvPath: name, System: map[bool]string{true: "", false: "x"}[name == ""]})
		_, log := s.log(&dispatchv1.LogRequest{DrvPath: name})
		_, drain := s.client.Drain(t.Context(), &dispatchv1.DrainRequest{Machine: name})
		for what, err := range map[string]error{"build": got.err, "explain": explain, "log": log, "drain": drain} {
			code := status.Code(err)
			if code != codes.InvalidArgument && (code != codes.NotFound || what != "drain") {
				t.Errorf("%s %q: %v, want it refused", what, name, err)
			}
			if strings.ContainsAny(status.Convert(err).Message(), "\x00\n") {
				t.Errorf("%s %q: the message %q has it unquoted", what, name, status.Convert(err).Message())
			}
		}
	}
	if drained := s.d.machines.drains(); len(drained) != 0 {
		t.Errorf("drained: %v", drained)
	}
}
