// Package history keeps what became of finished builds, in one file that outlives
// the process: bounded by age and number, and never a reason for the daemon not to
// start.
//
// A row is written to the file some time after [DB.Add], but readers see it at once:
// they read what is in memory first and the file afterwards. A row leaves the memory
// only after it is in the file, so no reader misses it.
package history

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
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
	// Sharers are the user ids of the others who asked for it; rows of earlier versions
	// have none.
	Sharers []uint32 `json:"sharers,omitempty"`
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
	// Silent tells that the build printed nothing, so that it has no log.
	Silent bool `json:"silent,omitempty"`
}

func (r *Row) key() string { return string(key(r.Ended, r.ID)) }

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
	// maxPending is how many rows may wait for a disk that does not answer or is
	// full; of more, the oldest are dropped.
	maxPending = 10000
	// lockWait bounds waiting for another process that has the file open.
	lockWait = time.Second
	// idsAhead is how many ids the file says are in use beyond those that are. After
	// the process was killed the next one begins behind them, and gives no id again.
	idsAhead = 4096
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

	// pending are the rows that are not known to be in the file, in the order of
	// their ends. It is only ever appended to or replaced: who has read the slice may
	// go on with it without the mutex.
	pendingMu sync.Mutex
	pending   []Row
	dropped   int // rows since the last flush
	// used is the highest id of a build that is known, reserved the highest that the
	// file says is in use.
	used, reserved uint64

	last  uint64 // the highest id when the file was opened
	count int    // of rows on disk; the writer's

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
	db.last = db.used
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
			b, err := tx.CreateBucketIfNotExists(rows)
			if err != nil {
				return err
			}
			db.use(b.Sequence())
			return db.reserve(b, idsAhead)
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
