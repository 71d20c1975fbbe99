package daemon

import (
	"context"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/serve"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/sshpool"
)

const (
	// handshakeTimeout bounds the start of a remote process. Evaluating a login
	// shell's start-up files on a loaded machine takes seconds.
	handshakeTimeout = 60 * time.Second
	// hangUpGrace is how long a remote process may take to end after its input
	// has been closed. Nix ends the build's processes first.
	hangUpGrace = 5 * time.Second
	// stderrTail is how much of a remote process's last words is kept for
	// messages.
	stderrTail = 4 << 10
)

// A remoteStore is what a build needs of the store at the other end. The
// methods block; they end with an error when the transport is closed.
type remoteStore interface {
	// missing takes temporary roots for paths and returns those that are not
	// valid, after letting the machine substitute them if asked to.
	missing(paths []nix.StorePath, substitute bool) ([]nix.StorePath, error)
	// upload sends paths, references first. nar writes one path's NAR.
	upload(infos []nix.PathInfo, nar func(nix.PathInfo, io.Writer) error) error
	// build runs a derivation whose inputs are valid. Only trusted users may
	// ask for input-addressed ones.
	build(drvPath nix.StorePath, drv nix.BasicDerivation, opts nix.BuildOptions) (nix.BuildResult, error)
	// realise builds a derivation whose .drv is valid on the machine.
	realise(drvPath nix.StorePath, opts nix.BuildOptions) (nix.BuildResult, error)
	// pathInfos tells of those of paths that are valid.
	pathInfos(paths []nix.StorePath) ([]nix.PathInfo, error)
	// dump writes a valid path's NAR, which must have the announced size.
	dump(info nix.PathInfo, w io.Writer) error
	// trust is what the machine says of our user there.
	trust() worker.Trust
}

// A logSink takes what a builder prints. Writes must not block for long.
type logSink interface{ io.Writer }

// A remote is one remote process and the store behind it.
type remote struct {
	machine *machine
	store   remoteStore
	session *sshpool.Session
	stderr  *stderrReader
	// stop keeps the end of the context from ending the process; gone is closed
	// when that has happened instead.
	stop    func() bool
	gone    chan struct{}
	drained sync.WaitGroup
}

// handshake begins the conversation on a fresh session. It does not close the
// session when it fails.
func (m *machine) handshake(ctx context.Context, s *sshpool.Session, log logSink) (*remote, error) {
	r := &remote{machine: m, session: s, stderr: &stderrReader{src: s.Stderr, log: log}, gone: make(chan struct{})}
	r.drained.Go(r.stderr.run)
	r.stop = context.AfterFunc(ctx, r.hangUp)
	timer := time.AfterFunc(handshakeTimeout, func() { _ = s.Close() })
	defer timer.Stop()
	var err error
	if m.ng {
		var c *worker.Client
		if c, err = worker.NewClient(s.Stdout, s.Stdin, newWorkerLog(log)); err == nil {
			r.store = workerStore{c}
		}
	} else {
		var c *serve.Client
		if c, err = serve.NewClient(s.Stdout, s.Stdin); err == nil {
			r.store = serveStore{c}
		}
	}
	if err != nil {
		r.stop()
		return nil, m.explainHandshake(s, r.stderr, err)
	}
	return r, nil
}

// hangUp ends the remote process the way Nix understands: by closing its input,
// upon which it kills the build it runs.
func (r *remote) hangUp() {
	defer close(r.gone)
	_ = r.session.Stdin.Close() // what counts is the end of the process
	impatient := time.AfterFunc(hangUpGrace, func() { _ = r.session.Close() })
	defer impatient.Stop()
	_ = r.session.Wait()  // whichever way it ended, it has ended
	_ = r.session.Close() // frees the place
}

// close ends the remote process and frees the session. When it returns, all the
// process printed has been read, and a build that was cancelled has ended, unless
// the process did not end in its time.
func (r *remote) close() {
	if r.stop() {
		r.hangUp()
	}
	<-r.gone
	r.drained.Wait()
}

// startLog makes what the remote process prints the builder's log. The worker
// protocol carries the log in-band, and its program's stderr is diagnostics.
func (r *remote) startLog() { r.stderr.relay.Store(!r.machine.ng) }

// A stderrReader drains a session's stderr: the end of it is kept for messages,
// and while relaying is on, all of it is the builder's log.
type stderrReader struct {
	src   io.Reader
	log   logSink
	relay atomic.Bool

	mu   sync.Mutex
	tail []byte
}

// run ends when the session does.
func (s *stderrReader) run() {
	buf := make([]byte, 16<<10)
	for {
		n, err := s.src.Read(buf)
		if n > 0 {
			s.keep(buf[:n])
			if s.relay.Load() {
				_, _ = s.log.Write(buf[:n]) // a spool takes everything
			}
		}
		if err != nil {
			return
		}
	}
}

func (s *stderrReader) keep(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tail = append(s.tail, p...)
	if extra := len(s.tail) - stderrTail; extra > 0 {
		s.tail = s.tail[extra:]
	}
}

// last is the end of what the remote process printed, without blank lines
// around it. It is foreign text.
func (s *stderrReader) last() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.TrimSpace(string(s.tail))
}
