package daemon

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// startedBy is how many remote processes f starts on the machine.
func (m *fakeMachine) startedBy(f func()) int {
	before, _ := m.processes()
	f()
	after, _ := m.processes()
	return after - before
}

// silent makes a derivation whose builder prints nothing: over the serve
// protocol only after such builds the process can go on.
func (s *site) silent(name string) *recipe {
	r := s.drv(name, drvConfig{})
	r.log = nil
	return r
}

func TestRemoteProcessServesSeveralBuilds(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		s := newSite(t, m)
		var logs []string
		started := m.startedBy(func() {
			for range 5 {
				s.mustBuild(s.silent("quiet"))
			}
		})
		if started > 2 { // one, but for a host too slow for two builds within the idle time
			t.Errorf("%d remote processes for 5 builds in a row", started)
		}
		if scheme == "ssh-ng" {
			for _, name := range []string{"a", "b"} {
				r := s.drv(name, drvConfig{})
				st := s.mustBuild(r)
				logs = append(logs, st.log)
			}
			if logs[0] != "building a\na is ready\n" || logs[1] != "building b\nb is ready\n" {
				t.Errorf("logs %q: of another build over the same process", logs)
			}
		}
		if got := s.local.count(); got > 3 {
			t.Errorf("%d connections to the local nix-daemon", got)
		}
	})
}

func TestRemoteProcessIsNotReused(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		schemes []string
		// first is the build before, next the one that needs a process of its own.
		first, next func(s *site, m *fakeMachine)
	}{
		{name: "after a failure", schemes: schemes, first: func(s *site, _ *fakeMachine) {
			r := s.silent("broken")
			r.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "no"}
			s.build(r).mustBe(s.t, dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE)
		}},
		{name: "after a failed import", schemes: schemes, first: func(s *site, _ *fakeMachine) {
			s.local.onImport(func(nix.PathInfo) error { s.local.onImport(nil); return errors.New("no") })
			s.build(s.silent("refused")).mustBe(s.t, dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE)
		}},
		{name: "after a log over serve", schemes: []string{"ssh"}, first: func(s *site, _ *fakeMachine) {
			s.mustBuild(s.drv("chatty", drvConfig{}))
		}},
		{name: "for substitution over serve", schemes: []string{"ssh"}, next: func(s *site, _ *fakeMachine) {
			h := s.hook(func(h *dispatchv1.Hello) { h.BuildersUseSubstitutes = true })
			r := s.silent("substituting")
			h.accepted(r)
			h.finish().mustBe(s.t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		}},
		{name: "once it is old", schemes: schemes, first: func(s *site, m *fakeMachine) {
			s.mustBuild(s.silent("old"))
			s.idleRemote(m, func(r *remote) { r.started = r.started.Add(-maxRemoteAge) })
			s.mustBuild(s.silent("last")) // it was young enough when it was put there
		}},
		{name: "once it has served many", schemes: schemes, first: func(s *site, m *fakeMachine) {
			s.mustBuild(s.silent("many"))
			s.idleRemote(m, func(r *remote) { r.builds = maxRemoteBuilds - 1 })
			s.mustBuild(s.silent("last"))
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, scheme := range tt.schemes {
				m := oneMachine(scheme)
				s := newSite(t, m)
				first, next := tt.first, tt.next
				if first == nil {
					first = func(s *site, _ *fakeMachine) { s.mustBuild(s.silent("first")) }
				}
				if next == nil {
					next = func(s *site, _ *fakeMachine) { s.mustBuild(s.silent("next")) }
				}
				first(s, m)
				if got := m.startedBy(func() { next(s, m) }); got != 1 {
					t.Errorf("%s: %d remote processes were started for the next build, want 1", scheme, got)
				}
			}
		})
	}
}

// idleRemote changes the remote process that waits for the next build.
func (s *site) idleRemote(m *fakeMachine, change func(*remote)) {
	s.t.Helper()
	pool := s.inUse(m).idle
	pool.mu.Lock()
	defer pool.mu.Unlock()
	if len(pool.idle) != 1 {
		s.t.Fatalf("%d idle remote processes, want 1", len(pool.idle))
	}
	change(pool.idle[0].x)
}

func TestStaleRemoteProcessIsNobodysFault(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		s := newSite(t, m)
		s.mustBuild(s.silent("first"))
		s.idleRemote(m, func(r *remote) {
			// Its end has come, and nobody has looked yet.
			_ = r.session.Close()
		})
		st := s.mustBuild(s.drv("next", drvConfig{srcs: []nix.StorePath{s.source("src")}}))
		for _, e := range st.events {
			if q := e.GetQueued(); q != nil {
				t.Errorf("the build was queued again: %v", q)
			}
		}
		if got := s.metric("nix_dispatch_builds_total", map[string]string{"result": "built"}); got != 2 {
			t.Errorf("%v builds succeeded, want 2", got)
		}
	})
}

func TestStaleLocalConnectionIsReplaced(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	s := newSite(t, m)
	s.mustBuild(s.silent("first"))
	s.local.cut()
	s.mustBuild(s.silent("next"))
}

func TestLocalConnectionIsRetired(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	use := func(clean bool) *localConn {
		c, err := s.d.stores.own.open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		c.clean = clean
		c.Close()
		return c
	}
	first := use(true)
	if again := use(true); again != first {
		t.Error("a clean connection was not used again")
	}
	first.uses = maxLocalUses - 1
	if last := use(true); last != first {
		t.Error("a connection was retired a use early")
	}
	second := use(true)
	if second == first {
		t.Errorf("a connection had more than %d uses", maxLocalUses)
	}
	second.started = second.started.Add(-maxLocalAge)
	if again := use(true); again != second {
		t.Error("an idle connection was dropped for its age before its last use")
	}
	if third := use(false); third == second {
		t.Error("an old connection was used again")
	} else if fourth := use(true); fourth == third {
		t.Error("a connection that was not left clean was used again")
	}
	ctx, cancel := context.WithCancel(t.Context())
	c, err := s.d.stores.own.open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c.clean = true
	cancel()
	s.eventually("the end of the context ends the connection", func() bool { return !c.alive() })
	c.Close()
	if next := use(true); next == c {
		t.Error("a connection that its context ended was used again")
	}
}

func TestIdlePool(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var ended []int
		end := func(n int) { mu.Lock(); defer mu.Unlock(); ended = append(ended, n) }
		p := &idlePool[int]{ttl: time.Second, end: end}
		want := func(what string, n ...int) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(ended, n) {
				t.Errorf("%s: ended %v, want %v", what, ended, n)
			}
		}
		p.put(1)
		time.Sleep(500 * time.Millisecond)
		p.put(2)
		if x, ok := p.take(); x != 2 || !ok {
			t.Errorf("take = %d, %v; want the newest, 2", x, ok)
		}
		want("both in use or young")
		time.Sleep(600 * time.Millisecond)
		want("the first one's time is over", 1)
		if x, ok := p.take(); ok {
			t.Errorf("take = %d of an empty pool", x)
		}
		time.Sleep(time.Minute)
		want("what was taken is not ended", 1)
		p.put(9)
		time.Sleep(500 * time.Millisecond)
		p.take()
		p.put(9)
		time.Sleep(600 * time.Millisecond)
		if x, ok := p.take(); x != 9 || !ok {
			t.Errorf("take = %d, %v; want 9, whose time began anew when it was put back", x, ok)
		}
		p.put(3)
		p.put(4)
		p.close()
		p.put(5)
		synctest.Wait()
		slices.Sort(ended) // at once, in any order
		want("closing ends the rest, and what comes later", 1, 3, 4, 5)
	})
}
