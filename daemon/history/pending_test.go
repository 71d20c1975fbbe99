package history

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// unwritten opens a history that writes only when the test flushes it.
func unwritten(t *testing.T) *DB {
	t.Helper()
	db := &DB{
		file: filepath.Join(t.TempDir(), "history.db"), limits: Limits{MaxRows: 100_000, MaxAge: time.Hour}, log: quiet,
		wake: make(chan struct{}, 1),
	}
	if err := db.open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.bolt.Close() })
	return db
}

func TestRowsAreReadBeforeTheyAreWritten(t *testing.T) {
	t.Parallel()
	db := unwritten(t)
	db.Add(row(1, 50))
	db.Add(row(4, 20))
	db.flush(0)
	failed, elsewhere := row(2, 40), row(3, 30)
	failed.Failed, elsewhere.Machine = true, "ssh://kitty"
	for _, r := range []Row{failed, row(5, 10), elsewhere} { // not in the order of their ends
		db.Add(r)
	}
	for name, tt := range map[string]struct {
		q    Query
		want []uint64
	}{
		"all":        {Query{}, []uint64{5, 4, 3, 2, 1}},
		"failed":     {Query{Failed: true}, []uint64{2}},
		"machine":    {Query{Machine: "ssh://kitty"}, []uint64{3}},
		"derivation": {Query{DrvPath: "/nix/store/5.drv"}, []uint64{5}},
		"id":         {Query{ID: 5}, []uint64{5}},
		"written id": {Query{ID: 1}, []uint64{1}},
		"since":      {Query{Since: time.Now().Add(-35 * time.Second)}, []uint64{5, 4, 3}},
	} {
		if diff := cmp.Diff(tt.want, ids(t, db, tt.q)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	enough := errors.New("enough")
	if err := db.Each(Query{}, func(Row) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("Each = %v, want the error of its function", err)
	}
}

// TestReadersMissNoRowThatIsBeingWritten reads while rows are added and written.
func TestReadersMissNoRowThatIsBeingWritten(t *testing.T) {
	t.Parallel()
	db := unwritten(t)
	const n = 400
	var added sync.Mutex // held while last changes
	last := uint64(0)
	var work sync.WaitGroup
	stop := make(chan struct{})
	work.Go(func() {
		for id := range uint64(n) {
			r := row(id+1, 0)
			r.Ended = time.Now()
			db.Add(r)
			added.Lock()
			last = id + 1
			added.Unlock()
		}
	})
	work.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				db.flush(0)
			}
		}
	})
	for least := uint64(0); least < n; {
		added.Lock()
		least = last
		added.Unlock()
		got := ids(t, db, Query{})
		slices.Reverse(got)
		for i, id := range got {
			if id != uint64(i)+1 {
				t.Fatalf("row %d is at place %d", id, i)
			}
		}
		if uint64(len(got)) < least {
			t.Fatalf("%d rows, want the %d that had been added", len(got), least)
		}
	}
	close(stop)
	work.Wait()
	db.flush(0)
	if len(db.pending) > 0 {
		t.Errorf("%d rows are in memory though they are written", len(db.pending))
	}
}

// TestRowsOfADiskThatDoesNotTakeThem are read as if they were written, and written
// once it does.
func TestRowsOfADiskThatDoesNotTakeThem(t *testing.T) {
	t.Parallel()
	db := unwritten(t)
	db.Add(row(1, 2))
	_ = db.bolt.Close()
	db.flush(0)
	if err := db.open(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]uint64{1}, ids(t, db, Query{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	db.flush(0)
	if len(db.pending) > 0 {
		t.Error("the row is not written")
	}
	for id := range uint64(maxPending) + 2 {
		db.Add(row(id+2, 0))
	}
	if len(db.pending) != maxPending || db.pending[maxPending-1].ID != maxPending+3 || db.dropped != 2 {
		t.Errorf("%d rows wait, %d were dropped; want the last %d", len(db.pending), db.dropped, maxPending)
	}
}

// TestIDsOfAKilledProcess looks at the file as a process that was killed leaves it.
func TestIDsOfAKilledProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "history.db")
	db := open(t, file, Limits{})
	for id := range uint64(10) {
		db.Use(id + 1)
	}
	left, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	killed := filepath.Join(dir, "killed.db")
	write(t, killed, left)
	next := open(t, killed, Limits{})
	if last := next.LastID(); last < 10 {
		t.Errorf("the next process takes %d for the last id, want 10 at least", last)
	}
	// One that ends by itself leaves no gap.
	db, next = stored(t, db, file, Limits{}), stored(t, next, killed, Limits{})
	if last := db.LastID(); last != 10 {
		t.Errorf("last id = %d, want 10", last)
	}
	begin := next.LastID()
	next.Use(begin + idsAhead)
	deadline := time.Now().Add(time.Minute)
	for {
		next.pendingMu.Lock()
		reserved := next.reserved
		next.pendingMu.Unlock()
		if reserved > begin+idsAhead {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("ids up to %d are in use and up to %d written down as such", begin+idsAhead, reserved)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
