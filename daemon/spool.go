package daemon

import (
	"fmt"
	"os"
	"sync"
	"time"

	"nixdispatch/daemon/usage"
)

// spoolMemory is how much of a log is kept in memory before it goes to disk.
// Most builds say less.
const spoolMemory = 64 << 10

// maxSpool bounds a log on disk while its build runs: what a builder or a machine
// says beyond that is dropped.
const maxSpool = 1 << 30

var (
	errLongLog  = fmt.Errorf("it is longer than %d bytes", maxSpool)
	errManyLogs = fmt.Errorf("the logs of the user's builds in progress are longer than %d bytes", int64(maxUserLogs))
)

// A spool holds one build's log for as long as somebody may read it: the first
// bytes in memory, the rest in an unlinked file. The build writes at its own
// pace; each reader reads at its own. Safe for concurrent use.
type spool struct {
	dir   string
	limit int64
	use   *usage.Use // what is on disk counts for it; nil for nobody

	mu      sync.Mutex
	head    []byte
	file    *os.File
	size    int64
	full    error
	written time.Time
}

func newSpool(dir string) *spool { return &spool{dir: dir, limit: maxSpool} }

// Write appends. It always takes all of p: when the disk is full the log is cut
// short, which lost tells, and the build goes on.
func (s *spool) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.written = time.Now()
	rest := p
	if room := spoolMemory - len(s.head); room > 0 && s.size == int64(len(s.head)) {
		n := min(room, len(rest))
		s.head = append(s.head, rest[:n]...)
		s.size += int64(n)
		rest = rest[n:]
	}
	if len(rest) > 0 && s.full == nil {
		fits := min(int64(len(rest)), s.limit-s.size)
		if s.use != nil && !s.use.Grow(fits, true) {
			fits, s.full = 0, errManyLogs
		} else {
			s.spillLocked(rest[:fits])
		}
		if fits < int64(len(rest)) && s.full == nil {
			s.full = errLongLog
		}
	}
	return len(p), nil
}

func (s *spool) spillLocked(p []byte) {
	if s.file == nil {
		f, err := os.CreateTemp(s.dir, "log-*")
		if err == nil {
			err = os.Remove(f.Name())
		}
		if err != nil {
			s.full = err
			return
		}
		s.file = f
	}
	n, err := s.file.WriteAt(p, s.size-int64(len(s.head)))
	s.size += int64(n)
	s.full = err
}

// readAt copies log bytes from offset off into p and returns how many there were.
func (s *spool) readAt(p []byte, off int64) (int, error) {
	s.mu.Lock()
	head, file, size := s.head, s.file, s.size
	s.mu.Unlock()
	switch {
	case off >= size:
		return 0, nil
	case off < int64(len(head)):
		return copy(p, head[off:]), nil
	default:
		p = p[:min(int64(len(p)), size-off)]
		return file.ReadAt(p, off-int64(len(head)))
	}
}

// length is the number of bytes written so far.
func (s *spool) length() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.size
}

// lastWrite is when the build last said something; zero if it never did.
func (s *spool) lastWrite() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written
}

// lost is why the log was cut short; nil if it is whole.
func (s *spool) lost() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full == nil {
		return nil
	}
	return fmt.Errorf("the rest of the log could not be kept: %w", s.full)
}

// close frees the file. No read may be under way or follow.
func (s *spool) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.file != nil {
		_ = s.file.Close() // unlinked: there is nothing to lose
		s.file = nil
	}
	s.use.Release()
}
