package daemon

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/scheduler"
)

func TestFollowersShareOneBuild(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		open := make(chan struct{})
		m.build = m.gated(open)
		s := newSite(t, m)
		r := s.drv("shared", drvConfig{})
		hooks := []*hookClient{s.hook(), s.hook(), s.hook()}
		for _, h := range hooks {
			h.accepted(r)
		}
		if got := s.status().GetBuilds(); len(got) != 1 || got[0].GetCallers() != 3 {
			t.Errorf("builds in progress = %v, want one with 3 callers", got)
		}
		hooks[0].leave() // the one who brought it
		close(open)
		want := strings.Join(r.log, "\n") + "\n"
		stories := make(chan *story)
		for _, h := range hooks[1:] {
			go func() { stories <- h.finish() }()
		}
		for range hooks[1:] {
			st := <-stories
			if st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT); st.log != want {
				t.Errorf("log = %q, want %q", st.log, want)
			}
		}
		if got := m.built(); len(got) != 1 {
			t.Errorf("built %v, want it once", got)
		}
		s.idle()
	})
}

func TestBuildIsCancelledWhenTheLastFollowerLeaves(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		m.build = untilGone
		s := newSite(t, m)
		r := s.drv("shared", drvConfig{})
		h1, h2 := s.hook(), s.hook()
		h1.accepted(r)
		h2.accepted(r)
		s.eventually("it is being built", func() bool { return m.building() == 1 })
		h1.leave()
		s.eventually("one caller is left", func() bool {
			b := s.status().GetBuilds()
			return len(b) == 1 && b[0].GetCallers() == 1
		})
		if m.building() != 1 {
			t.Error("the build ended although somebody waits for it")
		}
		h2.leave()
		s.eventually("nothing runs on the machine", func() bool {
			_, running := m.processes()
			return m.building() == 0 && running == 0
		})
		s.idle()
		if got := s.metric("nix_dispatch_builds_total", map[string]string{"result": "cancelled"}); got != 1 {
			t.Errorf("%v builds counted as cancelled, want 1", got)
		}
		// The same derivation may be asked for anew.
		m.buildWith(nil)
		s.mustBuild(r)
	})
}

func TestCancel(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.build = untilGone
	s := newSite(t, m)
	r := s.drv("unwanted", drvConfig{})
	h1, h2 := s.hook(), s.hook()
	id := h1.accepted(r).GetBuildId()
	h2.accepted(r)
	cancel := func(id uint64) error {
		_, err := s.client.Cancel(t.Context(), &dispatchv1.CancelRequest{BuildId: id})
		return err
	}
	if err := cancel(id + 1); status.Code(err) != codes.NotFound {
		t.Errorf("Cancel of no build = %v, want NotFound", err)
	}
	if err := cancel(id); err != nil {
		t.Errorf("Cancel = %v", err)
	}
	h1.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_CANCELLED)
	h2.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_CANCELLED)
	s.idle()
	if err := cancel(id); status.Code(err) != codes.NotFound {
		t.Errorf("Cancel of a build that has ended = %v, want NotFound", err)
	}
}

func TestWhoMayCancel(t *testing.T) {
	t.Parallel()
	const owner, stranger = 4711, 4712
	for _, tt := range []struct {
		name string
		by   caller
		want error
	}{
		{"root", caller{uid: 0}, nil},
		{"the daemon's user", caller{uid: uint32(os.Geteuid())}, nil},
		{"who asked for it", caller{uid: owner}, nil},
		{"somebody else", caller{uid: stranger}, errNotYours},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cause := errors.New("not cancelled")
			b := &build{id: 7, store: new(localStore), lease: new(lease), owners: owners{owner}, cancel: func(err error) { cause = err }}
			d := &Daemon{dispatcher: newDispatcher(nil)}
			d.dispatcher.builds[b.id] = b
			if _, err := d.cancel(b.id, tt.by); !errors.Is(err, tt.want) {
				t.Errorf("cancel = %v, want %v", err, tt.want)
			}
			if cancelled := errors.Is(cause, errCancelled); cancelled != (tt.want == nil) {
				t.Errorf("cancelled: %v, want %v", cancelled, tt.want == nil)
			}
		})
	}
}

// TestTimeoutCountsWhileInputsAreCopied has a machine that never says which inputs it
// lacks.
func TestTimeoutCountsWhileInputsAreCopied(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		s := newSite(t, m)
		m.onQuestion(func() { <-t.Context().Done() })
		h := s.hook(func(h *dispatchv1.Hello) {
			h.Limits = &dispatchv1.Limits{Timeout: durationpb.New(time.Second), MaxSilentTime: durationpb.New(time.Millisecond)}
		})
		h.accepted(s.drv("stuck", drvConfig{srcs: []nix.StorePath{s.source("src")}}))
		st := h.finish()
		st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT)
		if got := st.finished.GetError(); got != "timed out after 1 seconds" {
			t.Errorf("ended with %q", got)
		}
		s.idle()
	})
}

func TestLimitsAreEachFollowersOwn(t *testing.T) {
	t.Parallel()
	limit := func(l *dispatchv1.Limits) func(*dispatchv1.Hello) {
		return func(h *dispatchv1.Hello) { h.Limits = l }
	}
	soon := durationpb.New(100 * time.Millisecond)
	tests := []struct {
		name   string
		limits *dispatchv1.Limits
		want   dispatchv1.BuildStatus
		error  string
	}{
		{"timeout", &dispatchv1.Limits{Timeout: soon}, dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT, "timed out"},
		{"silence", &dispatchv1.Limits{MaxSilentTime: soon}, dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT, "silence"},
		{"log size", &dispatchv1.Limits{MaxLogSize: 10}, dispatchv1.BuildStatus_BUILD_STATUS_LOG_LIMIT_EXCEEDED, "10 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			eachScheme(t, func(t *testing.T, scheme string) {
				m := oneMachine(scheme)
				open := make(chan struct{})
				m.build = func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
					req.Log("more than ten bytes of log")
					return m.gated(open)(ctx, req)
				}
				s := newSite(t, m)
				r := s.drv("long", drvConfig{})
				patient, strict := s.hook(), s.hook(limit(tt.limits))
				patient.accepted(r)
				s.eventually("it is being built", func() bool { return m.building() == 1 })
				strict.accepted(r)
				st := strict.finish()
				st.mustBe(t, tt.want)
				if got := st.finished; !strings.Contains(got.GetError(), tt.error) || got.GetMachine() != m.uri() {
					t.Errorf("finished = %v, want %q on %s", got, tt.error, m.uri())
				}
				if m.building() != 1 {
					t.Error("the limit of one caller ended the build of another")
				}
				close(open)
				patient.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)

				// Alone, the strict one's limit ends the build.
				r = s.drv("endless", drvConfig{})
				m.buildWith(func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
					if tt.limits.GetMaxLogSize() > 0 {
						req.Log("more than ten bytes of log")
					}
					return untilGone(ctx, req)
				})
				strict = s.hook(limit(tt.limits))
				strict.accepted(r)
				strict.finish().mustBe(t, tt.want)
				s.eventually("nothing runs on the machine", func() bool { return m.building() == 0 })
				s.idle()
			})
		})
	}
}

func TestLimitsDoNotCountWaiting(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	open := make(chan struct{})
	m.build = m.gated(open)
	s := newSite(t, m)
	first := s.hook()
	first.accepted(s.drv("first", drvConfig{}))
	s.eventually("the slot is taken", func() bool { return m.building() == 1 })
	strict := s.hook(func(h *dispatchv1.Hello) {
		h.Limits = &dispatchv1.Limits{Timeout: durationpb.New(patience), MaxSilentTime: durationpb.New(patience)}
	})
	strict.accepted(s.drv("second", drvConfig{}))
	s.eventually("the second is in the queue", func() bool { return len(s.status().GetBuilds()) == 2 })
	second := s.findBuild("second")
	if since, _ := second.feed.buildingSince(); !since.IsZero() {
		t.Errorf("its limits count from %v, but it waits", since)
	}
	goOn := make(chan struct{})
	m.buildWith(m.gated(goOn))
	opened := time.Now()
	close(open)
	first.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	s.eventually("the second is being built", func() bool { return m.building() == 1 })
	if since, _ := second.feed.buildingSince(); since.Before(opened) {
		t.Errorf("its limits count from %v, before there was a slot at %v", since, opened)
	}
	close(goOn)
	strict.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
}

func TestLimitCheck(t *testing.T) {
	t.Parallel()
	start := time.Unix(1000, 0)
	log := newSpool("")
	log.head, log.size, log.written = make([]byte, 50), 50, start.Add(10*time.Second)
	tests := []struct {
		name   string
		limits limits
		after  time.Duration
		wait   time.Duration
		want   dispatchv1.BuildStatus
	}{
		{"none", limits{}, time.Hour, 1<<63 - 1, 0},
		{"time is left", limits{timeout: time.Minute}, 20 * time.Second, 40 * time.Second, 0},
		{"time is up", limits{timeout: time.Minute}, time.Minute, 0, dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT},
		{"not silent for long", limits{maxSilent: time.Minute}, 20 * time.Second, 50 * time.Second, 0},
		{"silent for too long", limits{maxSilent: time.Minute}, 70 * time.Second, 0, dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT},
		{"the nearer limit", limits{timeout: time.Minute, maxSilent: 15 * time.Second}, 20 * time.Second, 5 * time.Second, 0},
		{"log at the limit", limits{maxLog: 50}, time.Second, 1<<63 - 1, 0},
		{"log over the limit", limits{maxLog: 49}, time.Second, 0, dispatchv1.BuildStatus_BUILD_STATUS_LOG_LIMIT_EXCEEDED},
	}
	for _, tt := range tests {
		wait, over := tt.limits.check(start, log, start.Add(tt.after))
		var got dispatchv1.BuildStatus
		if over != nil {
			got, wait = over.status, 0
		}
		if got != tt.want || wait != tt.wait {
			t.Errorf("%s: check = %v, %v; want %v, %v", tt.name, wait, got, tt.wait, tt.want)
		}
	}
	// What an earlier attempt said is no sign of life of this one.
	if wait, _ := (limits{maxSilent: time.Minute}).check(start.Add(time.Hour), log, start.Add(time.Hour)); wait != time.Minute {
		t.Errorf("wait after an earlier attempt's log = %v, want %v", wait, time.Minute)
	}
}

func TestHookLeavesWhileItsBuildWaits(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.build = untilGone
	s := newSite(t, m)
	busy := s.hook()
	busy.accepted(s.drv("busy", drvConfig{}))
	s.eventually("the slot is taken", func() bool { return m.building() == 1 })
	for _, name := range []string{"staged", "queued", "queued-too"} {
		h := s.hook()
		h.accepted(s.drv(name, drvConfig{}))
		h.leave()
	}
	s.eventually("only the first is left", func() bool { return len(s.status().GetBuilds()) == 1 })
	if _, ok := s.d.dispatcher.queue.Build(scheduler.BuildID(s.status().GetBuilds()[0].GetId())); !ok {
		t.Error("the queue does not know the build that is left")
	}
}

// TestManyBuildsAtOnce has builds with shared inputs compete for two machines.
func TestManyBuildsAtOnce(t *testing.T) {
	t.Parallel()
	m, m2 := oneMachine("ssh"), namedMachine("ssh-ng", "m2")
	m.slots, m2.slots = 3, 2
	s := newSite(t, m, m2)
	for _, machine := range []*fakeMachine{m, m2} {
		machine.buildWith(func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult {
			// Until all slots have been in use once, builds last.
			s.eventually("all slots of "+machine.name+" are in use", func() bool {
				machine.mu.Lock()
				defer machine.mu.Unlock()
				return machine.mostBusy >= machine.slots
			})
			return s.recipe(req.DrvPath).build(machine.store, req)
		})
	}
	shared := []nix.StorePath{s.source("a")}
	for len(shared) < 12 {
		shared = append(shared, s.source("shared", shared[len(shared)/2:]...))
	}
	const builds = 40
	stories := make(chan *story)
	for n := range builds {
		h, r := s.hook(), s.drv("one-of-many", drvConfig{srcs: []nix.StorePath{shared[n%12], shared[n*7%12]}})
		h.accepted(r)
		go func() { stories <- h.finish() }()
	}
	for range builds {
		(<-stories).mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	}
	for _, machine := range []*fakeMachine{m, m2} {
		machine.mu.Lock()
		if machine.mostBusy != machine.slots {
			t.Errorf("%s: %d builds at once, want its %d slots used", machine.name, machine.mostBusy, machine.slots)
		}
		if len(machine.builds) < builds/10 {
			t.Errorf("%s: %d of %d builds", machine.name, len(machine.builds), builds)
		}
		mustBeOrdered(t, machine.name, machine.uploads, s.localRefs)
		machine.mu.Unlock()
	}
	s.idle()
}
