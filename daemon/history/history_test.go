package history

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var quiet = slog.New(slog.DiscardHandler)

func open(t *testing.T, file string, limits Limits) *DB {
	t.Helper()
	db, err := Open(file, limits, quiet)
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// row is a build that ended so many seconds ago.
func row(id uint64, ago int) Row {
	return Row{ID: id, DrvPath: fmt.Sprintf("/nix/store/%d.drv", id), System: "x86_64-linux", Caller: "uid 0",
		Machine: "ssh://mac", Status: "built", Attempts: 1, Ended: time.Now().Add(-time.Duration(ago) * time.Second).UTC().Truncate(time.Second),
		Queued: time.Second, Building: 2 * time.Second, BytesSent: 3, BytesReceived: 4}
}

// stored closes and opens the history again, so that all is on disk.
func stored(t *testing.T, db *DB, file string, limits Limits) *DB {
	t.Helper()
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = open(t, file, limits)
	t.Cleanup(func() { db.Close() })
	return db
}

func ids(t *testing.T, db *DB, q Query) []uint64 {
	t.Helper()
	var got []uint64
	if err := db.Each(q, func(r Row) error { got = append(got, r.ID); return nil }); err != nil {
		t.Fatal(err)
	}
	return got
}

func TestHistoryKeepsRows(t *testing.T) {
	file := filepath.Join(t.TempDir(), "history.db")
	db := open(t, file, Limits{})
	want := []Row{row(4, 10), row(3, 20), row(2, 30), row(1, 40)}
	want[1].Failed, want[1].Status, want[1].Error = true, "permanent failure", "exit code 1"
	want[2].Machine = "ssh://kitty"
	for i := range want {
		db.Add(want[len(want)-1-i])
	}
	db = stored(t, db, file, Limits{})
	var got []Row
	if err := db.Each(Query{}, func(r Row) error { got = append(got, r); return nil }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rows, newest first (-want +got):\n%s", diff)
	}
	for name, tt := range map[string]struct {
		q    Query
		want []uint64
	}{
		"failed":       {Query{Failed: true}, []uint64{3}},
		"machine":      {Query{Machine: "ssh://kitty"}, []uint64{2}},
		"derivation":   {Query{DrvPath: "/nix/store/4.drv"}, []uint64{4}},
		"id":           {Query{ID: 1}, []uint64{1}},
		"since":        {Query{Since: time.Now().Add(-25 * time.Second)}, []uint64{4, 3}},
		"none of them": {Query{Machine: "ssh://kitty", Failed: true}, nil},
	} {
		if diff := cmp.Diff(tt.want, ids(t, db, tt.q)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if last := db.LastID(); last != 4 {
		t.Errorf("last id = %d", last)
	}
}

func TestHistoryIsBounded(t *testing.T) {
	file := filepath.Join(t.TempDir(), "history.db")
	limits := Limits{MaxRows: 5, MaxAge: 100 * time.Second}
	db := open(t, file, limits)
	for id := range uint64(10) {
		db.Add(row(id+1, 50-int(id)))
	}
	db.Add(row(99, 1000)) // too old
	db = stored(t, db, file, limits)
	if diff := cmp.Diff([]uint64{10, 9, 8, 7, 6}, ids(t, db, Query{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	long := row(11, 0)
	long.Error = strings.Repeat("ü", 1<<20)
	db.Add(long)
	db = stored(t, db, file, limits)
	if err := db.Each(Query{ID: 11}, func(r Row) error {
		if len(r.Error) > maxText+3 || !strings.HasPrefix(r.Error, "üü") {
			t.Errorf("an error of %d bytes is kept", len(r.Error))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]uint64{11, 10, 9, 8, 7}, ids(t, db, Query{})); diff != "" {
		t.Errorf("after one more (-want +got):\n%s", diff)
	}
}

func TestHistoryOfManyRowsIsReadInParts(t *testing.T) {
	file := filepath.Join(t.TempDir(), "history.db")
	db := open(t, file, Limits{})
	const n = 3*batch + 7
	for id := range uint64(n) {
		db.Add(row(id+1, int(n-id)))
	}
	db = stored(t, db, file, Limits{})
	got := ids(t, db, Query{})
	if len(got) != n || got[0] != n || got[n-1] != 1 {
		t.Fatalf("%d rows from %d to %d, want %d", len(got), got[0], got[len(got)-1], n)
	}
	// A reader may write: no transaction is open meanwhile.
	stop := errors.New("enough")
	seen := 0
	err := db.Each(Query{}, func(Row) error {
		if seen++; seen == batch+1 {
			return stop
		}
		return nil
	})
	if !errors.Is(err, stop) || seen != batch+1 {
		t.Errorf("Each = %v after %d rows", err, seen)
	}
}

func TestDamagedHistoryIsSetAside(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, file string){
		"not a database": func(t *testing.T, file string) { write(t, file, []byte(strings.Repeat("garbage", 10000))) },
		"empty":          func(t *testing.T, file string) { write(t, file, []byte("x")) },
		"overwritten": func(t *testing.T, file string) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for i := 16 << 10; i < len(data); i++ {
				data[i] ^= 0x5a
			}
			write(t, file, data)
		},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "history.db")
			db := open(t, file, Limits{})
			for id := range uint64(500) {
				db.Add(row(id+1, 0))
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			damage(t, file)
			db = open(t, file, Limits{})
			db.Add(row(1000, 0))
			db = stored(t, db, file, Limits{})
			if diff := cmp.Diff([]uint64{1000}, ids(t, db, Query{})); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if _, err := os.Stat(file + ".damaged"); err != nil {
				t.Errorf("the damaged file is gone: %v", err)
			}
		})
	}
}

// A damaged length of a page would make bbolt count four thousand million pages.
func TestHistoryWithEndlessPagesIsSetAside(t *testing.T) {
	const pageSize, overflow = 4096, 12 // where a page's head has how many pages it goes on
	file := filepath.Join(t.TempDir(), "history.db")
	db := open(t, file, Limits{})
	for id := range uint64(200) {
		db.Add(row(id+1, 0))
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	aside := 0
	for page := 2; page < len(whole)/pageSize; page++ { // after the two that have a checksum
		damaged := slices.Clone(whole)
		binary.LittleEndian.PutUint32(damaged[page*pageSize+overflow:], 1<<32-1)
		write(t, file, damaged)
		db := open(t, file, Limits{})
		db.Add(row(1000, 0))
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if os.Remove(file+".damaged") == nil {
			aside++
		}
	}
	if aside == 0 {
		t.Error("no file was set aside")
	}
}

// bbolt maps the file: following a page number behind its end is a fault, which
// would end the process. Where the pages are depends on when they were written.
func TestHistoryCutOffAnywhereIsSetAside(t *testing.T) {
	file := filepath.Join(t.TempDir(), "history.db")
	db := open(t, file, Limits{})
	for id := range uint64(200) {
		db.Add(row(id+1, 0))
		if id%10 == 0 {
			db = stored(t, db, file, Limits{})
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if len(whole) < 64<<10 {
		t.Fatalf("the history has %d bytes, too few to cut", len(whole))
	}
	for size := 4000; size < len(whole); size += 4 << 10 {
		write(t, file, whole[:size])
		db := open(t, file, Limits{})
		db.Add(row(1000, 0))
		db = stored(t, db, file, Limits{})
		if got := ids(t, db, Query{ID: 1000}); len(got) != 1 {
			t.Errorf("cut to %d bytes: a new row was not kept", size)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func write(t *testing.T, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestHistoryInUseElsewhereIsLeftAlone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "history.db")
	db := open(t, file, Limits{})
	defer db.Close()
	if _, err := Open(file, Limits{}, quiet); err == nil {
		t.Error("a second process opened it")
	}
	if _, err := os.Stat(file + ".damaged"); err == nil {
		t.Error("a history in use was set aside")
	}
}
