package daemon

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

// detach begins a detached build.
func (s *site) detach(drvs ...*recipe) (uint64, *realising) {
	s.t.Helper()
	req := &dispatchv1.BuildRequest{Detach: true, KeepGoing: true}
	for _, r := range drvs {
		req.Derivations = append(req.Derivations, string(r.path))
	}
	got := s.realise(req)
	if got.err != nil {
		s.t.Fatalf("detach: %v", got.err)
	}
	return got.detached, got
}

// attach follows a build to its end.
func (s *site) attach(id uint64) *realising {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return readBuild(s.follow(ctx, id))
}

// join attaches, and returns when the plan has come: what happens then is told.
func (s *site) join(ctx context.Context, id uint64) grpc.ServerStreamingClient[dispatchv1.BuildResponse] {
	s.t.Helper()
	stream := s.follow(ctx, id)
	if msg, err := stream.Recv(); err != nil || msg.GetPlan() == nil {
		s.t.Errorf("attached: %v, %v; want the plan", msg, err)
	}
	return stream
}

func (s *site) follow(ctx context.Context, id uint64) grpc.ServerStreamingClient[dispatchv1.BuildResponse] {
	s.t.Helper()
	stream, err := s.client.Attach(ctx, &dispatchv1.AttachRequest{BuildId: id})
	if err != nil {
		s.t.Fatal(err)
	}
	return stream
}

// detachedInfo is what the status says of a detached build.
func (s *site) detachedInfo(id uint64) *dispatchv1.DetachedBuild {
	s.t.Helper()
	for _, b := range s.status().GetDetached() {
		if b.GetId() == id {
			return b
		}
	}
	return nil
}

// TestDetached has a graph be built without a caller. Those who attach, while it goes
// on and when it has ended, are told all the same.
func TestDetached(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		open := make(chan struct{})
		m.build = m.gated(open)
		s := newSite(t, m)
		bottom := s.drv("bottom", drvConfig{})
		top := s.drv("top", drvConfig{inputs: []*recipe{bottom}, outputs: []string{"out", "doc"}})
		broken := s.drv("broken", drvConfig{})
		broken.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "exit code 1"}
		id, got := s.detach(top)
		if id == 0 || got.summary != nil || len(got.plan.GetWillBuild()) != 2 {
			t.Fatalf("detached %d, plan %v, summary %v", id, got.plan, got.summary)
		}
		s.eventually("it is being built", func() bool { return m.building() == 1 })
		if b := s.detachedInfo(id); b.GetPlanned() != 2 || b.GetBuilt() != 0 || b.GetEnded() != nil || b.GetDerivations()[0] != string(top.path) {
			t.Errorf("status: %v", b)
		}
		// One leaves, one stays.
		leaver, leave := context.WithCancel(t.Context())
		s.join(leaver, id)
		bounded, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		stayer := s.join(bounded, id)
		leave()
		close(open)
		watched := readBuild(stayer)
		watched.mustSucceed(t)
		for _, r := range []*recipe{bottom, top} {
			st := watched.stories[r.path]
			if st == nil || st.status() != dispatchv1.BuildStatus_BUILD_STATUS_BUILT || r == top && st.log != strings.Join(r.log, "\n")+"\n" {
				t.Errorf("story of %s: %+v", r.path.Name(), st)
			}
		}
		if len(watched.summary.GetOutputs()) != 2 {
			t.Errorf("outputs: %v", watched.summary.GetOutputs())
		}
		// Its outputs are roots, by links of the daemon's.
		links, _ := filepath.Glob(filepath.Join(s.d.opts.StateDir, "detached", "[0-9]*-*"))
		var targets []string
		for _, link := range links {
			target, err := os.Readlink(link)
			if err != nil {
				t.Fatal(err)
			}
			targets = append(targets, target)
		}
		for _, p := range top.outPaths() {
			if !strings.Contains(strings.Join(targets, " "), string(p)) {
				t.Errorf("%s is no root: %q", p, targets)
			}
		}
		again := s.attach(id)
		if again.mustSucceed(t); len(again.summary.GetOutputs()) != 2 || len(again.stories) != 0 {
			t.Errorf("attached when it has ended: %+v", again)
		}
		if b := s.detachedInfo(id); b.GetBuilt() != 2 || !b.GetSuccess() || b.GetEnded() == nil {
			t.Errorf("status: %v", b)
		}
		// A failure is told then, too.
		id, _ = s.detach(broken)
		s.eventually("it has ended", func() bool { return s.detachedInfo(id).GetEnded() != nil })
		failed := s.attach(id)
		if failed.err != nil || failed.summary.GetSuccess() || !strings.Contains(failed.stories[broken.path].finished.GetError(), "exit code 1") {
			t.Errorf("attached to what failed: %+v", failed)
		}
		if none := s.attach(4711); status.Code(none.err) != codes.NotFound {
			t.Errorf("attached to nothing: %v", none.err)
		}
		s.idle()
	})
}

// TestDetachedOutlivesTheDaemon ends the daemon under a detached build.
func TestDetachedOutlivesTheDaemon(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.build = untilGone
	s := newSite(t, m)
	done, going := s.drv("done", drvConfig{}), s.drv("going", drvConfig{})
	doneID, _ := s.detach(s.drv("nothing", drvConfig{}))
	if err := s.d.detached.end(doneID, caller{}); err != nil {
		t.Fatal(err)
	}
	s.eventually("it is cancelled", func() bool { return s.detachedInfo(doneID).GetError() == "cancelled" })
	id, _ := s.detach(going)
	s.eventually("it is being built", func() bool { return m.building() == 1 })
	attached := make(chan *realising)
	go func() { attached <- s.attach(id) }()
	damaged := filepath.Join(s.d.opts.StateDir, "detached", "99.json")
	if err := os.WriteFile(damaged, []byte(`{"id":99,"request":{`), 0o600); err != nil {
		t.Fatal(err)
	}
	s.stop()
	if got := <-attached; status.Code(got.err) != codes.Unavailable {
		t.Errorf("attached when the daemon ends: %v, want Unavailable", got.err)
	}

	m.buildWith(nil)
	s.restart()
	got := s.attach(id)
	got.mustSucceed(t)
	if !s.local.valid(going.outPaths()[0]) {
		t.Errorf("the outputs are not there")
	}
	if got := s.attach(doneID); status.Code(got.err) != codes.FailedPrecondition || !strings.Contains(got.err.Error(), "cancelled") {
		t.Errorf("attached to what was cancelled: %v", got.err)
	}
	if _, err := os.Stat(damaged + ".damaged"); err != nil {
		t.Errorf("the damaged file is not set aside: %v", err)
	}
	// Ids are not given again.
	if next, _ := s.detach(done); next <= id {
		t.Errorf("the next has the id %d after %d", next, id)
	}
	s.idle()
}

func TestDetachedBounds(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.build = untilGone
	s := newSite(t, m)
	var last uint64
	for range maxDetached {
		last, _ = s.detach(s.drv("many", drvConfig{}))
	}
	got := s.realise(&dispatchv1.BuildRequest{Detach: true, Derivations: []string{string(s.drv("one", drvConfig{}).path)}})
	if status.Code(got.err) != codes.ResourceExhausted {
		t.Errorf("one more is detached: %v", got.err)
	}
	if err := s.d.detached.end(last, caller{uid: 4711}); err != errNotYours { //nolint:errorlint // itself
		t.Errorf("a stranger cancels it: %v", err)
	}
	for _, b := range s.status().GetDetached() {
		if _, err := s.client.Cancel(t.Context(), &dispatchv1.CancelRequest{BuildId: b.GetId()}); err != nil {
			t.Error(err)
		}
	}
	s.idle()
	s.eventually("all have ended", func() bool {
		for _, b := range s.status().GetDetached() {
			if b.GetEnded() == nil {
				return false
			}
		}
		return true
	})
	s.d.detached.prune(time.Now().Add(keepDetached + time.Hour))
	files, err := os.ReadDir(filepath.Join(s.d.opts.StateDir, "detached"))
	if err != nil || len(files) != 0 || len(s.status().GetDetached()) != 0 {
		t.Errorf("a week later there is still %v, %v (%v)", files, s.status().GetDetached(), err)
	}
	bad := s.realise(&dispatchv1.BuildRequest{Detach: true, Derivations: []string{string(s.path("absent.drv"))}})
	if bad.err == nil || len(s.status().GetDetached()) != 0 {
		t.Errorf("what cannot be built is detached: %v, %v", bad.err, s.status().GetDetached())
	}
}

// TestAttachKeepsABuild has a caller attach to the build of a hook that leaves.
func TestAttachKeepsABuild(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	open := make(chan struct{})
	m.build = m.gated(open)
	s := newSite(t, m)
	r := s.drv("kept", drvConfig{})
	h := s.hook()
	id := h.accepted(r).GetBuildId()
	attached := make(chan *realising)
	go func() { attached <- s.attach(id) }()
	s.eventually("there are two callers", func() bool { return s.status().GetBuilds()[0].GetCallers() == 2 })
	h.leave()
	s.eventually("one has left", func() bool { return s.status().GetBuilds()[0].GetCallers() == 1 })
	close(open)
	got := <-attached
	got.mustSucceed(t)
	if st := got.stories[r.path]; st.log != strings.Join(r.log, "\n")+"\n" || got.summary.GetOutputs()[0].GetPath() != string(r.outPaths()[0]) {
		t.Errorf("story %+v, summary %v", st, got.summary)
	}
	s.idle()
}

// A slowStream is an Attach call whose caller reads nothing before it may.
type slowStream struct {
	grpc.ServerStream
	ctx     context.Context //nolint:containedctx // of the call
	reads   <-chan struct{}
	blocked chan<- struct{} // closed when there is something to read
	once    sync.Once

	mu   sync.Mutex
	said []*dispatchv1.BuildResponse
}

func (s *slowStream) Context() context.Context { return s.ctx }

func (s *slowStream) Send(m *dispatchv1.BuildResponse) error {
	s.once.Do(func() { close(s.blocked) })
	<-s.reads
	s.mu.Lock()
	defer s.mu.Unlock()
	s.said = append(s.said, m)
	return nil
}

// Recv returns what was sent.
func (s *slowStream) Recv() (*dispatchv1.BuildResponse, error) {
	if len(s.said) == 0 {
		return nil, io.EOF
	}
	m := s.said[0]
	s.said = s.said[1:]
	return m, nil
}

// TestSlowReaderOfADetachedBuild has a caller attach when the first build has ended, and
// read nothing until all have: it receives each, with its log and why it failed.
func TestSlowReaderOfADetachedBuild(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	s := newSite(t, m)
	bottom := s.drv("bottom", drvConfig{})
	broken := s.drv("broken", drvConfig{inputs: []*recipe{bottom}})
	broken.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "exit code 1"}
	open := make(chan struct{})
	gated := m.gated(open)
	m.buildWith(func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
		if req.DrvPath == bottom.path {
			return bottom.build(m.store, req)
		}
		return gated(ctx, req)
	})
	id, _ := s.detach(broken)
	s.eventually("the first has been built, and the last is", func() bool {
		return s.detachedInfo(id).GetBuilt() == 1 && m.building() == 1
	})
	j := s.d.detached.find(id)
	reads, blocked := make(chan struct{}), make(chan struct{})
	stream := &slowStream{ctx: t.Context(), reads: reads, blocked: blocked}
	watched := make(chan error, 1)
	go func() { watched <- (&attached{d: s.d, stream: stream}).watch(t.Context(), j) }()
	if !closed(blocked) {
		t.Fatal("the caller is told nothing")
	}
	close(open)
	s.eventually("it has ended, and its details are gone", func() bool {
		return s.detachedInfo(id).GetEnded() != nil && j.read(new(attachCursor)).plan == nil
	})
	close(reads)
	if err := <-watched; err != nil {
		t.Fatal(err)
	}
	got := readBuild(stream)
	if got.summary == nil || got.summary.GetSuccess() || len(got.order) != 2 {
		t.Fatalf("summary %v; finished: %v, want both", got.summary, got.order)
	}
	if log := got.stories[bottom.path].log; log != strings.Join(bottom.log, "\n")+"\n" {
		t.Errorf("the log of what was built: %q", log)
	}
	if why := got.stories[broken.path].finished.GetError(); !strings.Contains(why, "exit code 1") {
		t.Errorf("the last failure: %q", why)
	}
	s.idle()
}
