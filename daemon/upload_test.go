package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

func count(paths []nix.StorePath, p nix.StorePath) int {
	n := 0
	for _, other := range paths {
		if other == p {
			n++
		}
	}
	return n
}

func TestSharedInputTravelsOnce(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		m.slots = 2
		s := newSite(t, m)
		shared, own := s.source("shared"), s.source("own")
		above := s.source("above", shared)
		travelling, arrive := make(chan struct{}), make(chan struct{})
		var once sync.Once
		m.onUpload(func(i nix.PathInfo) error {
			if i.Path == shared {
				once.Do(func() { close(travelling) })
				<-arrive
			}
			return nil
		})
		r1 := s.drv("one", drvConfig{srcs: []nix.StorePath{shared}})
		r2 := s.drv("two", drvConfig{srcs: []nix.StorePath{shared, above, own}})
		h1, h2 := s.hook(), s.hook()
		h1.accepted(r1)
		if !closed(travelling) {
			t.Fatal("the first build sends nothing")
		}
		h2.accepted(r2)
		s.eventually("the second build sends what nobody else does", func() bool {
			return count(m.uploaded(), own) == 1
		})
		if got := m.uploaded(); slices.Contains(got, above) {
			t.Errorf("uploaded %v: what refers to a path on its way went ahead of it", got)
		}
		close(arrive)
		h1.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		h2.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		got := m.uploaded()
		for _, p := range []nix.StorePath{shared, above, own} {
			if count(got, p) != 1 {
				t.Errorf("%s was sent %d times, want once", p, count(got, p))
			}
		}
	})
}

func TestSharedInputIsTakenOverFromAFailedBuild(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m, m2 := oneMachine(scheme), namedMachine(scheme, "m2")
		m.slots, m.features = 2, "here"
		s := newSite(t, m, m2)
		shared, own := s.source("shared"), s.source("own")
		travelling, fail := make(chan struct{}), make(chan struct{})
		var once sync.Once
		m.onUpload(func(i nix.PathInfo) (err error) {
			if i.Path == shared {
				once.Do(func() {
					close(travelling)
					<-fail
					err = errors.New("disk full")
				})
			}
			return err
		})
		r1 := s.drv("one", drvConfig{srcs: []nix.StorePath{shared}})
		r2 := s.drv("two", drvConfig{srcs: []nix.StorePath{shared, own}, env: map[string]string{"requiredSystemFeatures": "here"}})
		h1, h2 := s.hook(), s.hook()
		h1.accepted(r1)
		if !closed(travelling) {
			t.Fatal("the first build sends nothing")
		}
		h2.accepted(r2)
		s.eventually("the second build waits for the first", func() bool { return count(m.uploaded(), own) == 1 })
		close(fail)
		st1, st2 := h1.finish(), h2.finish()
		st2.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		st1.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if st1.finished.GetMachine() != m2.uri() || st2.finished.GetMachine() != m.uri() {
			t.Errorf("built on %s and %s, want the failed one elsewhere", st1.finished.GetMachine(), st2.finished.GetMachine())
		}
		if got := count(m.uploaded(), shared); got != 2 {
			t.Errorf("the shared path was begun %d times, want twice", got)
		}
	})
}

// Of three large uploads one waits for the others, so that their builds can begin
// while its inputs travel; small ones wait for nobody.
func TestLargeUploadsTakeTurns(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.slots = 3 // that is, two turns
	s := newSite(t, m)
	large := func(name string) nix.StorePath {
		p := s.path(name)
		s.local.store.PutFile(p, strings.Repeat("x", bulk))
		return p
	}
	inputs := []nix.StorePath{large("first"), large("second"), large("third")}
	arrive := make(chan struct{})
	release := sync.OnceFunc(func() { close(arrive) })
	t.Cleanup(release)
	m.onUpload(func(i nix.PathInfo) error {
		if i.NarSize >= bulk {
			<-arrive
		}
		return nil
	})
	var hooks []*hookClient
	for n, p := range inputs {
		h := s.hook()
		h.accepted(s.drv(fmt.Sprint("build-", n), drvConfig{srcs: []nix.StorePath{p}}))
		hooks = append(hooks, h)
		s.eventually("it travels or waits", func() bool { return len(m.uploaded()) == min(n+1, 2) })
	}
	small := s.source("small")
	h := s.hook()
	h.accepted(s.drv("small", drvConfig{srcs: []nix.StorePath{small}}))
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	if got := m.uploaded(); slices.Contains(got, inputs[2]) {
		t.Errorf("uploaded %v, want the third large path to wait", got)
	}
	waiting := s.hook() // one that is given up while it waits takes nobody's turn
	waiting.accepted(s.drv("given-up", drvConfig{srcs: []nix.StorePath{large("fourth")}}))
	waiting.leave()
	release()
	for _, h := range hooks {
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	}
	s.idle()
	if n := len(s.inUse(m).turns); n != 0 {
		t.Errorf("%d turns are taken when nothing is going on", n)
	}
}

// A racyStore is a machine's store whose uploads take a while and may fail.
type racyStore struct {
	remoteStore // what an upload does not use
	t           *testing.T
	shared      *racyState
	rand        *rand.Rand
	failures    int // how many of this build's uploads fail
}

type racyState struct {
	mu    sync.Mutex
	valid map[nix.StorePath]bool
	sent  map[nix.StorePath]int
	now   map[nix.StorePath]bool // being sent
}

func (s *racyStore) missing(paths []nix.StorePath, _ bool) ([]nix.StorePath, error) {
	time.Sleep(time.Duration(s.rand.IntN(3)) * time.Millisecond)
	s.shared.mu.Lock()
	defer s.shared.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(paths), func(p nix.StorePath) bool { return s.shared.valid[p] }), nil
}

func (s *racyStore) upload(infos []nix.PathInfo, _ func(nix.PathInfo, io.Writer) error) error {
	for _, i := range infos {
		s.shared.mu.Lock()
		if s.shared.now[i.Path] || s.shared.valid[i.Path] {
			s.t.Errorf("%s is sent although it is there or on its way", i.Path)
		}
		for _, r := range i.References {
			if !s.shared.valid[r] {
				s.t.Errorf("%s is sent before %s", i.Path, r)
			}
		}
		s.shared.now[i.Path] = true
		s.shared.mu.Unlock()
		time.Sleep(time.Duration(s.rand.IntN(5)) * time.Millisecond)
		fails := s.failures > 0 && s.rand.IntN(4) == 0
		s.shared.mu.Lock()
		delete(s.shared.now, i.Path)
		s.shared.valid[i.Path] = !fails
		s.shared.sent[i.Path]++
		s.shared.mu.Unlock()
		if fails {
			s.failures--
			return errors.New("disk full")
		}
	}
	return nil
}

// TestUploadsNeverWaitForEachOther runs many builds that lack overlapping parts
// of one graph. Where a cycle of waiters arises the bubble has a deadlock, which
// fails the test.
func TestUploadsNeverWaitForEachOther(t *testing.T) {
	t.Parallel()
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			graph := make([]nix.PathInfo, 30)
			closures := make([][]int, len(graph))
			for n := range graph {
				graph[n].Path = wiretest.Path(n+1, "p")
				in := map[int]bool{n: true}
				for range rnd.IntN(4) {
					if n > 0 {
						ref := rnd.IntN(n)
						graph[n].References = append(graph[n].References, graph[ref].Path)
						for _, c := range closures[ref] {
							in[c] = true
						}
					}
				}
				for c := range len(graph) {
					if in[c] {
						closures[n] = append(closures[n], c)
					}
				}
			}
			state := &racyState{valid: map[nix.StorePath]bool{}, sent: map[nix.StorePath]int{}, now: map[nix.StorePath]bool{}}
			m := &machine{uploads: newClaims(), log: slog.New(slog.DiscardHandler)}
			var builds sync.WaitGroup
			for n := range 10 {
				var infos []nix.PathInfo
				wanted := map[int]bool{}
				for range 1 + rnd.IntN(4) {
					for _, c := range closures[rnd.IntN(len(graph))] {
						wanted[c] = true
					}
				}
				for c := range graph {
					if wanted[c] {
						infos = append(infos, graph[c])
					}
				}
				store := &racyStore{t: t, shared: state, rand: rand.New(rand.NewPCG(seed, uint64(n+2)))}
				if n%3 == 0 {
					store.failures = 1
				}
				b := &build{feed: newFeed("")}
				a := &attempt{d: &Daemon{}, b: b, m: m, r: &remote{machine: m, store: store, stderr: &stderrReader{}, stall: newStallWatch(nil)}}
				builds.Go(func() {
					u := &upload{attempt: a, held: make(map[nix.StorePath]*claim), asked: m.uploads.moment(),
						progress: newTransfer(b, prometheus.NewCounter(prometheus.CounterOpts{Name: "x"}), uploading, infos)}
					lacking, _ := store.missing(pathsOf(infos), false)
					todo := slices.DeleteFunc(slices.Clone(infos), func(i nix.PathInfo) bool { return !slices.Contains(lacking, i.Path) })
					time.Sleep(time.Duration(store.rand.IntN(3)) * time.Millisecond)
					err := u.run(t.Context(), todo)
					u.abandon()
					if len(u.held) != 0 {
						t.Errorf("seed %d, build %d: %d claims are left", seed, n, len(u.held))
					}
					if err != nil {
						return
					}
					state.mu.Lock()
					defer state.mu.Unlock()
					for _, i := range infos {
						if !state.valid[i.Path] {
							t.Errorf("seed %d, build %d: %s is not there after the upload", seed, n, i.Path)
						}
					}
				})
			}
			builds.Wait()
			if len(m.uploads.owners) != 0 {
				t.Errorf("seed %d: claims are left: %v", seed, m.uploads.owners)
			}
		})
	}
}

func TestUploadWaitEndsWithItsBuild(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		info := nix.PathInfo{Path: wiretest.Path(1, "p")}
		m := &machine{uploads: newClaims()}
		others := make(map[nix.StorePath]*claim)
		m.uploads.take([]nix.StorePath{info.Path}, others)
		ctx, cancel := context.WithCancelCause(t.Context())
		u := &upload{attempt: &attempt{m: m}, held: make(map[nix.StorePath]*claim)}
		ended := make(chan error, 1)
		go func() { ended <- u.run(ctx, []nix.PathInfo{info}) }()
		synctest.Wait()
		select {
		case err := <-ended:
			t.Fatalf("run = %v while another build sends the path, want it to wait", err)
		default:
		}
		cancel(errCancelled)
		if err := <-ended; !errors.Is(err, errCancelled) {
			t.Errorf("run = %v, want %v", err, errCancelled)
		}
	})
}

func TestSplitKeepsBackWhatRefersToOthers(t *testing.T) {
	t.Parallel()
	path := func(n int) nix.StorePath { return wiretest.Path(n, fmt.Sprint(n)) }
	infos := []nix.PathInfo{
		{Path: path(1)},
		{Path: path(2), References: []nix.StorePath{path(2)}},
		{Path: path(3), References: []nix.StorePath{path(1)}},
		{Path: path(4), References: []nix.StorePath{path(3), path(2)}},
		{Path: path(5), References: []nix.StorePath{path(2)}},
	}
	ready, rest := split(infos, map[nix.StorePath]*claim{path(1): {}})
	if diff := cmp.Diff([]nix.StorePath{path(2), path(5)}, pathsOf(ready)); diff != "" {
		t.Errorf("ready (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]nix.StorePath{path(1), path(3), path(4)}, pathsOf(rest)); diff != "" {
		t.Errorf("rest (-want +got):\n%s", diff)
	}
}
