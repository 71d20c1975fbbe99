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
	"sync"

	"nixdispatch/scheduler"
)

const (
	// maxKeptLog bounds one log that is kept: of a longer one, its end.
	maxKeptLog = 16 << 20
	// maxKeptLogs bounds all of them, in bytes; the oldest go first.
	maxKeptLogs = 512 << 20
)

// keptLogs are the logs of builds that have ended, each in a file named by the
// build's id and the user id of who asked for it. Safe for concurrent use.
type keptLogs struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	files []keptLog // the oldest first
	bytes int64
}

type keptLog struct {
	id   uint64
	uid  uint32
	size int64
}

func (l keptLog) name() string { return fmt.Sprintf("%d-%d", l.id, l.uid) }

// parseKeptLog reads a file's name.
func parseKeptLog(name string) (l keptLog, ok bool) {
	_, err := fmt.Sscanf(name, "%d-%d", &l.id, &l.uid)
	return l, err == nil && l.name() == name
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
	k := &keptLogs{dir: dir, log: log}
	for _, e := range entries {
		l, ok := parseKeptLog(e.Name())
		info, err := e.Info()
		if !ok || err != nil {
			_ = os.Remove(filepath.Join(dir, e.Name())) // one that was not finished
			continue
		}
		l.size = info.Size()
		k.files = append(k.files, l)
		k.bytes += l.size
	}
	slices.SortFunc(k.files, func(a, b keptLog) int { return cmp.Compare(a.id, b.id) })
	return k, nil
}

// lastID is the highest id of a log that is kept, 0 without any.
func (k *keptLogs) lastID() uint64 {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.files) == 0 {
		return 0
	}
	return k.files[len(k.files)-1].id
}

func (k *keptLogs) path(l keptLog) string { return filepath.Join(k.dir, l.name()) }

// keep writes down what a build has printed. A build that printed nothing leaves
// no file.
func (k *keptLogs) keep(id scheduler.BuildID, uid uint32, s *spool) {
	if s.length() == 0 {
		return
	}
	l := keptLog{id: uint64(id), uid: uid}
	var err error
	if l.size, err = k.write(l, s); err != nil {
		k.log.Warn("the log of a build is not kept", "build_id", id, "err", err)
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.files = append(k.files, l)
	k.bytes += l.size
	for k.bytes > maxKeptLogs && len(k.files) > 1 {
		_ = os.Remove(k.path(k.files[0])) // it counts no longer in any case
		k.bytes -= k.files[0].size
		k.files = k.files[1:]
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
	at := slices.IndexFunc(k.files, func(l keptLog) bool { return l.id == id })
	switch {
	case at < 0:
		return nil, fs.ErrNotExist
	case !c.mayRead(k.files[at].uid):
		return nil, errNotYours
	default:
		return os.Open(k.path(k.files[at]))
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
