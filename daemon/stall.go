package daemon

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// copyStall is how long a machine may neither take nor give a byte while it is asked
	// something, or paths are copied, before the remote process is given up. The
	// connection may be in order: the process may be stopped, or its disk. A machine that
	// writes a large path to a slow disk stays below it.
	copyStall = 5 * time.Minute
	// substituteStall is the same while the machine fetches paths from its substituters.
	// What it prints of that counts, but there is nothing to print while a large path
	// travels.
	substituteStall = time.Hour
)

// errCopyStalled says that a machine moved nothing for its time.
var errCopyStalled = errors.New("it stopped taking and giving data")

// A stallWatch ends a remote process that stops moving data in either direction
// while somebody waits for it to. It watches only between watch and its end, for which
// [remote] sees: everything but the build itself, which may be silent for as long as it
// likes. Safe for concurrent use.
type stallWatch struct {
	abort func()

	mu      sync.Mutex
	limit   time.Duration // 0 while nothing is watched
	waiting int           // calls that wait for the machine
	timer   *time.Timer
	stalled time.Duration // the limit that was passed, if one was
}

// newStallWatch makes a watch that calls abort once, from a goroutine of its own.
func newStallWatch(abort func()) *stallWatch {
	w := &stallWatch{abort: abort}
	w.timer = time.AfterFunc(time.Hour, w.expire)
	w.timer.Stop()
	return w
}

// watch begins to watch, until end is called.
func (w *stallWatch) watch(limit time.Duration) (end func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.limit = limit
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.limit = 0
		w.timer.Stop()
	}
}

// life notes that the machine showed life in another way than by the watched streams.
func (w *stallWatch) life() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.limit > 0 && w.waiting > 0 {
		w.timer.Reset(w.limit)
	}
}

func (w *stallWatch) expire() {
	w.mu.Lock()
	over := w.limit > 0 && w.waiting > 0
	if over {
		w.stalled = w.limit
	}
	w.mu.Unlock()
	if over {
		w.abort()
	}
}

// wait notes that a call begins (n is 1) or ends (n is -1) to wait for the
// machine. The end of one is a sign of life for all.
func (w *stallWatch) wait(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting += n
	switch {
	case w.limit == 0:
	case w.waiting == 0:
		w.timer.Stop()
	default:
		w.timer.Reset(w.limit)
	}
}

// explain returns err, or what lies behind it if the watch has ended the process.
func (w *stallWatch) explain(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stalled == 0 || err == nil || errors.Is(err, errCopyStalled) {
		return err
	}
	return fmt.Errorf("%w for %v", errCopyStalled, w.stalled)
}

// reader watches r, writer watches dst.
func (w *stallWatch) reader(r io.Reader) io.Reader   { return stallReader{w, r} }
func (w *stallWatch) writer(dst io.Writer) io.Writer { return stallWriter{w, dst} }

type stallReader struct {
	watch *stallWatch
	r     io.Reader
}

func (s stallReader) Read(p []byte) (int, error) {
	s.watch.wait(1)
	defer s.watch.wait(-1)
	return s.r.Read(p)
}

type stallWriter struct {
	watch *stallWatch
	w     io.Writer
}

func (s stallWriter) Write(p []byte) (int, error) {
	s.watch.wait(1)
	defer s.watch.wait(-1)
	return s.w.Write(p)
}
