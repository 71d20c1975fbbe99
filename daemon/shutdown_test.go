package daemon

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

// draining is a site whose daemon is asked to stop while one build runs and
// another waits, each for a caller of its own kind.
func draining(t *testing.T, timeout time.Duration, hurry chan struct{}) (s *site, h *hookClient, call chan *realising, release func()) {
	t.Helper()
	goOn := make(chan struct{})
	m := oneMachine("ssh-ng")
	m.build = func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
		select {
		case <-goOn:
		case <-ctx.Done():
		}
		return m.site.recipe(req.DrvPath).build(m.store, req)
	}
	s = newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, options: func(o *Options) {
		o.DrainTimeout, o.Hurry = timeout, hurry
	}})
	h = s.hook()
	h.accepted(s.drv("hooks", drvConfig{}))
	s.eventually("it is being built", func() bool { return m.building() == 1 })
	call = make(chan *realising, 1)
	top := asked(s.drv("top", drvConfig{inputs: []*recipe{s.drv("below", drvConfig{})}}))
	go func() { call <- s.realise(top) }()
	s.eventually("the call's first build waits", func() bool { return len(s.status().GetBuilds()) == 2 })
	go s.stop()
	s.eventually("the daemon refuses calls", func() bool { return s.d.refusing() })
	return s, h, call, func() { close(goOn) }
}

func TestDrainLetsBuildsEnd(t *testing.T) {
	t.Parallel()
	s, h, call, release := draining(t, time.Hour, nil)
	late := s.hook()
	wantReply(t, late.try(s.drv("late", drvConfig{}), false), postpone, "shutting down")
	if got := s.realise(asked(s.drv("again", drvConfig{}))); status.Code(got.err) != codes.Unavailable {
		t.Errorf("a late call: %v, want Unavailable", got.err)
	}
	release()
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	// Builds that follow in the same call are part of what was asked for in time.
	(<-call).mustSucceed(t)
	s.stop()
}

func TestDrainIsBounded(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func() (time.Duration, chan struct{}){
		"timeout":       func() (time.Duration, chan struct{}) { return 100 * time.Millisecond, nil },
		"second signal": func() (time.Duration, chan struct{}) { c := make(chan struct{}); close(c); return time.Hour, c },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			timeout, hurry := end()
			_, h, _, release := draining(t, timeout, hurry)
			defer release()
			st := h.finish()
			if st.err != nil && status.Code(st.err) == codes.Unavailable {
				return // as well as:
			}
			st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_CANCELLED)
		})
	}
}

// SIGTERM ends every wait that is no build, whatever callers do, though builds might go
// on for an hour.
func TestStopEndsWaits(t *testing.T) {
	t.Parallel()
	// stopsIn is less than any of the waits takes by itself.
	const stopsIn = startWait * 3 / 4
	chatty := func(s *site) *recipe {
		r := s.drv("chatty", drvConfig{})
		for range 750 {
			r.log = append(r.log, strings.Repeat("log ", 1024))
		}
		return r
	}
	for name, wait := range map[string]func(t *testing.T, s *site){
		"nothing": func(*testing.T, *site) {},
		"a caller that holds roots": func(t *testing.T, s *site) {
			req := asked(s.drv("rooted", drvConfig{}))
			req.HoldRoots = true
			stream, err := s.client.Build(t.Context(), req)
			if err != nil {
				t.Fatal(err)
			}
			for m := new(dispatchv1.BuildResponse); m.GetSummary() == nil; {
				if m, err = stream.Recv(); err != nil {
					t.Fatal(err)
				}
			}
		},
		"a hook that never says Start": func(t *testing.T, s *site) {
			wantReply(t, s.hook().try(s.drv("unstarted", drvConfig{}), false), accept, "")
		},
		"a Build call that is not read": func(t *testing.T, s *site) {
			if _, err := s.client.Build(t.Context(), asked(chatty(s), s.drv("after", drvConfig{}))); err != nil {
				t.Fatal(err)
			}
			s.idle()
		},
		"a history that is not read": func(t *testing.T, s *site) {
			s.mustBuild(s.drv("ended", drvConfig{}))
			s.ended(1, &dispatchv1.HistoryRequest{})
			if _, err := s.client.History(t.Context(), &dispatchv1.HistoryRequest{}); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSiteWith(t, siteConfig{machines: []*fakeMachine{oneMachine("ssh-ng")}, options: func(o *Options) {
				o.DrainTimeout = time.Hour
			}})
			wait(t, s)
			begin := time.Now()
			s.stop()
			took := time.Since(begin)
			if t.Logf("it took %v", took); took > stopsIn {
				t.Errorf("the daemon took %v to stop, though nothing was being built", took)
			}
		})
	}
}

// A machine that does not confirm the end of a build, and parts that do not end, do not
// keep the daemon.
func TestStopIsBounded(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	held := make(chan struct{})
	t.Cleanup(func() { close(held) })
	s.d.leftovers.Go(func() { <-held })
	s.d.builds.Go(func() { <-held })
	begin := time.Now()
	s.stop()
	t.Logf("it took %v", time.Since(begin))
}
