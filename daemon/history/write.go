package history

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Add adds a row. Readers see it when Add returns; it is written to the file within
// a second or so. Add never waits for the disk.
func (db *DB) Add(r Row) {
	r.Error = clip(r.Error)
	r.DrvPath, r.System, r.Machine, r.Caller = clip(r.DrvPath), clip(r.System), clip(r.Machine), clip(r.Caller)
	r.Ended = r.Ended.Round(0)
	db.use(r.ID)
	db.pendingMu.Lock()
	defer db.pendingMu.Unlock()
	if len(db.pending) >= maxPending {
		db.pending = db.pending[1:]
		db.dropped++
	}
	db.pending = append(db.pending, r)
	db.wakeWriter()
}

func (db *DB) wakeWriter() {
	select {
	case db.wake <- struct{}{}:
	default: // it is awake
	}
}

// Use notes that a build has got an id, so that no build gets it again, whatever
// ends the process. It never waits for the disk.
func (db *DB) Use(id uint64) {
	db.use(id)
	db.pendingMu.Lock()
	defer db.pendingMu.Unlock()
	if db.used+idsAhead/2 > db.reserved {
		db.wakeWriter()
	}
}

func (db *DB) use(id uint64) {
	db.pendingMu.Lock()
	defer db.pendingMu.Unlock()
	db.used = max(db.used, id)
}

// reserve writes down that the ids in use are, and as many more.
func (db *DB) reserve(b *bolt.Bucket, more uint64) error {
	db.pendingMu.Lock()
	reserved := db.used + more
	db.pendingMu.Unlock()
	b.Tx().OnCommit(func() {
		db.pendingMu.Lock()
		defer db.pendingMu.Unlock()
		db.reserved = reserved
	})
	return b.SetSequence(reserved)
}

// LastID is the highest id that a build may have had before the file was opened; 0
// for a new file.
func (db *DB) LastID() uint64 { return db.last }

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
			db.flush(0)
			return
		}
		select {
		case <-time.After(flushInterval):
		case <-db.quit:
		}
		db.flush(idsAhead)
	}
}

// flush writes the pending rows, and that as many more ids are in use than are.
// Rows that cannot be written stay pending until the next flush.
func (db *DB) flush(moreIDs uint64) {
	db.pendingMu.Lock()
	pending, dropped := db.pending, db.dropped
	db.dropped = 0
	db.pendingMu.Unlock()
	if dropped > 0 {
		db.log.Error("finished builds are missing in the history: too many wait for the disk", "builds", dropped)
	}
	err := db.put(pending, moreIDs)
	if errors.Is(err, errDamaged) {
		db.damaged(err)
		err = db.put(pending, moreIDs)
	}
	if err != nil {
		db.log.Error("finished builds are not written to the history yet", "builds", len(pending), "err", err)
		return
	}
	db.written(pending)
}

// written takes rows that are in the file out of the pending ones. They were the
// first of these, and Add may have dropped some meanwhile.
func (db *DB) written(rows []Row) {
	if len(rows) == 0 {
		return
	}
	db.pendingMu.Lock()
	defer db.pendingMu.Unlock()
	last := rows[len(rows)-1].ID
	n := 1 + slices.IndexFunc(db.pending, func(r Row) bool { return r.ID == last })
	db.dropped -= len(rows) - n
	db.pending = slices.Clone(db.pending[n:]) // a copy lets go of what is written
}

func (db *DB) put(pending []Row, moreIDs uint64) error {
	count := db.count
	err := db.update(func(b *bolt.Bucket) error {
		for _, r := range pending {
			value, err := json.Marshal(r)
			if err != nil {
				return err
			}
			if err := b.Put(key(r.Ended, r.ID), value); err != nil {
				return err
			}
		}
		count = db.count + len(pending)
		return errors.Join(db.reserve(b, moreIDs), db.prune(b, &count))
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

// keyLength is the length of a key, in bytes.
const keyLength = 16

// key sorts rows by when they ended.
func key(ended time.Time, id uint64) []byte {
	k := binary.BigEndian.AppendUint64(nil, uint64(ended.UnixNano())) //nolint:gosec // after 1970
	return binary.BigEndian.AppendUint64(k, id)
}
