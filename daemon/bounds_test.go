package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// A guest is a user in the group, with the bounds of one: a daemon in a test knows only
// callers of its own user, who command it.
func (s *site) guest(bounds usage.Amounts) {
	s.d.usage = usage.New(bounds)
	s.d.connections.usage = s.d.usage
	s.d.bounded, s.d.connections.bounded = true, true
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
		t.Errorf("Status reports %v, bounds %v; want 3 streams and 4 calls", r.GetUsers(), r.GetUserBounds())
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

// TestSecurityManyNames has a Build request name one derivation very often, or more text of
// derivations than one user may have read.
func TestSecurityManyNames(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{oneMachine("ssh")},
		prepare:  func(s *site) { s.guest(usage.Amounts{usage.DerivationBytes: 2000}) },
	})
	r := s.drv("one", drvConfig{outputs: []string{"doc", "out"}})
	var names []string
	for n := range 1000 {
		names = append(names, string(r.path)+[]string{"!out", "!doc,out", "!out,out"}[n%3])
	}
	read := 0
	targets, err := s.d.stores.own.parseTargets(t.Context(), names, func(p nix.StorePath) (*nix.Derivation, error) {
		read++
		return s.d.stores.own.derivation(p)
	})
	if err != nil || len(targets) != 1 || targets[0].String() != string(r.path)+"!out,doc" || read != 1 {
		t.Errorf("targets %v (%v), read %d times; want one that is read once", targets, err, read)
	}
	gone, leave := context.WithCancel(t.Context())
	left := 0
	for range 3 {
		names = append(names, string(s.drv("another", drvConfig{}).path))
	}
	if _, err := s.d.stores.own.parseTargets(gone, names, func(p nix.StorePath) (*nix.Derivation, error) {
		left++
		leave()
		return s.d.stores.own.derivation(p)
	}); !errors.Is(err, context.Canceled) || left != 1 {
		t.Errorf("the caller left at the first: %v after %d were read, want it to stop", err, left)
	}
	s.realise(&dispatchv1.BuildRequest{Derivations: names[:1000]}).mustSucceed(t)
	for range 20 {
		names = append(names, string(s.drv("more", drvConfig{}).path))
	}
	mustBeRefused(t, s.realise(&dispatchv1.BuildRequest{Derivations: names}).err, "bytes of derivations", "2000")
	me := usage.User{UID: uint32(os.Geteuid())}
	s.eventually("nothing is left", func() bool { return s.d.usage.Of(me, usage.DerivationBytes) == 0 })
}

// TestSecurityDetachedBytes has a member detach builds with more in their requests than is
// needed, and then more than is kept.
func TestSecurityDetachedBytes(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.build = untilGone
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{m},
		prepare: func(s *site) {
			s.guest(usage.Amounts{usage.DetachedBuilds: 10, usage.DetachedBytes: 3000})
		},
	})
	detach := func(derivations ...string) (uint64, error) {
		got := s.realise(&dispatchv1.BuildRequest{
			Detach: true, Derivations: derivations, KeepGoing: true, Limits: &dispatchv1.Limits{MaxLogSize: 7},
			Environment: append(s.hello().GetEnvironment(), "X="+strings.Repeat("x", 1<<20)),
		})
		return got.detached, got.err
	}
	one := string(s.drv("one", drvConfig{}).path)
	id, err := detach(one, one, one)
	if err != nil {
		t.Fatal(err)
	}
	file := s.d.detached.file(id)
	info, err := os.Stat(file)
	if err != nil || info.Size() > 2000 {
		t.Errorf("its file: %v, %v; want no more than what is needed", info, err)
	}
	j, err := s.d.readDetached(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s.d.detached.find(id).request, j.request, protocmp.Transform()); diff != "" || !j.request.GetKeepGoing() || j.request.GetLimits().GetMaxLogSize() != 7 {
		t.Errorf("read back (-kept +read):\n%s", diff)
	}
	var many []string
	for range 10 {
		many = append(many, string(s.drv("many", drvConfig{}).path))
	}
	_, err = detach(many...)
	mustBeRefused(t, err, "bytes of detached builds", "3000")
	var huge []string
	for n := range maxDetachedSize / 50 {
		huge = append(huge, fmt.Sprintf("%s!out%d", one, n))
	}
	if _, err := detach(huge...); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "a detached build may have") {
		t.Errorf("a huge one: %v, want InvalidArgument", err)
	}
	if got := s.status().GetDetached(); len(got) != 1 {
		t.Errorf("%d are detached, want 1: %v", len(got), got)
	}
	if _, err := s.client.Cancel(t.Context(), &dispatchv1.CancelRequest{BuildId: id}); err != nil {
		t.Error(err)
	}
	me := usage.User{UID: uint32(os.Geteuid())}
	s.eventually("nothing is left", func() bool {
		return s.d.usage.Of(me, usage.DetachedBytes) == 0 && s.d.usage.Of(me, usage.DetachedBuilds) == 0
	})
}

// TestWhatIsWrittenCanBeReadBack is about files of the state directory that grow with what
// callers ask for.
func TestWhatIsWrittenCanBeReadBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	drained := map[string]drain{"ssh://a": {URI: "ssh://a", By: "root"}}
	if err := writeDrained(dir, drained); err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(filepath.Join(dir, drainedFile))
	drained["ssh://b"] = drain{URI: "ssh://b" + strings.Repeat("b", maxDrainedFile)}
	if err := writeDrained(dir, drained); err == nil {
		t.Error("more drained machines than can be read back were written")
	}
	if after, _ := os.ReadFile(filepath.Join(dir, drainedFile)); string(after) != string(before) {
		t.Error("the file has changed")
	}
	builds := &detachedBuilds{dir: dir}
	j := &detachedBuild{id: 1, request: &dispatchv1.BuildRequest{Store: strings.Repeat("x", maxDetachedFile)}}
	if err := builds.write(j); err == nil {
		t.Error("a larger file of a detached build than can be read back was written")
	}
	// What an ended build leaves is bounded whatever it said.
	j = &detachedBuild{
		id: 1, ended: time.Now(), request: new(dispatchv1.BuildRequest), news: new(detachedNews),
		summary: &dispatchv1.Summary{Failed: make([]string, 10*maxFailed)},
	}
	for n := range 2 * maxInfoDerivations {
		j.request.Derivations = append(j.request.Derivations, strings.Repeat("d", 200))
		j.news.finished = append(j.news.finished, &dispatchv1.BuildEvent{DrvPath: fmt.Sprint(n), Event: &dispatchv1.BuildEvent_Finished{
			Finished: &dispatchv1.Finished{Status: dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE, Error: strings.Repeat("e", 1<<20)}}})
	}
	j.forgetDetails()
	if n := j.size(); n > 1<<20 {
		t.Errorf("%d bytes are kept of it, want 1 MiB at most", n)
	}
}
