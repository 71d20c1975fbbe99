package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/worker"
)

// defaultNixSocket is where nix-daemon listens unless NIX_DAEMON_SOCKET_PATH
// says otherwise.
const defaultNixSocket = "/nix/var/nix/daemon-socket/socket"

// localHandshakeTimeout bounds connecting to the local nix-daemon.
const localHandshakeTimeout = 30 * time.Second

// A localStore is the store of this host, spoken to through its nix-daemon:
// never by writing into the store directory or its database.
type localStore struct {
	// socket is nix-daemon's. Where there is none (a single-user installation),
	// nix-daemon --stdio is started as a child instead.
	socket string
	// dir is the store directory.
	dir string
}

func newLocalStore() localStore {
	s := localStore{socket: os.Getenv("NIX_DAEMON_SOCKET_PATH"), dir: os.Getenv("NIX_STORE_DIR")}
	if s.socket == "" {
		s.socket = defaultNixSocket
	}
	if s.dir == "" {
		s.dir = nix.DefaultStoreDir
	}
	return s
}

// A localConn is one connection to the local nix-daemon. The temporary GC roots
// it takes live until it is closed. Not safe for concurrent use.
type localConn struct {
	*worker.Client
	transport io.Closer
	stop      func() bool
}

// open connects. Cancelling ctx closes the connection, also under an operation
// in progress. The caller must Close it.
func (s localStore) open(ctx context.Context) (*localConn, error) {
	return s.openWith(ctx, nil)
}

// openWith connects with a receiver for what operations report meanwhile.
func (s localStore) openWith(ctx context.Context, events worker.Events) (*localConn, error) {
	transport, err := s.dial(ctx)
	if err != nil {
		return nil, &localError{doing: "connect to nix-daemon", err: err}
	}
	conn := &localConn{
		transport: transport,
		stop:      context.AfterFunc(ctx, func() { _ = transport.Close() }),
	}
	timer := time.AfterFunc(localHandshakeTimeout, func() { _ = transport.Close() })
	conn.Client, err = worker.NewClient(transport, transport, events)
	if !timer.Stop() && err == nil {
		err = fmt.Errorf("no handshake within %s", localHandshakeTimeout)
	}
	if err != nil {
		conn.Close()
		return nil, &localError{doing: "connect to nix-daemon", err: contextCause(ctx, err)}
	}
	return conn, nil
}

// Close ends the connection and with it its temporary roots.
func (c *localConn) Close() {
	c.stop()
	_ = c.transport.Close() // nothing unfinished is worth a report
}

func (s localStore) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", s.socket)
	if err == nil {
		return conn, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return startStdioDaemon()
	}
	return nil, err
}

// A childDaemon is a nix-daemon --stdio of our own. It gets pipes rather than a
// socketpair because Nix 2.8 splices.
type childDaemon struct {
	io.Reader
	io.WriteCloser
	cmd *exec.Cmd
}

func startStdioDaemon() (io.ReadWriteCloser, error) {
	cmd := exec.Command("nix-daemon", "--stdio")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("there is no nix-daemon socket, and starting nix-daemon failed: %w", err)
	}
	return &childDaemon{Reader: stdout, WriteCloser: stdin, cmd: cmd}, nil
}

// Close ends the child and waits for it.
func (c *childDaemon) Close() error {
	err := c.WriteCloser.Close()
	_ = c.cmd.Process.Kill() // it may have ended by itself
	_ = c.cmd.Wait()         // killed: its status says nothing
	return err
}

// errNotInStore says that a derivation's file is not in the local store.
var errNotInStore = errors.New("is not in the local store")

// derivation reads and parses a .drv file of the store.
func (s localStore) derivation(p nix.StorePath) (*nix.Derivation, error) {
	if !p.IsDerivation() || p.Dir() != s.dir {
		return nil, fmt.Errorf("%s is not a derivation of the store %s", p, s.dir)
	}
	f, err := os.Open(filepath.Join(s.dir, p.Base()))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("derivation %s %w", p, errNotInStore)
	}
	if err != nil {
		return nil, &localError{doing: "read derivation", err: err}
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, nix.MaxDerivationSize+1))
	if err != nil {
		return nil, &localError{doing: "read derivation", err: err}
	}
	if len(data) > nix.MaxDerivationSize {
		return nil, fmt.Errorf("derivation %s is larger than %d bytes", p, nix.MaxDerivationSize)
	}
	drv, err := nix.ParseDerivation(data)
	if err != nil {
		return nil, fmt.Errorf("derivation %s: %w", p, err)
	}
	return drv, nil
}

// contextCause is the reason ctx ended, if it did: the error that ending it
// caused elsewhere says less.
func contextCause(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}
