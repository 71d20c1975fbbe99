// Package history keeps what became of finished builds, in one file that outlives
// the process: bounded by age and number, and never a reason for the daemon not to
// start.
package history

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// A Row is one finished build.
type Row struct {
	ID      uint64 `json:"id"`
	DrvPath string `json:"drvPath"`
	System  string `json:"system"`
	// Caller is who asked for it first: a user's name, or what else is known of it.
	Caller string `json:"caller"`
	// UID is that of the process which did, by the kernel's word.
	UID uint32 `json:"uid"`
	// Machine is the store URI of the last machine; "" if there was none.
	Machine string `json:"machine,omitempty"`
	// Status is Nix's name of the status, such as "built".
	Status string `json:"status"`
	// Failed tells whether the outputs are missing.
	Failed   bool      `json:"failed"`
	Error    string    `json:"error,omitempty"`
	Attempts int       `json:"attempts"`
	Ended    time.Time `json:"ended"`
	// What the build spent its time with, all attempts together.
	Queued      time.Duration `json:"queuedNanoseconds"`
	Uploading   time.Duration `json:"uploadNanoseconds"`
	Building    time.Duration `json:"buildNanoseconds"`
	Downloading time.Duration `json:"downloadNanoseconds"`
	// Bytes of NARs that went to machines and came back.
	BytesSent     uint64 `json:"bytesSent"`
	BytesReceived uint64 `json:"bytesReceived"`
}

// Limits bound a [DB]. Zero fields mean the defaults.
type Limits struct {
	// MaxAge is how old a row may get. Default 90 days.
	MaxAge time.Duration
	// MaxRows is how many are kept. Default 100,000, some 50 MB.
	MaxRows int
}

const (
	// maxText bounds a row's texts, which come from derivations and machines.
	maxText = 4 << 10
	// flushInterval is how long a row may be in memory only. Each flush waits for
	// the disk.
	flushInterval = time.Second
	// maxPending is how many rows may wait for a disk that does not answer; more
	// are dropped.
	maxPending = 10000
	// lockWait bounds waiting for another process that has the file open.
	lockWait = time.Second
)

var rows = []byte("rows")

// A DB is a history in use. It is safe for concurrent use.
type DB struct {
	file   string
	limits Limits
	log    *slog.Logger

	// mu guards bolt, which changes when the file turns out to be damaged.
	mu   sync.RWMutex
	bolt *bolt.DB

	pendingMu sync.Mutex
	pending   []Row

	count int // of rows on disk; the writer's

	wake    chan struct{} // of the writer
	quit    chan struct{}
	done    chan struct{}
	closing sync.Once
}

// Open opens the history in file, or begins one. It reads the head of each page: other
// damage is found in the background, and whenever it shows. Then the file is set aside,
// under the name with ".damaged" after it, and a new one begun. The caller must
// Close the history.
func Open(file string, limits Limits, log *slog.Logger) (*DB, error) {
	limits.MaxAge = cmp.Or(limits.MaxAge, 90*24*time.Hour)
	limits.MaxRows = cmp.Or(limits.MaxRows, 100_000)
	db := &DB{
		file: file, limits: limits, log: log,
		wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}),
	}
	err := db.open()
	if err != nil && !errors.Is(err, bolterrors.ErrTimeout) && !errors.Is(err, os.ErrPermission) {
		err = db.replace(err)
	}
	if err != nil {
		return nil, fmt.Errorf("open the history of builds %q: %w", file, err)
	}
	go db.write()
	return db, nil
}

// open opens the file. The caller holds mu, or nobody else knows of db yet.
func (db *DB) open() error {
	return recovered(func() (err error) {
		db.bolt, err = bolt.Open(db.file, 0o600, &bolt.Options{Timeout: lockWait, FreelistType: bolt.FreelistMapType})
		if err != nil {
			return err
		}
		if err := db.bolt.View(checkPages); err != nil {
			return err
		}
		return db.bolt.Update(func(tx *bolt.Tx) error {
			_, err := tx.CreateBucketIfNotExists(rows)
			return err
		})
	})
}

// checkPages finds pages that claim to go on behind the end of the file. bbolt would
// note each of theirs, up to four thousand million, when it frees one.
func checkPages(tx *bolt.Tx) error {
	for id := 0; ; id++ {
		page, err := tx.Page(id)
		if page == nil || err != nil {
			return err
		}
		if page.Type == "free" {
			continue // it may hold anything
		}
		id += page.OverflowCount
		if last, err := tx.Page(id); last == nil || err != nil {
			return fmt.Errorf("%w: page %d goes on behind the end", errDamaged, page.ID)
		}
	}
}

// replace sets the file aside and begins a new one. The caller holds mu, or
// nobody else knows of db yet.
func (db *DB) replace(why error) error {
	db.log.Error("the history of builds is damaged; it is set aside and a new one begun", "file", db.file, "err", why)
	if db.bolt != nil {
		_ = recovered(db.bolt.Close) // it is of no more use
	}
	db.count = 0
	if err := os.Rename(db.file, db.file+".damaged"); err != nil {
		return fmt.Errorf("set the damaged history aside: %w", err)
	}
	return db.open()
}

// recovered calls fn. bbolt panics where a file is damaged, and faults where it
// follows a page number out of what it has mapped: for a file that was cut off.
func recovered(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	return fn()
}

var errDamaged = errors.New("damaged")

// view reads, update writes.
func (db *DB) view(fn func(*bolt.Bucket) error) error {
	db.mu.RLock()
	defer db.mu.RUnlock()
	return recovered(func() error {
		return db.bolt.View(func(tx *bolt.Tx) error { return fn(tx.Bucket(rows)) })
	})
}

func (db *DB) update(fn func(*bolt.Bucket) error) error {
	db.mu.RLock()
	defer db.mu.RUnlock()
	return recovered(func() error {
		return db.bolt.Update(func(tx *bolt.Tx) error { return fn(tx.Bucket(rows)) })
	})
}

// check reads through all rows and counts them.
func (db *DB) check() {
	count := 0
	err := db.view(func(b *bolt.Bucket) error {
		count = 0
		return b.ForEach(func(_, value []byte) error {
			if count++; !json.Valid(value) {
				return errDamaged
			}
			return nil
		})
	})
	db.count = count
	if err != nil {
		db.damaged(err)
	}
}

// damaged begins a new file after an error that tells of damage.
func (db *DB) damaged(why error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	if err := db.replace(why); err != nil {
		db.log.Error("no history of builds is kept", "err", err)
	}
}

// Close writes what is not written yet and closes the file. It may be called more
// than once.
func (db *DB) Close() error {
	db.closing.Do(func() { close(db.quit) })
	<-db.done
	db.mu.Lock()
	defer db.mu.Unlock()
	return db.bolt.Close()
}

// Add adds a row, soon. It never waits for the disk.
func (db *DB) Add(r Row) {
	r.Error = clip(r.Error)
	r.DrvPath, r.System, r.Machine, r.Caller = clip(r.DrvPath), clip(r.System), clip(r.Machine), clip(r.Caller)
	db.pendingMu.Lock()
	defer db.pendingMu.Unlock()
	if len(db.pending) >= maxPending {
		return
	}
	db.pending = append(db.pending, r)
	select {
	case db.wake <- struct{}{}:
	default:
	}
}

func clip(s string) string {
	if len(s) <= maxText {
		return s
	}
	return strings.ToValidUTF8(s[:maxText], "") + "..."
}

// write is the one goroutine that writes.
func (db *DB) write() {
	defer close(db.done)
	db.check()
	for {
		select {
		case <-db.wake:
		case <-db.quit:
			db.flush()
			return
		}
		select {
		case <-time.After(flushInterval):
		case <-db.quit:
		}
		db.flush()
	}
}

func (db *DB) flush() {
	db.pendingMu.Lock()
	pending := db.pending
	db.pending = nil
	db.pendingMu.Unlock()
	if len(pending) == 0 {
		return
	}
	err := db.put(pending)
	if errors.Is(err, errDamaged) {
		db.damaged(err)
		err = db.put(pending)
	}
	if err != nil {
		db.log.Error("finished builds are missing in the history", "builds", len(pending), "err", err)
	}
}

func (db *DB) put(pending []Row) error {
	count := db.count
	err := db.update(func(b *bolt.Bucket) error {
		last := b.Sequence()
		for _, r := range pending {
			last = max(last, r.ID)
			value, err := json.Marshal(r)
			if err != nil {
				return err
			}
			if err := b.Put(key(r.Ended, r.ID), value); err != nil {
				return err
			}
		}
		count = db.count + len(pending)
		return errors.Join(b.SetSequence(last), db.prune(b, &count))
	})
	if err == nil {
		db.count = count
	}
	return err
}

// prune removes the oldest rows that are beyond a limit.
func (db *DB) prune(bucket *bolt.Bucket, count *int) error {
	oldest := key(time.Now().Add(-db.limits.MaxAge), 0)
	c := bucket.Cursor()
	for {
		// A cursor may not go on from what it has deleted.
		k, _ := c.First()
		if k == nil || *count <= db.limits.MaxRows && bytes.Compare(k, oldest) >= 0 {
			return nil
		}
		if err := c.Delete(); err != nil {
			return err
		}
		*count--
	}
}

// key sorts rows by when they ended.
func key(ended time.Time, id uint64) []byte {
	k := binary.BigEndian.AppendUint64(nil, uint64(ended.UnixNano())) //nolint:gosec // after 1970
	return binary.BigEndian.AppendUint64(k, id)
}

// A Query says which rows are wanted. The zero value wants all.
type Query struct {
	Since   time.Time // that ended then or later
	Failed  bool      // only those that failed
	Machine string    // only those of this machine, by store URI
	DrvPath string    // only those of this derivation
	ID      uint64    // only this one
}

func (q *Query) wants(r *Row) bool {
	return (!q.Failed || r.Failed) && (q.Machine == "" || q.Machine == r.Machine) &&
		(q.DrvPath == "" || q.DrvPath == r.DrvPath) && (q.ID == 0 || q.ID == r.ID)
}

// batch is how many rows are read at a time: no transaction is open while the
// reader of the rows takes its time.
const batch = 256

// Each calls fn with the rows wanted, the newest first, until it returns an
// error, which Each returns. Rows of the last second may be missing.
func (db *DB) Each(q Query, fn func(Row) error) error {
	var oldest []byte
	if !q.Since.IsZero() {
		oldest = key(q.Since, 0)
	}
	var from []byte // the last key read; nil before the first
	for {
		var found []Row
		more := false
		err := db.view(func(b *bolt.Bucket) error {
			c := b.Cursor()
			k, value := c.Last()
			if from != nil {
				if k, _ = c.Seek(from); k == nil {
					k, value = c.Last()
				} else {
					k, value = c.Prev()
				}
			}
			for ; k != nil && bytes.Compare(k, oldest) >= 0; k, value = c.Prev() {
				var r Row
				if err := json.Unmarshal(value, &r); err != nil {
					return err
				}
				from = append(from[:0], k...)
				if q.wants(&r) {
					found = append(found, r)
				}
				if more = len(found) == batch; more {
					break
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("read the history of builds: %w", err)
		}
		for _, r := range found {
			if err := fn(r); err != nil {
				return err
			}
		}
		if !more {
			return nil
		}
	}
}

// LastID is the highest id that a row has ever had, 0 without rows.
func (db *DB) LastID() (last uint64, err error) {
	err = db.view(func(b *bolt.Bucket) error {
		last = b.Sequence()
		return nil
	})
	return last, err
}
