package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"nixdispatch/daemon/history"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
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

// TestWhoEndsABuildFindsItEnded looks right after a limit was passed, or a
// cancellation.
func TestWhoEndsABuildFindsItEnded(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	m.build = untilGone
	s := newSite(t, m)
	check := func(what string, id uint64) {
		t.Helper()
		if inProgressOf(s.status())[id] || !s.endedSoFar()[id] {
			t.Errorf("build %d, %s: in progress %v, ended %v", id, what, s.status().GetBuilds(), s.endedSoFar())
		}
	}
	for n := range 3 {
		h := s.hook(func(h *dispatchv1.Hello) {
			h.Limits = &dispatchv1.Limits{Timeout: durationpb.New(50 * time.Millisecond)}
		})
		id := h.accepted(s.drv(fmt.Sprintf("slow%d", n), drvConfig{})).GetBuildId()
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT)
		check("which passed its limit", id)

		h = s.hook()
		id = h.accepted(s.drv(fmt.Sprintf("unwanted%d", n), drvConfig{})).GetBuildId()
		if _, err := s.client.Cancel(t.Context(), &dispatchv1.CancelRequest{BuildId: id}); err != nil {
			t.Fatal(err)
		}
		check("which was cancelled", id)
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_CANCELLED)

		id, _ = s.detach(s.drv(fmt.Sprintf("detached%d", n), drvConfig{}))
		if _, err := s.client.Cancel(t.Context(), &dispatchv1.CancelRequest{BuildId: id}); err != nil {
			t.Fatal(err)
		}
		for _, b := range s.status().GetDetached() {
			if b.GetId() == id && b.GetEnded() == nil {
				t.Errorf("detached build %d, which was cancelled, is in progress", id)
			}
		}
	}
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

// TestLogIsReadWhileItIsKept reads the log of a build that has ended before its file
// is there, and after.
func TestLogIsReadWhileItIsKept(t *testing.T) {
	t.Parallel()
	d, _ := bareDaemon()
	defer d.end(nil)
	b, other := bareBuild(d, 1), bareBuild(d, 1)
	d.dispatcher.remove(other, func() {})
	d.dispatcher.remove(b, func() {})
	for _, id := range []scheduler.BuildID{b.id, 0} {
		got, done := d.dispatcher.read(id, b.drvPath)
		if want := max(b.id, other.id); got == nil || id != 0 && got != b || id == 0 && got.id != want {
			t.Fatalf("read(%d) = %v, want a build that has ended", id, got)
		}
		done()
	}
	d.dispatcher.ended(b)
	d.dispatcher.ended(other)
	if got, _ := d.dispatcher.read(b.id, b.drvPath); got != nil {
		t.Error("a build whose log is kept is read from memory")
	}
}

// TestKeptLogsAreBoundedByNumber keeps many logs that say little.
func TestKeptLogsAreBoundedByNumber(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for id := 1; id <= maxKeptFiles+50; id++ {
		writeFile(t, filepath.Join(dir, fmt.Sprintf("%d-0", id)), "little")
	}
	k, err := openKeptLogs(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	short := newSpool(t.TempDir())
	_, _ = short.Write([]byte("little"))
	k.keep(maxKeptFiles+51, 0, short)
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != maxKeptFiles || k.room != maxKeptFiles*fileBlock {
		t.Errorf("%d logs take %d bytes, %v; want %d of a block each", len(files), k.room, err, maxKeptFiles)
	}
	for id, want := range map[uint64]bool{51: false, 52: true, maxKeptFiles + 51: true} {
		f, err := k.open(id, caller{})
		if (err == nil) != want {
			t.Errorf("log %d: %v, want it kept: %v", id, err, want)
		}
		if err == nil {
			f.Close()
		}
	}
}

// TestWhoMayReadALogThatIsEmpty asks for logs that have no file.
func TestWhoMayReadALogThatIsEmpty(t *testing.T) {
	t.Parallel()
	const owner, stranger = 4711, 4712
	s := newSiteWith(t, siteConfig{})
	s.d.record.rows.Add(history.Row{ID: 900, UID: owner, Silent: true, Ended: time.Now()})
	s.d.record.rows.Add(history.Row{ID: 901, UID: owner, Ended: time.Now()}) // its log has been removed
	for _, tt := range []struct {
		id   uint64
		by   uint32
		want error
	}{{900, 0, nil}, {900, owner, nil}, {900, stranger, errNotYours}, {901, owner, errNoLog}, {902, owner, errNoLog}} {
		text, err := s.d.record.openLog(tt.id, caller{uid: tt.by})
		if !errors.Is(err, tt.want) {
			t.Errorf("the log of build %d, asked for by %d: %v, want %v", tt.id, tt.by, err, tt.want)
		}
		if err == nil {
			text.Close()
		}
	}
}
