package daemon

import (
	"errors"
	"log/slog"
	"os"
	"testing"
	"time"

	"nixdispatch/daemon/history"
	"nixdispatch/scheduler"
)

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
	k, err := openKeptLogs(dir, slog.New(slog.DiscardHandler))
	if err != nil || k.most != maxKeptFiles {
		t.Fatalf("%d logs are kept at most, %v", k.most, err)
	}
	const most = 20
	k.most = most
	short := newSpool(t.TempDir())
	_, _ = short.Write([]byte("little"))
	for id := range scheduler.BuildID(most + 5) {
		k.keep(id+1, owners{0}, short)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != most || k.room != most*fileBlock {
		t.Errorf("%d logs take %d bytes, %v; want %d of a block each", len(files), k.room, err, most)
	}
	for id, want := range map[uint64]bool{5: false, 6: true, most + 5: true} {
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
