package sshpool

import (
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A liveConn notes what its transport receives and takes, so that silence can be told
// from slowness.
type liveConn struct {
	net.Conn
	onError func(error) // for read errors, before the reader sees them
	onLife  func()      // for the first byte after doubted was set

	made     time.Time
	received atomic.Int64 // bytes
	heard    atomic.Int64 // when the last of them were, as a duration since made
	doubted  atomic.Bool
	writing  atomic.Int64  // calls of Write in progress
	written  atomic.Uint64 // bytes that Write has passed on

	mu     sync.Mutex // protects following fields
	head   []byte     // the first bytes received
	headAt time.Time  // when the first of them was
}

// maxHead is how much is kept of what a host says first.
const maxHead = 512

func newLiveConn(nc net.Conn, c *conn) *liveConn {
	return &liveConn{Conn: nc, made: time.Now(), onError: c.markLost, onLife: func() { signal(c.nudge) }}
}

func (l *liveConn) Read(p []byte) (int, error) {
	n, err := l.Conn.Read(p)
	if n > 0 {
		l.heard.Store(int64(time.Since(l.made)))
		if l.doubted.CompareAndSwap(true, false) {
			l.onLife()
		}
	}
	if before := l.received.Add(int64(n)) - int64(n); before < maxHead {
		l.keep(p[:n])
	}
	if err != nil {
		l.onError(err)
	}
	return n, err
}

func (l *liveConn) Write(p []byte) (int, error) {
	l.writing.Add(1)
	n, err := l.Conn.Write(p)
	l.writing.Add(-1)
	l.written.Add(uint64(n)) //nolint:gosec // a count
	return n, err
}

// lastReceived returns when the last byte was received, or the connection made.
func (l *liveConn) lastReceived() time.Time { return l.made.Add(time.Duration(l.heard.Load())) }

// taken returns a number that grows while the way to the peer takes what was sent,
// and whether it has not taken all of it. Of a TCP connection the kernel knows what
// the peer's kernel has acknowledged. Of others, such as a proxy's pipe, it is only
// known that writes go on.
func (l *liveConn) taken() (n uint64, more bool) {
	if info := l.tcpInfo(); info != nil {
		return info.Bytes_acked, info.Unacked > 0 || info.Notsent_bytes > 0
	}
	return l.written.Load(), l.writing.Load() > 0
}

// tcpInfo returns the kernel's view of the connection; nil if it is not TCP.
func (l *liveConn) tcpInfo() *unix.TCPInfo {
	sc, ok := l.Conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	var info *unix.TCPInfo
	err = raw.Control(func(fd uintptr) {
		info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	})
	if err != nil {
		return nil
	}
	return info
}

func (l *liveConn) keep(p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(p) > 0 && l.headAt.IsZero() {
		l.headAt = time.Now()
	}
	l.head = append(l.head, p[:min(len(p), maxHead-len(l.head))]...)
}

// beginning is what was received first, and when that began.
func (l *liveConn) beginning() ([]byte, time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head, l.headAt
}
