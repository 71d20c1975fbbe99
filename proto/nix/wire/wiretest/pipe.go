package wiretest

import (
	"io"
	"sync"
)

// A Conn is one end of a [Pipe]. Its methods are safe for concurrent use.
type Conn struct{ in, out *half }

// Pipe makes a connection in memory. Each direction holds up to capacity bytes,
// and a writer waits while it is full, as on a socket.
func Pipe(capacity int) (a, b *Conn) {
	x, y := newHalf(capacity), newHalf(capacity)
	return &Conn{in: x, out: y}, &Conn{in: y, out: x}
}

// Read reads what the other end wrote; after the other end is closed and all is
// read it returns io.EOF, and after this end is closed io.ErrClosedPipe.
func (c *Conn) Read(p []byte) (int, error) { return c.in.read(p) }

// Write writes to the other end. After either end is closed it returns
// io.ErrClosedPipe.
func (c *Conn) Write(p []byte) (int, error) { return c.out.write(p) }

// CloseWrite ends what the other end can read and leaves reading open, like the
// end of a remote program's standard input.
func (c *Conn) CloseWrite() error {
	c.out.close(false)
	return nil
}

// Close closes both directions and wakes every reader and writer of both ends.
func (c *Conn) Close() error {
	c.in.close(true)
	c.out.close(false)
	return nil
}

// half is one direction: a ring of bytes.
type half struct {
	mu      sync.Mutex
	changed sync.Cond
	ring    []byte
	start   int  // of the first byte
	n       int  // bytes held
	closed  bool // no more writes
	broken  bool // no more reads either
}

func newHalf(capacity int) *half {
	h := &half{ring: make([]byte, capacity)}
	h.changed.L = &h.mu
	return h
}

func (h *half) read(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.n == 0 && !h.closed && len(p) > 0 {
		h.changed.Wait()
	}
	if h.broken {
		return 0, io.ErrClosedPipe
	}
	if h.n == 0 && h.closed {
		return 0, io.EOF
	}
	end := min(h.start+h.n, len(h.ring))
	n := copy(p, h.ring[h.start:end])
	h.start = (h.start + n) % len(h.ring)
	h.n -= n
	h.changed.Broadcast()
	return n, nil
}

func (h *half) write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	written := 0
	for {
		if h.closed {
			return written, io.ErrClosedPipe
		}
		for h.n < len(h.ring) && written < len(p) {
			free := (h.start + h.n) % len(h.ring)
			end := min(free+len(h.ring)-h.n, len(h.ring))
			n := copy(h.ring[free:end], p[written:])
			h.n += n
			written += n
			h.changed.Broadcast()
		}
		if written == len(p) {
			return written, nil
		}
		h.changed.Wait()
	}
}

func (h *half) close(broken bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	h.broken = h.broken || broken
	h.changed.Broadcast()
}
