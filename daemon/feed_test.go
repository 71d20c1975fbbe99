package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

func TestSpoolGivesBackWhatWasWritten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := newSpool(dir)
	defer s.close()
	rnd := rand.New(rand.NewPCG(1, 2))
	var want []byte
	for len(want) < 5*spoolMemory {
		p := make([]byte, rnd.IntN(20000))
		for n := range p {
			p[n] = byte(rnd.Uint32())
		}
		if n, err := s.Write(p); n != len(p) || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
		want = append(want, p...)
	}
	if s.length() != int64(len(want)) || s.lost() != nil || s.lastWrite().IsZero() {
		t.Errorf("length %d, lost %v, last write %v; want %d bytes", s.length(), s.lost(), s.lastWrite(), len(want))
	}
	if len(s.head) > spoolMemory {
		t.Errorf("%d bytes in memory, want at most %d", len(s.head), spoolMemory)
	}
	if files, _ := os.ReadDir(dir); len(files) != 0 {
		t.Errorf("the file has a name: %v", files)
	}
	for _, step := range []int{1000, logChunk, len(want)} {
		got, p := []byte(nil), make([]byte, step)
		for {
			n, err := s.readAt(p, int64(len(got)))
			if err != nil {
				t.Fatal(err)
			}
			if n == 0 {
				break
			}
			got = append(got, p[:n]...)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("read in steps of %d: %d bytes that differ from the %d written", step, len(got), len(want))
		}
	}
}

func TestSpoolOnAFullDisk(t *testing.T) {
	t.Parallel()
	s := newSpool(filepath.Join(t.TempDir(), "missing"))
	defer s.close()
	p := bytes.Repeat([]byte("x"), spoolMemory+10)
	for range 2 {
		if n, err := s.Write(p); n != len(p) || err != nil {
			t.Errorf("Write = %d, %v; a build must go on", n, err)
		}
	}
	if s.length() != spoolMemory || s.lost() == nil {
		t.Errorf("length %d, lost %v; want what fits into memory and why the rest is gone", s.length(), s.lost())
	}
	if n, err := s.readAt(p, spoolMemory-5); n != 5 || err != nil {
		t.Errorf("readAt the end = %d, %v; want 5", n, err)
	}
}

func TestSpoolIsBounded(t *testing.T) {
	t.Parallel()
	s := newSpool(t.TempDir())
	s.limit = spoolMemory + 1000
	defer s.close()
	p := bytes.Repeat([]byte("x"), spoolMemory/2)
	for range 4 {
		if n, err := s.Write(p); n != len(p) || err != nil {
			t.Errorf("Write = %d, %v; a build must go on", n, err)
		}
	}
	if s.length() != s.limit || s.lost() == nil {
		t.Errorf("length %d, lost %v; want %d and why the rest is gone", s.length(), s.lost(), s.limit)
	}
}

// follows runs a follower whose send is given.
func follows(f *feed, send func(*dispatchv1.BuildEvent) error) (outcome, error) {
	follower := &follower{b: &build{feed: f, drv: &nix.Derivation{}}}
	return follower.follow(context.Background(), send, nil)
}

func TestFollowersReadAtTheirOwnPace(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		f := newFeed(dir)
		defer f.log.close()
		b := &build{id: 3, feed: f}
		var followers sync.WaitGroup
		paces := []time.Duration{0, time.Millisecond, time.Minute}
		stories := make([]story, len(paces))
		progress := make([]int, len(paces))
		ended := make([]time.Duration, len(paces))
		start := time.Now()
		for n, pace := range paces {
			followers.Go(func() {
				o, err := follows(f, func(e *dispatchv1.BuildEvent) error {
					time.Sleep(pace)
					if e.GetCopying() != nil {
						progress[n]++
						return nil
					}
					stories[n].tell(e)
					return nil
				})
				ended[n] = time.Since(start)
				if err != nil || o.machine != "ssh://m" {
					t.Errorf("follower %d ended with %v, %v", n, o, err)
				}
			})
		}
		// The build never waits: no time passes but its own.
		var want strings.Builder
		b.postPlaced(placement{machine: "ssh://m"})
		for n := range 1000 {
			b.feed.postProgress(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Copying{
				Copying: &dispatchv1.Copying{Transfer: &dispatchv1.Transfer{BytesDone: uint64(n)}}}})
			fmt.Fprintf(&want, "%d %s\n", n, strings.Repeat("x", 500))
			fmt.Fprintf(f, "%d %s\n", n, strings.Repeat("x", 500))
			time.Sleep(time.Millisecond)
		}
		f.post(&dispatchv1.BuildEvent{Event: &dispatchv1.BuildEvent_Building{Building: &dispatchv1.Building{}}})
		f.finish(outcome{machine: "ssh://m"})
		if took := time.Since(start); took != time.Second {
			t.Errorf("the build took %v, want 1s: a follower held it up", took)
		}
		followers.Wait()
		for n := range paces {
			if stories[n].log != want.String() {
				t.Errorf("follower %d has a log of %d bytes, want %d", n, len(stories[n].log), want.Len())
			}
			if got := len(stories[n].events); got != 2 {
				t.Errorf("follower %d got %d events, want Placed and Building", n, got)
			}
		}
		if progress[2] > 3 || progress[0] < 500 {
			t.Errorf("progress told %v times, want the slow one to be told only the newest", progress)
		}
		if ended[0] > 2*time.Second {
			t.Errorf("the fast follower took %v: the slow one held it up", ended[0])
		}
	})
}

func TestFollowerThatFailsLeavesAlone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFeed("")
		gone := errors.New("gone")
		f.post(&dispatchv1.BuildEvent{})
		if _, err := follows(f, func(*dispatchv1.BuildEvent) error { return gone }); !errors.Is(err, gone) {
			t.Errorf("follow = %v, want %v", err, gone)
		}
		f.finish(outcome{})
		if _, err := follows(f, func(*dispatchv1.BuildEvent) error { return nil }); err != nil {
			t.Errorf("follow of another = %v", err)
		}
	})
}

func TestEventsComeInOrderAndProgressOfAPhaseEndsWithIt(t *testing.T) {
	t.Parallel()
	f := newFeed("")
	event := func(id uint64) *dispatchv1.BuildEvent { return &dispatchv1.BuildEvent{BuildId: id} }
	var c cursor
	ids := func(r reading) (ids []uint64) {
		for _, e := range r.events {
			ids = append(ids, e.GetBuildId())
		}
		return append(ids, r.progress.GetBuildId())
	}
	f.post(event(1))
	f.postProgress(event(2))
	f.postProgress(event(3))
	if diff := cmp.Diff([]uint64{1, 3}, ids(f.read(&c))); diff != "" {
		t.Errorf("first reading (-want +got):\n%s", diff)
	}
	f.postProgress(event(4))
	f.post(event(5))
	f.post(event(6))
	if diff := cmp.Diff([]uint64{5, 6, 0}, ids(f.read(&c))); diff != "" {
		t.Errorf("second reading (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]uint64{0}, ids(f.read(&c))); diff != "" {
		t.Errorf("third reading (-want +got):\n%s", diff)
	}
}

// TestClientThatDoesNotRead has a real stream whose windows are full.
func TestClientThatDoesNotRead(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		line := strings.Repeat("log ", 1024)
		const lines = 750 // 3 MiB, more than all windows and the spool's memory
		m.build = func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult {
			for range lines {
				req.Log(line)
			}
			return m.site.recipe(req.DrvPath).build(m.store, req)
		}
		s := newSite(t, m)
		r := s.drv("chatty", drvConfig{})
		r.log = []string{"the end"}
		slow, quick := s.hook(), s.hook()
		slow.accepted(r)
		quick.accepted(r)
		// The slow one frees its locks unasked, or the import would wait for it.
		slow.say(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_HandedOver{HandedOver: &dispatchv1.HandedOver{}}})
		want := strings.Repeat(line+"\n", lines) + "the end\n"
		st := quick.finish()
		st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if st.log != want {
			t.Errorf("the quick one has a log of %d bytes, want %d", len(st.log), len(want))
		}
		s.idle() // the build is over
		st = slow.finish()
		st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if st.log != want {
			t.Errorf("the slow one has a log of %d bytes, want %d", len(st.log), len(want))
		}
	})
}
