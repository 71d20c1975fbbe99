package daemon

import (
	"errors"
	"log/slog"
	"maps"
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
	// connectBurst and connectRate bound how fast one user connects: so many at once, and so
	// many a second from then on. To set up a connection costs the daemon far more than to
	// connect costs the user; to refuse one costs little.
	connectBurst = 256
	connectRate  = 50
)

var (
	errTooManyConnections = errors.New("too many connections")
	errTooManyConnects    = errors.New("too many connections within a short time")
)

// A connLimit bounds the connections of callers, so that file descriptors are left
// for builds and for other callers. Safe for concurrent use.
type connLimit struct {
	log   *slog.Logger
	usage *usage.Ledger // bounds those of each user
	// all bounds those of everyone, others those of all users who do not command the
	// daemon. These have half as many again for users who have none: whoever has nothing
	// in progress gets a connection, whatever others have.
	all, others int
	// bounded has all callers bounded, as tests need it.
	bounded bool

	mu      sync.Mutex
	total   int
	strange int // of users who do not command the daemon
	told    time.Time
	paces   map[uint32]pace // of users who do not command the daemon and connected lately
}

// A pace is how many connections a user may make at once.
type pace struct {
	left float64
	at   time.Time // when that was so
}

// after is the pace at a later time.
func (p pace) after(now time.Time) pace {
	return pace{min(p.left+now.Sub(p.at).Seconds()*connectRate, connectBurst), now}
}

// connectsLocked counts that a user connects, and tells whether that is not too often.
func (l *connLimit) connectsLocked(uid uint32, now time.Time) bool {
	p, ok := l.paces[uid]
	if !ok {
		p = pace{connectBurst, now}
		if l.paces == nil {
			l.paces = make(map[uint32]pace)
		}
		maps.DeleteFunc(l.paces, func(_ uint32, p pace) bool { return p.after(now).left == connectBurst })
	}
	p = p.after(now)
	may := p.left >= 1
	if may {
		p.left--
	}
	l.paces[uid] = p
	return may
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
		l.refusedLocked(c, err)
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

// refused logs, now and then, that a connection was refused or ended.
func (l *connLimit) refused(c caller, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refusedLocked(c, err)
}

func (l *connLimit) refusedLocked(c caller, err error) {
	if now := time.Now(); now.Sub(l.told) > refusalsTold {
		l.told = now
		l.log.Warn("connections are refused", "uid", c.uid, "of_the_user", l.usage.Of(c.user(), usage.Connections), "in_all", l.total, "err", err)
	}
}

func (l *connLimit) takeLocked(c caller, stranger bool) (*usage.Use, error) {
	if l.total >= l.all {
		return nil, errTooManyConnections
	}
	if !stranger {
		return l.usage.Count(c.user(), usage.Connections, 1), nil
	}
	if !l.connectsLocked(c.uid, time.Now()) {
		return nil, errTooManyConnects
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
				a := newArrival(l.limit.usage, c, l.limit.bounded || !c.commands())
				return &limitedConn{conn, l.limit, c, a, release}, nil
			}
		}
		_ = conn.Close() // nothing was said
	}
}

// A limitedConn is a connection that counts until it is closed.
type limitedConn struct {
	net.Conn
	limit   *connLimit
	caller  caller
	arrival *arrival
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	defer c.arrival.release()
	return c.Conn.Close()
}

// inUse is how many connections there are.
func (l *connLimit) inUse() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}
