package daemon

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// A sight is what one reader saw of builds, by id.
type sight struct{ inProgress, ended map[uint64]bool }

// both are the builds that are in progress and have ended, neither those of all ids
// up to last that are nowhere.
func (s sight) both() (ids []uint64) {
	for id := range s.ended {
		if s.inProgress[id] {
			ids = append(ids, id)
		}
	}
	return ids
}

func (s sight) neither(last uint64) (ids []uint64) {
	for id := uint64(1); id <= last; id++ {
		if !s.inProgress[id] && !s.ended[id] {
			ids = append(ids, id)
		}
	}
	return ids
}

func inProgressOf(r *dispatchv1.StatusResponse) map[uint64]bool {
	ids := make(map[uint64]bool)
	for _, b := range r.GetBuilds() {
		ids[b.GetId()] = true
	}
	return ids
}

// endedSoFar fails the test if a build is there twice.
func (s *site) endedSoFar() map[uint64]bool {
	s.t.Helper()
	stream, err := s.client.History(s.t.Context(), &dispatchv1.HistoryRequest{})
	rows, err := all(s.t, stream, err)
	if err != nil {
		s.t.Error(err)
	}
	ids := make(map[uint64]bool)
	for _, row := range rows {
		if ids[row.GetId()] {
			s.t.Errorf("build %d is in the history twice", row.GetId())
		}
		ids[row.GetId()] = true
	}
	return ids
}

// TestABuildIsInOnePlace ends builds while readers look in both orders, and at metrics.
func TestABuildIsInOnePlace(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{builders: "ssh://m1 x86_64-linux - 1"})
	const n = 500
	var builds []*build
	for range n {
		b := s.d.newBuild(s.d.stores.own, s.path("x.drv"),
			&nix.Derivation{BasicDerivation: nix.BasicDerivation{Platform: "x86_64-linux"}}, false, caller{})
		b.cancel = func(error) {}
		s.d.dispatcher.mu.Lock()
		s.d.dispatcher.submitLocked(b)
		s.d.dispatcher.mu.Unlock()
		builds = append(builds, b)
	}
	var ending sync.WaitGroup
	ending.Go(func() {
		for _, b := range builds {
			_, _ = b.feed.Write([]byte("said\n"))
			s.d.conclude(b, outcome{status: dispatchv1.BuildStatus_BUILD_STATUS_BUILT, machine: "ssh://m1"})
		}
	})
	for left := n; left > 0; {
		var in sight
		in.inProgress = inProgressOf(s.status())
		in.ended = s.endedSoFar()
		if lost := in.neither(n); len(lost) > 0 {
			t.Fatalf("status and then history: builds %v are in neither", lost)
		}
		in.ended = s.endedSoFar()
		in.inProgress = inProgressOf(s.status())
		if twice := in.both(); len(twice) > 0 {
			t.Fatalf("history and then status: builds %v are in both", twice)
		}
		left = len(in.inProgress)
		for id := range in.ended {
			if text, err := s.log(&dispatchv1.LogRequest{BuildId: id}); err != nil || text != "said\n" {
				t.Fatalf("the log of build %d, which has ended: %q, %v", id, text, err)
			}
			break
		}
		if sum := s.metricsOfOneScrape("nix_dispatch_builds_in_progress", "nix_dispatch_builds_total"); sum != n {
			t.Fatalf("the metrics of one moment count %v builds, want %d", sum, n)
		}
	}
	ending.Wait()
}

// metricsOfOneScrape is the sum of all series of some metrics.
func (s *site) metricsOfOneScrape(names ...string) float64 {
	s.t.Helper()
	families, err := s.d.metrics.registry.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		for _, name := range names {
			if f.GetName() != name {
				continue
			}
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// TestWhoIsToldOfAnEndFindsItEverywhere has real callers look right after the answer,
// while another one looks all the time.
func TestWhoIsToldOfAnEndFindsItEverywhere(t *testing.T) {
	t.Parallel()
	address := freeAddress(t)
	m := oneMachine("ssh-ng")
	m.slots = 4
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, options: func(o *Options) {
		o.MetricsListen, o.PageNames = address, true
	}})
	browser := newBrowser(t, "http://"+address, "")
	stop := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			seen := sight{inProgress: inProgressOf(s.status())}
			last := uint64(0)
			for id := range seen.inProgress {
				last = max(last, id)
			}
			seen.ended = s.endedSoFar()
			if lost := seen.neither(last); len(lost) > 0 {
				t.Errorf("builds %v are neither in progress nor have they ended, though build %d is in progress", lost, last)
				return
			}
		}
	})
	for n := range 12 {
		r := s.drv(fmt.Sprintf("thing%d", n), drvConfig{})
		want := ""
		if n%3 > 0 { // some print nothing
			r.log = []string{fmt.Sprintf("line of %d", n)}
			want = r.log[0] + "\n"
		} else {
			r.log = nil
		}
		h := s.hook()
		id := h.accepted(r).GetBuildId()
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if inProgressOf(s.status())[id] {
			t.Errorf("build %d has ended, and is in progress", id)
		}
		if !s.endedSoFar()[id] {
			t.Errorf("build %d has ended, and the history lacks it", id)
		}
		for _, req := range []*dispatchv1.LogRequest{{BuildId: id}, {DrvPath: string(r.path)}, {BuildId: id, Follow: true}} {
			if text, err := s.log(req); err != nil || text != want {
				t.Errorf("build %d has ended, and its log by %v is %q, %v; want %q", id, req, text, err, want)
			}
		}
		if got := s.metric("nix_dispatch_builds_total", map[string]string{"machine": m.uri(), "result": "built"}); got != float64(n+1) {
			t.Errorf("%d builds have ended, and the metrics count %v", n+1, got)
		}
		if _, html := browser.get("/"); !strings.Contains(html, fmt.Sprintf("thing%d", n)) {
			t.Errorf("build %d has ended, and the page lacks it", id)
		}
	}
	close(stop)
	watching.Wait()
}

// TestDetachedBuildIsToldOfRightAfterItsEnd attaches to a detached build, and looks at
// it when that returns.
func TestDetachedBuildIsToldOfRightAfterItsEnd(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	s := newSite(t, m)
	for n := range 5 {
		r := s.drv(fmt.Sprintf("detached%d", n), drvConfig{})
		r.log = []string{"its log"}
		id, _ := s.detach(r)
		s.attach(id).mustSucceed(t)
		for _, b := range s.status().GetDetached() {
			if b.GetId() == id && (b.GetEnded() == nil || !b.GetSuccess() || b.GetBuilt() != 1) {
				t.Errorf("the status of a build that has ended: %v", b)
			}
		}
		if text, err := s.log(&dispatchv1.LogRequest{BuildId: id}); err != nil || text != "its log\n" {
			t.Errorf("its log: %q, %v", text, err)
		}
		stream, err := s.client.History(t.Context(), &dispatchv1.HistoryRequest{Limit: 1})
		rows, err := all(t, stream, err)
		if err != nil || len(rows) != 1 || rows[0].GetDrvPath() != string(r.path) {
			t.Errorf("the last of the history: %v, %v", rows, err)
		}
		s.attach(id).mustSucceed(t)
	}
}

// TestCallersHearOfAnEndLast holds up the moment in which callers hear of an end: by
// then everything else tells so.
func TestCallersHearOfAnEndLast(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{builders: "ssh://m1 x86_64-linux - 1"})
	b := s.d.newBuild(s.d.stores.own, s.path("x.drv"),
		&nix.Derivation{BasicDerivation: nix.BasicDerivation{Platform: "x86_64-linux"}}, false, caller{})
	b.cancel = func(error) {}
	s.d.dispatcher.mu.Lock()
	s.d.dispatcher.submitLocked(b)
	s.d.dispatcher.mu.Unlock()
	_, _ = b.feed.Write([]byte("said\n"))
	b.feed.mu.Lock()
	var ending sync.WaitGroup
	ending.Go(func() {
		s.d.conclude(b, outcome{status: dispatchv1.BuildStatus_BUILD_STATUS_BUILT, machine: "ssh://m1"})
	})
	s.eventually("it is in progress no more", func() bool { return s.metric("nix_dispatch_builds_in_progress", nil) == 0 })
	id := uint64(b.id)
	if n := s.metric("nix_dispatch_builds_total", nil); n != 1 || !s.endedSoFar()[id] {
		t.Errorf("callers are about to hear that it has ended: %v builds are counted, the history has %v", n, s.endedSoFar())
	}
	if text, err := s.logSoFar(b); err != nil || text != "said\n" {
		t.Errorf("its log: %q, %v", text, err)
	}
	b.feed.mu.Unlock()
	ending.Wait()
	if text, err := s.log(&dispatchv1.LogRequest{BuildId: id}); err != nil || text != "said\n" {
		t.Errorf("its log at last: %q, %v", text, err)
	}
}

// logSoFar reads the log of a build as Log does, without asking for its outcome.
func (s *site) logSoFar(b *build) (string, error) {
	found, done := s.d.dispatcher.read(b.id, "")
	if found == nil {
		return "", errNoLog
	}
	defer done()
	text, err := io.ReadAll(&spoolReader{s: found.feed.log})
	return string(text), err
}

// TestEndIsOneMoment has what is in progress and what has ended change together.
func TestEndIsOneMoment(t *testing.T) {
	t.Parallel()
	d, _ := bareDaemon()
	defer d.end(nil)
	d.metrics = newMetrics("")
	b := bareBuild(d, 1)
	d.metrics.mu.RLock() // which holds up the count of the builds that have ended
	var ending sync.WaitGroup
	ending.Go(func() { d.conclude(b, outcome{status: dispatchv1.BuildStatus_BUILD_STATUS_BUILT}) })
	deadline := time.Now().Add(patience)
	for held := 0; held < 100; time.Sleep(time.Millisecond) {
		if !d.dispatcher.mu.TryLock() {
			held++
			continue
		}
		held = 0
		gone := d.dispatcher.builds[b.id] == nil
		d.dispatcher.mu.Unlock()
		if gone || time.Now().After(deadline) {
			t.Error("a build is in progress no more, and is not counted among those that have ended")
			break
		}
	}
	d.metrics.mu.RUnlock()
	ending.Wait()
	d.dispatcher.remove(bareBuild(d, 2), func() {
		if d.dispatcher.mu.TryLock() {
			t.Error("what has ended changes without the mutex")
		}
	})
}
