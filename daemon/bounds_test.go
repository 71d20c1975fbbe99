package daemon

import (
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A guest is a user in the group, with the bounds of one: a daemon in a test knows only
// callers of its own user, who command it.
func (s *site) guest(bounds usage.Amounts) {
	s.d.usage = usage.New(bounds)
	s.d.connections.usage = s.d.usage
	s.d.bounded = true
}

// mustBeRefused checks that a call was refused because of a bound.
func mustBeRefused(t *testing.T, err error, words ...string) {
	t.Helper()
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v, want ResourceExhausted", err)
		return
	}
	for _, word := range append(words, "one user may have") {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not tell %q", err, word)
		}
	}
}

// TestSecurityManyCalls has a member keep hooks open that ask for nothing, and hold large
// requests.
func TestSecurityManyCalls(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{oneMachine("ssh")},
		prepare: func(s *site) {
			s.guest(usage.Amounts{usage.Calls: 6, usage.Streams: 4, usage.RequestBytes: 1 << 20})
		},
	})
	me := usage.User{UID: uint32(os.Geteuid())}
	hook := func(size int) (*hookClient, error) {
		h := s.hook(func(h *dispatchv1.Hello) { h.Environment = append(h.Environment, "X="+strings.Repeat("x", size)) })
		h.ask("nothing", false)
		_, err := h.stream.Recv()
		return h, err
	}
	var hooks []*hookClient
	for range 4 {
		h, err := hook(10)
		if err != nil {
			t.Fatal(err)
		}
		hooks = append(hooks, h)
	}
	_, err := hook(10)
	mustBeRefused(t, err, "streams", "4")
	if _, err := s.client.Status(t.Context(), &dispatchv1.StatusRequest{}); err != nil {
		t.Errorf("a call that is no stream: %v", err)
	}
	hooks[0].leave()
	s.eventually("one stream has ended", func() bool { return s.d.usage.Of(me, usage.Streams) == 3 })
	_, err = hook(2 << 20)
	mustBeRefused(t, err, "bytes of requests")
	s.eventually("what was refused is not counted", func() bool { return s.d.usage.Of(me, usage.Streams) == 3 })
	r, err := s.client.Status(t.Context(), &dispatchv1.StatusRequest{Users: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.GetUsers()) != 1 || r.GetUsers()[0].GetStreams() != 3 || r.GetUsers()[0].GetCalls() != 4 || r.GetUserBounds().GetStreams() != 4 {
		t.Errorf("Status tells of %v, bounds %v; want 3 streams and 4 calls", r.GetUsers(), r.GetUserBounds())
	}
	if got := s.metric("nix_dispatch_user_refusals_total", map[string]string{"bound": "streams"}); got != 1 {
		t.Errorf("%v refused streams are counted, want 1", got)
	}
	if got := s.metric("nix_dispatch_users", nil); got != 1 {
		t.Errorf("%v users are counted, want 1", got)
	}
	for _, h := range hooks {
		h.leave()
	}
	s.eventually("nothing is left", func() bool {
		return s.d.usage.Of(me, usage.Calls) == 0 && s.d.usage.Of(me, usage.RequestBytes) == 0
	})
}

// TestHooksCountForTheirUsers has nix-daemon's hooks come for a user: no bound of that
// user's own calls is for them.
func TestHooksCountForTheirUsers(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.build = untilGone
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{m},
		prepare: func(s *site) {
			s.guest(usage.Amounts{usage.Calls: 1, usage.Streams: 1, usage.RequestBytes: 1})
			s.d.bounded = false
		},
	})
	alice := usage.User{UID: 4711}
	var hooks []*hookClient
	for range 3 {
		h := s.hook(func(h *dispatchv1.Hello) { h.Client = &dispatchv1.Client{Uid: proto.Uint32(alice.UID), Pid: 1} })
		h.accepted(s.drv("thing", drvConfig{}))
		hooks = append(hooks, h)
	}
	s.eventually("they are counted", func() bool {
		return s.d.usage.Of(alice, usage.Hooks) == 3 && s.d.usage.Of(alice, usage.Builds) == 3 && s.d.usage.Of(alice, usage.HookBytes) > 0
	})
	if n := s.d.usage.Of(alice, usage.Streams); n != 0 {
		t.Errorf("%d streams are counted as the user's own", n)
	}
	for _, h := range hooks {
		h.leave()
	}
	s.eventually("nothing is left", func() bool {
		return s.d.usage.Of(alice, usage.Hooks) == 0 && s.d.usage.Of(alice, usage.Builds) == 0
	})
	s.idle()
}

// TestLargeGraphsWait has a user ask for more derivations than one may have in progress.
func TestLargeGraphsWait(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	open := make(chan struct{})
	m.build = m.gated(open)
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{m},
		prepare:  func(s *site) { s.guest(usage.Amounts{usage.Builds: 2}) },
	})
	var recipes []*recipe
	for range 5 {
		recipes = append(recipes, s.drv("one", drvConfig{}))
	}
	done := make(chan *realising)
	go func() { done <- s.realise(asked(recipes...)) }()
	s.eventually("two are in progress", func() bool { return len(s.status().GetBuilds()) >= 2 })
	time.Sleep(100 * time.Millisecond) // the others would come at once
	if n := len(s.status().GetBuilds()); n != 2 {
		t.Errorf("%d builds are in progress, want 2", n)
	}
	close(open)
	(<-done).mustSucceed(t)
	s.idle()
}

// TestLogsOfAUserAreBounded has two builds print more than one user's logs may take.
func TestLogsOfAUserAreBounded(t *testing.T) {
	t.Parallel()
	l := usage.New(usage.Amounts{usage.LogBytes: 100})
	me := usage.User{UID: 4711}
	spools := make([]*spool, 2)
	for i := range spools {
		spools[i] = newSpool(t.TempDir())
		spools[i].use = l.Count(me, usage.LogBytes, 0)
		_, _ = spools[i].Write(make([]byte, spoolMemory+60))
	}
	if err := spools[0].lost(); err != nil {
		t.Errorf("the first: %v", err)
	}
	if err := spools[1].lost(); err == nil || spools[1].length() != spoolMemory {
		t.Errorf("the second has %d bytes, %v; want what is in memory, and the reason", spools[1].length(), err)
	}
	for _, s := range spools {
		s.close()
	}
	if n := l.Of(me, usage.LogBytes); n != 0 {
		t.Errorf("%d bytes are counted after the end", n)
	}
}
