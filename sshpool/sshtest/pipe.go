package sshtest

import (
	"io"
	"net"
	"sync"
	"time"
)

// pipeBuffer is how much one direction of a pipe holds: like a socket's, so that
// writing blocks when nobody reads, but not at the first byte as with net.Pipe.
const pipeBuffer = 256 << 10

// A stream is one direction of a pipe.
type stream struct {
	mu     sync.Mutex // protects following fields
	cond   *sync.Cond
	data   []byte
	frozen bool
	closed bool
}

func newStream() *stream {
	s := new(stream)
	s.cond = sync.NewCond(&s.mu)
	return s
}

func (s *stream) read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for (len(s.data) == 0 || s.frozen) && !s.closed {
		s.cond.Wait()
	}
	if len(s.data) == 0 || s.frozen {
		return 0, io.EOF
	}
	n := copy(p, s.data)
	s.data = s.data[n:]
	s.cond.Broadcast()
	return n, nil
}

func (s *stream) write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for len(p) > 0 {
		for len(s.data) >= pipeBuffer && !s.closed {
			s.cond.Wait()
		}
		if s.closed {
			return n, io.ErrClosedPipe
		}
		k := min(len(p), pipeBuffer-len(s.data))
		s.data = append(s.data, p[:k]...)
		n, p = n+k, p[k:]
		s.cond.Broadcast()
	}
	return n, nil
}

func (s *stream) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	s.cond.Broadcast()
}

// A pipeEnd is one end of an in-memory connection.
type pipeEnd struct{ in, out *stream }

func newPipe() (a, b *pipeEnd) {
	x, y := newStream(), newStream()
	return &pipeEnd{x, y}, &pipeEnd{y, x}
}

func (e *pipeEnd) Read(p []byte) (int, error)  { return e.in.read(p) }
func (e *pipeEnd) Write(p []byte) (int, error) { return e.out.write(p) }

func (e *pipeEnd) Close() error {
	e.in.set(func() { e.in.closed = true })
	e.out.set(func() { e.out.closed = true })
	return nil
}

// freeze stops or lets go on the bytes in both directions.
func (e *pipeEnd) freeze(frozen bool) {
	e.in.set(func() { e.in.frozen = frozen })
	e.out.set(func() { e.out.frozen = frozen })
}

func (e *pipeEnd) LocalAddr() net.Addr              { return pipeAddr{} }
func (e *pipeEnd) RemoteAddr() net.Addr             { return pipeAddr{} }
func (e *pipeEnd) SetDeadline(time.Time) error      { return nil }
func (e *pipeEnd) SetReadDeadline(time.Time) error  { return nil }
func (e *pipeEnd) SetWriteDeadline(time.Time) error { return nil }

type pipeAddr struct{}

func (pipeAddr) Network() string { return "pipe" }
func (pipeAddr) String() string  { return "pipe" }
