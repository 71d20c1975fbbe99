package daemon

import (
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// stalling is a watched pipe whose other ends are the machine's.
func stalling(limit time.Duration) (w *stallWatch, in io.Reader, machine *io.PipeWriter, aborted *atomic.Bool, end func()) {
	r, machine := io.Pipe()
	aborted = new(atomic.Bool)
	w = newStallWatch(func() { aborted.Store(true); r.CloseWithError(io.ErrClosedPipe) })
	return w, w.reader(r), machine, aborted, w.watch(limit)
}

func TestStallWatchEndsAProcessThatStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, in, machine, aborted, end := stalling(time.Minute)
		defer end()
		go machine.Write([]byte("ab"))
		start := time.Now()
		if _, err := io.ReadFull(in, make([]byte, 3)); err == nil {
			t.Fatal("a read of what never comes succeeded")
		}
		if got := time.Since(start); got != time.Minute || !aborted.Load() {
			t.Errorf("aborted = %v after %v, want it after a minute", aborted.Load(), got)
		}
		if err := w.explain(io.ErrClosedPipe); !errors.Is(err, errCopyStalled) {
			t.Errorf("explained as %v", err)
		}
	})
}

// TestStallWatchHearsStderr has a machine that only prints on stderr.
func TestStallWatchHearsStderr(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, in, machine, aborted, end := stalling(time.Minute)
		defer end()
		go func() {
			for range 5 {
				time.Sleep(50 * time.Second)
				w.life()
			}
			machine.Write([]byte("x"))
		}()
		if _, err := io.ReadFull(in, make([]byte, 1)); err != nil || aborted.Load() {
			t.Errorf("a machine that tells what it does was given up: %v", err)
		}
	})
}

func TestStallWatchSparesWhatMoves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, in, machine, aborted, end := stalling(time.Minute)
		go func() {
			for range 5 {
				time.Sleep(50 * time.Second)
				machine.Write([]byte("x"))
			}
			time.Sleep(time.Hour) // unwatched by then
			machine.Write([]byte("y"))
			machine.Close()
		}()
		// Data in one direction is a sign of life for those who wait in the other.
		blocked, release := io.Pipe()
		go w.reader(blocked).Read(make([]byte, 1))
		if _, err := io.ReadFull(in, make([]byte, 5)); err != nil {
			t.Fatalf("a slow machine was given up: %v", err)
		}
		time.Sleep(50 * time.Second)
		end()
		if rest, err := io.ReadAll(in); err != nil || string(rest) != "y" || aborted.Load() {
			t.Errorf("read %q, %v after the watch, aborted = %v", rest, err, aborted.Load())
		}
		if err := w.explain(io.EOF); err != io.EOF {
			t.Errorf("explained as %v", err)
		}
		release.Close()
	})
}
