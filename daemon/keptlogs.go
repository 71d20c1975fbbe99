package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
// build's id. Safe for concurrent use.
type keptLogs struct {
	dir string
	log *slog.Logger

	mu    sync.Mutex
	files []keptLog // the oldest first
	bytes int64
}

type keptLog struct {
	id   uint64
	size int64
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
		id, err := strconv.ParseUint(e.Name(), 10, 64)
		info, statErr := e.Info()
		if err != nil || statErr != nil {
			_ = os.Remove(filepath.Join(dir, e.Name())) // one that was not finished
			continue
		}
		k.files = append(k.files, keptLog{id, info.Size()})
		k.bytes += info.Size()
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

func (k *keptLogs) name(id uint64) string { return filepath.Join(k.dir, strconv.FormatUint(id, 10)) }

// keep writes down what a build has printed. A build that printed nothing leaves
// no file.
func (k *keptLogs) keep(id scheduler.BuildID, s *spool) {
	if s.length() == 0 {
		return
	}
	size, err := k.write(uint64(id), s)
	if err != nil {
		k.log.Warn("the log of a build is not kept", "build_id", id, "err", err)
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.files = append(k.files, keptLog{uint64(id), size})
	k.bytes += size
	for k.bytes > maxKeptLogs && len(k.files) > 1 {
		_ = os.Remove(k.name(k.files[0].id)) // it counts no longer in any case
		k.bytes -= k.files[0].size
		k.files = k.files[1:]
	}
}

func (k *keptLogs) write(id uint64, s *spool) (size int64, err error) {
	part := k.name(id) + ".part"
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err == nil {
			err = os.Rename(part, k.name(id))
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

// open opens the log of a build that has ended. The error is fs.ErrNotExist for
// one that printed nothing or ended too long ago.
func (k *keptLogs) open(id uint64) (*os.File, error) { return os.Open(k.name(id)) }

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
