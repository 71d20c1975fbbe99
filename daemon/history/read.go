package history

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

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

// mayWant tells from a row's key and its text whether the row may be one that is
// wanted: reading the text takes far longer.
func (q *Query) mayWant(key, text []byte) bool {
	if q.ID != 0 && binary.BigEndian.Uint64(key[len(key)-8:]) != q.ID {
		return false
	}
	// A store path is the same in JSON.
	return bytes.Contains(text, []byte(q.DrvPath))
}

// batch is how many rows are read at a time: no transaction is open while the
// reader of the rows takes its time.
const batch = 256

// Each calls fn with the rows wanted, the newest first, until it returns an
// error, which Each returns. All rows that were added before the call are there,
// and each of them once.
func (db *DB) Each(q Query, fn func(Row) error) error {
	pending := db.pendingWanted(&q) // before the file is read, see the package's comment
	next := func(r Row) error {
		for len(pending) > 0 && pending[0].key() >= r.key() {
			p := pending[0]
			if pending = pending[1:]; p.key() == r.key() {
				continue // it has been written meanwhile
			}
			if err := fn(p); err != nil {
				return err
			}
		}
		return fn(r)
	}
	if err := db.eachWritten(q, next); err != nil {
		return err
	}
	for _, p := range pending {
		if err := fn(p); err != nil {
			return err
		}
	}
	return nil
}

// pendingWanted returns the pending rows that are wanted, the newest first.
func (db *DB) pendingWanted(q *Query) []Row {
	db.pendingMu.Lock()
	pending := db.pending
	db.pendingMu.Unlock()
	var wanted []Row
	for _, r := range pending {
		if q.wants(&r) && !r.Ended.Before(q.Since) {
			wanted = append(wanted, r)
		}
	}
	slices.SortStableFunc(wanted, func(a, b Row) int { return cmp.Compare(b.key(), a.key()) })
	return wanted
}

// eachWritten is Each of the rows in the file.
func (db *DB) eachWritten(q Query, fn func(Row) error) error {
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
				from = append(from[:0], k...)
				if len(k) != keyLength {
					return fmt.Errorf("%w: a key of %d bytes", errDamaged, len(k))
				}
				if !q.mayWant(k, value) {
					continue
				}
				var r Row
				if err := json.Unmarshal(value, &r); err != nil {
					return err
				}
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
