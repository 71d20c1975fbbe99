package daemon

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
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

// A remote is one remote process and the store behind it. It serves one build at
// a time, and a few of them one after the other.
type remote struct {
	machine *machine
	store   remoteStore
	session *sshpool.Session
	stderr  *stderrReader
	stall   *stallWatch
	started time.Time

	// builds counts those it was bound to; clean is set when the last one left it
	// as it found it.
	builds int
	clean  bool
	// heard is when the last output of the last build had come.
	heard time.Time
	// stop keeps the end of the build's context from ending the process; gone is
	// closed when that has happened instead.
	stop  func() bool
	gone  chan struct{}
	ended bool // whether the process is known to have ended; valid after gone
}

// A process serves several builds only where that changes nothing: its temporary
// GC roots pile up, so it is soon retired.
const (
	maxRemoteBuilds = 16
	maxRemoteAge    = 30 * time.Second
	maxRemoteIdle   = 2 * time.Second
)

// startRemote begins the conversation on a fresh session. It does not close the
// session when it fails.
func (m *machine) startRemote(ctx context.Context, s *sshpool.Session) (*remote, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = s.Close() })()
	r := &remote{machine: m, session: s, started: time.Now()}
	r.stall = newStallWatch(func() { _ = s.Close() })
	r.stderr = newStderrReader(s.Stderr, r.stall.life)
	in, out := r.stall.reader(s.Stdout), r.stall.writer(s.Stdin)
	var err error
	if m.ng {
		var c *worker.Client
		if c, err = worker.NewClient(in, out, nil); err == nil {
			r.store = workerStore{c}
		}
	} else {
		var c *serve.Client
		if c, err = serve.NewClient(in, out); err == nil {
			r.store = serveStore{c}
		}
	}
	if err != nil {
		return nil, m.explainHandshake(ctx, s, r, err)
	}
	return r, nil
}

// The questions to a machine, and the copying of paths, have a bound each: how long it may
// be silent. Nothing but a build itself is asked of the store otherwise.

// missing is [remoteStore.missing], bounded.
func (r *remote) missing(paths []nix.StorePath, substitute bool) ([]nix.StorePath, error) {
	limit := r.machine.copyStall
	if substitute {
		limit = max(limit, substituteStall)
	}
	defer r.stall.watch(limit)()
	missing, err := r.store.missing(paths, substitute)
	return missing, r.stall.explain(err)
}

// upload is [remoteStore.upload], bounded.
func (r *remote) upload(infos []nix.PathInfo, nar func(nix.PathInfo, io.Writer) error) error {
	defer r.stall.watch(r.machine.copyStall)()
	return r.stall.explain(r.store.upload(infos, nar))
}

// pathInfos is [remoteStore.pathInfos], bounded.
func (r *remote) pathInfos(paths []nix.StorePath) ([]nix.PathInfo, error) {
	defer r.stall.watch(r.machine.copyStall)()
	infos, err := r.store.pathInfos(paths)
	return infos, r.stall.explain(err)
}

// dump is [remoteStore.dump], bounded.
func (r *remote) dump(info nix.PathInfo, w io.Writer) error {
	defer r.stall.watch(r.machine.copyStall)()
	return r.stall.explain(r.store.dump(info, w))
}

// bind gives the process to a build until close. The end of ctx ends the process.
func (r *remote) bind(ctx context.Context) {
	r.builds++
	r.clean = false
	r.stderr.reset()
	if w, ok := r.store.(workerStore); ok {
		w.c.Events = nil
	}
	r.gone = make(chan struct{})
	r.stop = context.AfterFunc(ctx, func() {
		defer close(r.gone)
		r.ended = r.hangUp()
	})
}

// startLog makes what the remote process prints from now on the builder's log.
func (r *remote) startLog(log logSink) {
	if w, ok := r.store.(workerStore); ok {
		w.c.Events = &workerLog{log: log} // stderr has diagnostics only
		return
	}
	r.stderr.relay(log)
}

// close ends what bind began. A process that is of use to the next build is
// kept. Otherwise, when close returns, all the process printed has been read; and
// unless close returns false, a build that it still ran has ended.
func (r *remote) close() (confirmed bool) {
	switch {
	case !r.stop():
		<-r.gone
		return r.ended
	case r.reusable():
		r.machine.idle.put(r)
		return true
	default:
		return r.hangUp()
	}
}

// reusable tells whether another build would find the process as good as new. In
// the serve protocol the log has a channel of its own, whose end alone tells that
// it is complete, so only a process that has printed nothing can go on: several
// round trips after its build, anything printed would have arrived.
func (r *remote) reusable() bool {
	if !r.alive() || !r.clean || r.builds >= maxRemoteBuilds || time.Since(r.started) >= maxRemoteAge {
		return false
	}
	if r.machine.ng {
		return true
	}
	// What has arrived passes through goroutines that a busy host may not have run
	// yet; a log must not be lost to that.
	time.Sleep(stderrSettle - time.Since(r.heard))
	return r.stderr.last() == ""
}

const stderrSettle = 10 * time.Millisecond

// alive tells whether neither the process nor its connection has ended as far as is
// known: the connection's end is known first.
func (r *remote) alive() bool {
	select {
	case <-r.session.Done():
		return false
	case <-r.session.Connection().Ended():
		return false
	default:
		return true
	}
}

// hangUp ends the remote process the way Nix understands: by closing its input,
// upon which it kills the build it runs. It tells whether the process is known to
// have ended.
func (r *remote) hangUp() bool {
	_ = r.session.Stdin.Close() // what counts is the end of the process
	grace := hangUpGrace
	if !r.machine.suspectSince().IsZero() {
		grace = 0 // it would not be heard of
	}
	impatient := time.AfterFunc(grace, func() { _ = r.session.Close() })
	defer impatient.Stop()
	err := r.session.Wait()
	<-r.stderr.ended
	_ = r.session.Close() // frees the place
	_, exited := errors.AsType[*sshpool.ExitError](err)
	return err == nil || exited
}

// A stderrReader drains a session's stderr: the end of it is kept for messages,
// and once a log is set, all of it goes there.
type stderrReader struct {
	ended chan struct{} // closed when stderr has ended

	mu   sync.Mutex
	log  logSink
	tail []byte
}

// newStderrReader reads until the session ends, and calls heard when something came.
func newStderrReader(src io.Reader, heard func()) *stderrReader {
	s := &stderrReader{ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		buf := make([]byte, 16<<10)
		for {
			n, err := src.Read(buf)
			s.take(buf[:n])
			heard()
			if err != nil {
				return
			}
		}
	}()
	return s
}

func (s *stderrReader) take(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tail = append(s.tail, p...)
	if extra := len(s.tail) - stderrTail; extra > 0 {
		s.tail = s.tail[extra:]
	}
	if s.log != nil && len(p) > 0 {
		_, _ = s.log.Write(p) // a spool takes everything
	}
}

// relay passes on to log what comes from now on.
func (s *stderrReader) relay(log logSink) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = log
}

// reset forgets what an earlier build left.
func (s *stderrReader) reset() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log, s.tail = nil, nil
}

// last is the end of what the remote process printed, without blank lines
// around it. It is foreign text.
func (s *stderrReader) last() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.TrimSpace(string(s.tail))
}

// lastAfter is last after err. If that is the end of the process's output, what the
// process printed before may still be on its way: lastAfter waits for it, for endWait
// at most.
func (s *stderrReader) lastAfter(err error) string {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		timer := time.NewTimer(endWait)
		defer timer.Stop()
		select {
		case <-s.ended:
		case <-timer.C:
		}
	}
	return s.last()
}
