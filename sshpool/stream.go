package sshpool

import (
	"io"
	"sync/atomic"
)

// Reads and writes of an SSH channel can be ended by the peer alone. OpenSSH's
// sshd answers the closing of a session only when its process has ended, which
// may take for ever. So goroutines stand between a session's user and the
// channel: they may have to stay behind when the session is closed, until its
// process or the connection ends, but the user need not.

const (
	// outChunk is the size of the two buffers between a channel and the reader
	// of Stdout, and of those between the writer of Stdin and the channel. One
	// SSH packet has 32 KiB.
	outChunk = 32 << 10
	// errChunk is the same for Stderr, which carries text.
	errChunk = 4 << 10
)

// A chunk is what one read gave.
type chunk struct {
	data []byte
	err  error
}

// A pipeReader reads ahead of its user by up to two chunks.
type pipeReader struct {
	in      io.Reader
	fate    func(error) error // what an error of in means
	closing <-chan struct{}
	filled  chan chunk
	free    chan []byte

	// The following fields belong to the goroutine in Read.
	buf  []byte // the chunk being read, to be given back
	rest []byte // what is left of it
	err  error
}

func newPipeReader(in io.Reader, size int, fate func(error) error, closing <-chan struct{}) *pipeReader {
	r := &pipeReader{in: in, fate: fate, closing: closing,
		filled: make(chan chunk, 2), free: make(chan []byte, 2)}
	r.free <- make([]byte, size)
	r.free <- make([]byte, size)
	return r
}

// pump reads until an error or until the session is closed.
func (r *pipeReader) pump() {
	for {
		var buf []byte
		select {
		case buf = <-r.free:
		case <-r.closing:
			return
		}
		n, err := r.in.Read(buf)
		if err != nil {
			err = r.fate(err)
		}
		r.filled <- chunk{buf[:n], err} // there is always room: two chunks exist
		if err != nil {
			return
		}
	}
}

func (r *pipeReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(r.rest) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		if r.buf != nil {
			r.free <- r.buf[:cap(r.buf)]
			r.buf = nil
		}
		select {
		case <-r.closing:
			r.err = ErrClosed
		case c := <-r.filled:
			r.buf, r.rest, r.err = c.data, c.data, c.err
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// A pipeWriter takes up to two chunks before they are written.
type pipeWriter struct {
	out      remoteInput
	fate     func(error) error // what an error of out means
	closing  <-chan struct{}
	finished <-chan struct{}
	filled   chan []byte // nil means that no more will come
	free     chan []byte
	failed   chan struct{} // closed when out failed
	err      error         // how; may be read once failed is closed
	closed   atomic.Bool
}

// A remoteInput is the side of a channel that is written to.
type remoteInput interface {
	io.Writer
	CloseWrite() error
}

func newPipeWriter(out remoteInput, fate func(error) error, closing, finished <-chan struct{}) *pipeWriter {
	w := &pipeWriter{out: out, fate: fate, closing: closing, finished: finished,
		filled: make(chan []byte, 3), free: make(chan []byte, 2), failed: make(chan struct{})}
	w.free <- nil
	w.free <- nil
	return w
}

// pump writes until an error, or until the writer or the session is closed.
func (w *pipeWriter) pump() {
	for {
		select {
		case data := <-w.filled:
			if data == nil {
				w.out.CloseWrite()
				return
			}
			if _, err := w.out.Write(data); err != nil {
				w.err = w.fate(io.ErrClosedPipe)
				close(w.failed)
				return
			}
			w.free <- data[:0]
		case <-w.finished:
			return
		case <-w.closing:
			return
		}
	}
}

// Write returns when the last of p is in a buffer. An error of sending it is
// returned by a later call.
func (w *pipeWriter) Write(p []byte) (int, error) {
	if isClosed(w.finished) {
		return 0, w.fate(io.ErrClosedPipe)
	}
	n := 0
	for len(p) > 0 {
		if w.closed.Load() {
			return n, io.ErrClosedPipe
		}
		select {
		case <-w.closing:
			return n, ErrClosed
		case <-w.failed:
			return n, w.err
		case <-w.finished:
			return n, w.fate(io.ErrClosedPipe)
		case buf := <-w.free:
			if buf == nil {
				buf = make([]byte, 0, outChunk)
			}
			k := min(len(p), outChunk)
			w.filled <- append(buf, p[:k]...) // there is always room
			n, p = n+k, p[k:]
		}
	}
	return n, nil
}

// Close gives the command an end of file, after all that was written.
func (w *pipeWriter) Close() error {
	if !w.closed.Swap(true) {
		w.filled <- nil // there is always room
	}
	if isClosed(w.failed) {
		return w.err
	}
	return nil
}
