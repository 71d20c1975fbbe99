package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/sshpool/plainfile"
)

// localHandshakeTimeout bounds connecting to the local nix-daemon.
const localHandshakeTimeout = 30 * time.Second

// While nix-daemon is restarted, as by an upgrade of Nix, who connects is refused, or
// accepted by the one that ends and never greeted. It is tried again for
// localAwayMost, after pauses that grow from localPause.
const (
	localAwayMost  = 30 * time.Second
	localPause     = 20 * time.Millisecond
	localPauseMost = time.Second
)

// A localStore is a store of this host, spoken to through nix-daemon: never by
// writing into the store directory or its database.
type localStore struct {
	// LocalStore says where it is. Where nothing listens on its Socket (a single-user
	// installation, a private store), nix-daemon --stdio is started as a child.
	nix.LocalStore
	// key names it; "" is the daemon's own.
	key string
	// daemonArgs are the arguments of that child, and env its environment.
	daemonArgs, env []string
	// idle are connections between two uses.
	idle *idlePool[*localConn]
	// marks tell this store from others.
	marks *storeMarks
	// awayMost is localAwayMost, but in tests.
	awayMost time.Duration
}

func newLocalStore(where nix.LocalStore) *localStore {
	return &localStore{
		LocalStore: where,
		daemonArgs: []string{"--stdio"},
		env:        os.Environ(),
		idle:       &idlePool[*localConn]{ttl: maxLocalIdle, end: (*localConn).abort},
		marks:      new(storeMarks),
		awayMost:   localAwayMost,
	}
}

// A localConn is a connection to the local nix-daemon. Not safe for concurrent
// use.
type localConn struct {
	*worker.Client
	store     *localStore
	transport io.ReadWriteCloser
	started   time.Time
	uses      int
	stop      func() bool

	// clean is set by its user when nothing went wrong: then it may serve
	// another.
	clean bool
}

// A connection serves a few users, one after the other, for starting nix-daemon's
// process costs more than most of them ask. Its temporary GC roots pile up, so it
// is soon retired.
const (
	maxLocalUses = 16
	maxLocalAge  = 10 * time.Second
	maxLocalIdle = time.Second
)

// open connects. Cancelling ctx closes the connection, also under an operation
// in progress. The caller must Close it.
func (s *localStore) open(ctx context.Context) (*localConn, error) {
	if conn, ok := s.idle.take(); ok {
		if conn.alive() {
			conn.bind(ctx)
			return conn, nil
		}
		conn.abort()
	}
	return s.connect(ctx, nil)
}

// connect makes a new connection, with a receiver for what operations report
// meanwhile. It is used like one of open. It waits for a nix-daemon that is being
// restarted.
func (s *localStore) connect(ctx context.Context, events worker.Events) (*localConn, error) {
	giveUp := time.Now().Add(s.awayMost)
	for pause := localPause; ; pause = min(2*pause, localPauseMost) {
		conn, away, err := s.connectOnce(ctx, events)
		if err == nil {
			return conn, nil
		}
		if ctx.Err() != nil || !away || time.Now().Add(pause).After(giveUp) {
			return nil, &localError{doing: "connect to nix-daemon", err: contextCause(ctx, err)}
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// connectOnce tells also whether nix-daemon failed to answer in the way of one that
// may soon be there again.
func (s *localStore) connectOnce(ctx context.Context, events worker.Events) (conn *localConn, away bool, err error) {
	transport, err := s.dial(ctx)
	if err != nil {
		return nil, errors.Is(err, unix.ECONNREFUSED), err
	}
	conn = &localConn{store: s, transport: transport, started: time.Now()}
	conn.bind(ctx)
	timer := time.AfterFunc(localHandshakeTimeout, conn.abort)
	conn.Client, err = worker.NewClient(transport, transport, events)
	if !timer.Stop() && err == nil {
		err = fmt.Errorf("no handshake within %s", localHandshakeTimeout)
	}
	if err == nil {
		return conn, false, nil
	}
	conn.Close()
	child, ok := transport.(*childDaemon)
	if !ok {
		handshake, ok := errors.AsType[*wire.HandshakeError](err)
		return nil, ok && handshake.Fault == wire.Closed, err
	}
	if ctx.Err() == nil {
		err = child.explain(err)
	}
	return nil, false, err
}

func (c *localConn) bind(ctx context.Context) {
	c.uses++
	c.clean = false
	c.stop = context.AfterFunc(ctx, c.abort)
}

// Close ends the use. The temporary roots end with the connection, at most
// maxLocalAge and maxLocalIdle after it was made.
func (c *localConn) Close() {
	if c.stop() && c.clean && c.uses < maxLocalUses && time.Since(c.started) < maxLocalAge {
		c.store.idle.put(c)
		return
	}
	c.abort()
}

// abort closes the connection at once, also under an operation in progress.
func (c *localConn) abort() {
	_ = c.transport.Close() // nothing unfinished is worth a report
}

// alive tells whether nix-daemon still holds its end of an idle connection: then
// there is nothing to read, not even the end.
func (c *localConn) alive() bool {
	conn, ok := c.transport.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	quiet := false
	err = raw.Control(func(fd uintptr) {
		events := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
		n, err := unix.Poll(events, 0)
		quiet = err == nil && n == 0
	})
	return err == nil && quiet
}

func (s *localStore) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	if s.Socket == "" {
		return s.startDaemon()
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", s.Socket)
	if err == nil {
		return conn, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return s.startDaemon()
	}
	return nil, err
}

// errNotInStore says that a derivation's file is not in the local store.
var errNotInStore = errors.New("is not in the local store")

// checkDerivationPath refuses what cannot be a derivation of the store, by its name.
func (s *localStore) checkDerivationPath(p nix.StorePath) error {
	if !p.IsDerivation() || p.Dir() != s.Dir {
		return fmt.Errorf("%s is not a derivation of the store %s", p, s.Dir)
	}
	return nil
}

// derivation reads and parses a .drv file of the store. What stands at the name of an
// invalid path may be anything, a pipe or a device too, and Nix 2.8 has valid paths
// that are links to such: only a regular file is read. Callers ask the store first
// whether a path that somebody else named is valid; see checkValid.
func (s *localStore) derivation(p nix.StorePath) (*nix.Derivation, error) {
	return s.derivationWithin(p, func(int) error { return nil })
}

// derivationWithin is derivation, but asks allow, with the size of the text, before it
// parses it.
func (s *localStore) derivationWithin(p nix.StorePath, allow func(n int) error) (*nix.Derivation, error) {
	if err := s.checkDerivationPath(p); err != nil {
		return nil, err
	}
	data, err := plainfile.ReadNoFollow(s.Real(p), nix.MaxDerivationSize)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("derivation %s %w", p, errNotInStore)
	case errors.Is(err, plainfile.ErrNotRegular), errors.Is(err, plainfile.ErrTooLarge):
		return nil, fmt.Errorf("derivation: %w", err)
	case err != nil:
		return nil, &localError{doing: "read derivation", err: err}
	}
	if err := allow(len(data)); err != nil {
		return nil, err
	}
	drv, err := nix.ParseDerivation(data)
	if err != nil {
		return nil, fmt.Errorf("derivation %s: %w", p, err)
	}
	return drv, nil
}

// checkValid makes sure that the store vouches for derivations that somebody named,
// before their files are read: a file that a build has left in the store's directory
// could name any outputs. The file of a valid path never changes.
func (s *localStore) checkValid(ctx context.Context, drvs ...nix.StorePath) error {
	for _, p := range drvs {
		if err := s.checkDerivationPath(p); err != nil {
			return err
		}
	}
	conn, err := s.open(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.checkValid(drvs...); err != nil {
		return err
	}
	conn.clean = true
	return nil
}

// checkValid is localStore.checkValid over a connection there is.
func (c *localConn) checkValid(drvs ...nix.StorePath) error {
	if len(drvs) == 0 {
		return nil
	}
	invalid, err := c.invalid(drvs)
	if err != nil {
		return err
	}
	if len(invalid) > 0 {
		return fmt.Errorf("derivation %s %w", invalid[0], errNotInStore)
	}
	return nil
}

// contextCause is the reason ctx ended, if it did: the error that ending it
// caused elsewhere says less.
func contextCause(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}
