package daemon

import (
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxUserConnections bounds the connections of a user who does not command the
	// daemon; those who do have hooks, one for each build of any user.
	maxUserConnections = 256
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
	log *slog.Logger
	// all bounds those of everyone, others those of all users who do not command the
	// daemon, each those of one of them.
	all, others, each int

	mu      sync.Mutex
	total   int
	strange int // of users who do not command the daemon
	users   map[uint32]int
	told    time.Time
}

// newConnLimit leaves half of the process's file descriptors to builds.
func newConnLimit(log *slog.Logger) *connLimit {
	files := uint64(1024)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil {
		files = min(limit.Cur, 1<<20)
	}
	all := max(int(files/2), 16) //nolint:gosec // bounded above
	return &connLimit{
		log: log, all: all, others: all / 2, each: min(all/4, maxUserConnections), users: make(map[uint32]int),
	}
}

// admit counts a connection, unless there are too many. The caller must call
// release once at its end.
func (l *connLimit) admit(c caller) (release func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	stranger := !c.commands()
	if l.total >= l.all || stranger && (l.strange >= l.others || l.users[c.uid] >= l.each) {
		if now := time.Now(); now.Sub(l.told) > refusalsTold {
			l.told = now
			l.log.Warn("connections are refused", "uid", c.uid, "of_the_user", l.users[c.uid], "in_all", l.total)
		}
		return nil, errTooManyConnections
	}
	l.count(c, stranger, 1)
	var once sync.Once
	return func() {
		once.Do(func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.count(c, stranger, -1)
		})
	}, nil
}

func (l *connLimit) count(c caller, stranger bool, n int) {
	l.total += n
	if !stranger {
		return
	}
	l.strange += n
	if l.users[c.uid] += n; l.users[c.uid] == 0 {
		delete(l.users, c.uid)
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
