package daemon

import (
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"nixdispatch/daemon/usage"
)

const (
	// maxStreams bounds the calls of one connection. A hook makes one, nix-dispatch
	// one or two.
	maxStreams = 100
	// refusalsTold is how often it is told that connections are refused.
	refusalsTold = time.Minute
)

var errTooManyConnections = errors.New("too many connections")

// A connLimit bounds the connections of callers, so that file descriptors are left
// for builds and for other callers. Safe for concurrent use.
type connLimit struct {
	log   *slog.Logger
	usage *usage.Ledger // bounds those of each user
	// all bounds those of everyone, others those of all users who do not command the
	// daemon. These have half as many again for users who have none: whoever has nothing
	// in progress gets a connection, whatever others have.
	all, others int

	mu      sync.Mutex
	total   int
	strange int // of users who do not command the daemon
	told    time.Time
}

// openFiles is how many files the process may have open.
func openFiles() int64 {
	files := uint64(1024)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
		files = min(limit.Cur, 1<<20)
	}
	return max(int64(files), 32) //nolint:gosec // bounded above
}

// newConnLimit leaves half of the process's file descriptors to builds.
func newConnLimit(log *slog.Logger, files int64, users *usage.Ledger) *connLimit {
	all := int(files / 2)
	return &connLimit{log: log, usage: users, all: all, others: all / 2}
}

// admit counts a connection, unless there are too many. The caller must call
// release once at its end.
func (l *connLimit) admit(c caller) (release func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	stranger := !c.commands()
	use, err := l.takeLocked(c, stranger)
	if err != nil {
		if now := time.Now(); now.Sub(l.told) > refusalsTold {
			l.told = now
			l.log.Warn("connections are refused", "uid", c.uid, "of_the_user", l.usage.Of(c.user(), usage.Connections), "in_all", l.total, "err", err)
		}
		return nil, err
	}
	l.countLocked(stranger, 1)
	var once sync.Once
	return func() {
		once.Do(func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			use.Release()
			l.countLocked(stranger, -1)
		})
	}, nil
}

func (l *connLimit) takeLocked(c caller, stranger bool) (*usage.Use, error) {
	if l.total >= l.all {
		return nil, errTooManyConnections
	}
	if !stranger {
		return l.usage.Count(c.user(), usage.Connections, 1), nil
	}
	most := l.others
	if l.usage.Of(c.user(), usage.Connections) == 0 {
		most += l.others / 2
	}
	if l.strange >= most {
		return nil, errTooManyConnections
	}
	return l.usage.Take(c.user(), usage.Connections, 1)
}

func (l *connLimit) countLocked(stranger bool, n int) {
	l.total += n
	if stranger {
		l.strange += n
	}
}

// A limitedListener accepts what its limit admits. The rest is closed at once, one
// after the other, so that a flood of connections takes one file descriptor.
type limitedListener struct {
	net.Listener
	limit *connLimit
}

func (l limitedListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c, err := callerOf(conn)
		if err == nil {
			var release func()
			if release, err = l.limit.admit(c); err == nil {
				return &limitedConn{conn, c, release}, nil
			}
		}
		_ = conn.Close() // nothing was said
	}
}

// A limitedConn is a connection that counts until it is closed.
type limitedConn struct {
	net.Conn
	caller  caller
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// inUse is how many connections there are.
func (l *connLimit) inUse() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}
