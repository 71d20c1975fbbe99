package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"nixdispatch/scheduler"
)

const (
	// maxKeptLog bounds one log that is kept: of a longer one, its end.
	maxKeptLog = 16 << 20
	// maxKeptLogs bounds the room that all of them take on the disk, in bytes, and
	// maxKeptFiles their number; the oldest go first.
	maxKeptLogs  = 512 << 20
	maxKeptFiles = 10_000
	// fileBlock is what a file takes on the disk at least, in bytes.
	fileBlock = 4 << 10
)

// keptLogs are the logs of builds that have ended, each in a file named by the
// build's id and the user ids of those who asked for it. Safe for concurrent use.
type keptLogs struct {
	dir  string
	log  *slog.Logger
	most int // maxKeptFiles, but in tests

	mu    sync.Mutex
	byID  map[uint64]keptLog
	order []uint64 // the ids, the oldest first
	room  int64    // that all of them take, in bytes
}

type keptLog struct {
	id   uint64
	of   owners
	size int64
}

func (l keptLog) name() string { return fmt.Sprintf("%d-%s", l.id, l.of) }

// room is what the file takes on the disk, in bytes: whole blocks.
func (l keptLog) room() int64 { return (l.size + fileBlock - 1) / fileBlock * fileBlock }

// parseKeptLog reads a file's name.
func parseKeptLog(name string) (l keptLog, ok bool) {
	id, of, _ := strings.Cut(name, "-")
	var err, ofErr error
	l.id, err = strconv.ParseUint(id, 10, 64)
	l.of, ofErr = parseOwners(of)
	return l, err == nil && ofErr == nil && l.name() == name
}

// openKeptLogs finds the logs that are kept in dir.
func openKeptLogs(dir string, log *slog.Logger) (*keptLogs, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	k := &keptLogs{dir: dir, log: log, most: maxKeptFiles, byID: make(map[uint64]keptLog)}
	var found []keptLog
	for _, e := range entries {
		l, ok := parseKeptLog(e.Name())
		info, err := e.Info()
		if !ok || err != nil {
			_ = os.Remove(filepath.Join(dir, e.Name())) // one that was not finished
			continue
		}
		l.size = info.Size()
		found = append(found, l)
	}
	slices.SortFunc(found, func(a, b keptLog) int { return cmp.Compare(a.id, b.id) })
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, l := range found {
		k.addLocked(l)
	}
	return k, nil
}

// lastID is the highest id of a log that is kept, 0 without any.
func (k *keptLogs) lastID() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.order) == 0 {
		return 0
	}
	return slices.Max(k.order)
}

func (k *keptLogs) path(l keptLog) string { return filepath.Join(k.dir, l.name()) }

// keep writes down what a build has printed. A build that printed nothing leaves
// no file.
func (k *keptLogs) keep(id scheduler.BuildID, of owners, s *spool) {
	if s.length() == 0 {
		return
	}
	l := keptLog{id: uint64(id), of: of}
	var err error
	if l.size, err = k.write(l, s); err != nil {
		k.log.Warn("the log of a build is not kept", "build_id", id, "err", err)
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.addLocked(l)
}

// addLocked takes in a log whose file is there, and removes the oldest ones that are
// beyond a bound.
func (k *keptLogs) addLocked(l keptLog) {
	k.byID[l.id] = l
	k.order = append(k.order, l.id)
	k.room += l.room()
	for (k.room > maxKeptLogs || len(k.order) > k.most) && len(k.order) > 1 {
		oldest := k.byID[k.order[0]]
		_ = os.Remove(k.path(oldest)) // it counts no longer in any case
		k.room -= oldest.room()
		delete(k.byID, oldest.id)
		k.order = k.order[1:]
	}
}

func (k *keptLogs) write(l keptLog, s *spool) (size int64, err error) {
	part := k.path(l) + ".part"
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err == nil {
			err = os.Rename(part, k.path(l))
		}
		if err != nil {
			_ = os.Remove(part) // the disk is full, or worse
		}
	}()
	from := max(0, s.length()-maxKeptLog)
	if from > 0 {
		n, err := fmt.Fprintf(f, "(the first %d bytes of this log were not kept)\n", from)
		if size += int64(n); err != nil {
			return size, err
		}
	}
	n, err := io.Copy(f, &spoolReader{s, from})
	return size + n, err
}

// open opens the log of a build that has ended, for a caller. The error is
// fs.ErrNotExist for one that printed nothing or ended too long ago, errNotYours for
// one that the caller may not read.
func (k *keptLogs) open(id uint64, c caller) (*os.File, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	l, ok := k.byID[id]
	switch {
	case !ok:
		return nil, fs.ErrNotExist
	case !c.mayRead(l.of):
		return nil, errNotYours
	default:
		return os.Open(k.path(l))
	}
}

// A spoolReader reads a spool from an offset to its present end.
type spoolReader struct {
	s   *spool
	off int64
}

func (r *spoolReader) Read(p []byte) (int, error) {
	n, err := r.s.readAt(p, r.off)
	r.off += int64(n)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}
