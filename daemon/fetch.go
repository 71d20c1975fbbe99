package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"nixdispatch/proto/nix"
	"nixdispatch/sshpool/plainfile"
)

const (
	// handOverWait bounds how long hooks that follow the build may take to free output
	// locks that are really held. A hook that was stopped keeps its locks; the import
	// then waits for the lock itself.
	handOverWait = 5 * time.Second
	// lockPoll is how often a lock that somebody else holds is looked at.
	lockPoll = 100 * time.Millisecond
	// lockReminder is after how many looks the log says that it is still held.
	lockReminder = 600
	// importStall is how long nix-daemon may take nothing of an import before it is
	// suspected of waiting for a lock, and the import is begun anew; diskStall the
	// same for an import that has its lock.
	importStall = 20 * time.Second
	diskStall   = 10 * time.Minute
	// maxImports bounds how often that happens.
	maxImports = 5
)

// fetchOutputs brings the outputs that the local store lacks, references first,
// and registers them there.
func (a *attempt) fetchOutputs(ctx context.Context) error {
	conn, err := a.b.store.open(ctx)
	if err != nil {
		return err
	}
	f := &fetch{attempt: a, conn: conn}
	defer func() { f.conn.Close() }() // a stalled import replaces it
	lacking, err := conn.invalid(slices.Sorted(maps.Values(a.b.drv.OutputPaths())))
	if err != nil || len(lacking) == 0 {
		return err
	}
	infos, err := a.outputInfos(conn, lacking)
	if err != nil {
		return err
	}
	if err := a.takeOverLocks(ctx, lacking); err != nil {
		return err
	}
	f.progress = newTransfer(a.b, a.d.metrics.received(a.m.line.StoreURI), downloading, infos)
	defer func() { a.b.account.received += f.progress.now.BytesDone }()
	for _, i := range infos {
		if err := f.output(ctx, i); err != nil {
			return err
		}
	}
	f.progress.flush()
	// Everything was in order, and there were round trips enough after the build.
	a.r.clean, f.conn.clean = true, true
	return nil
}

// takeOverLocks has the hooks that follow the build free the locks their Nix
// holds on the outputs. Hooks that join later do so at once. It waits for their answers
// only while a lock is held: anyone who may call can follow a build as a hook, hold no
// lock and never answer.
func (a *attempt) takeOverLocks(ctx context.Context, paths []nix.StorePath) error {
	names := make([]string, len(paths))
	for n, p := range paths {
		names[n] = string(p)
	}
	a.b.feed.requestHandOver(names)
	timeout := time.NewTimer(a.d.handOverWait)
	defer timeout.Stop()
	look := time.NewTicker(lockPoll)
	defer look.Stop()
	for {
		pending, changed := a.d.dispatcher.pendingHandOver(a.b)
		if !pending || !a.anyLockHeld(paths) {
			return nil
		}
		select {
		case <-changed:
		case <-look.C: // another hook's may have been the lock that was held
		case <-timeout.C:
			a.m.log.Warn("a hook did not free its output locks in time", "build_id", a.b.id)
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// anyLockHeld tells whether some process holds Nix's lock on one of the paths, as far as
// the daemon can find out; if it cannot, one may be held.
func (a *attempt) anyLockHeld(paths []nix.StorePath) bool {
	return slices.ContainsFunc(paths, func(p nix.StorePath) bool {
		held, err := lockHeld(a.b.store.Real(p) + ".lock")
		return held || err != nil
	})
}

// A fetch copies the outputs of one build.
type fetch struct {
	*attempt
	conn     *localConn
	progress *transfer
}

// output brings one path, unless it turns out to have become valid.
func (f *fetch) output(ctx context.Context, info nix.PathInfo) error {
	for range maxImports {
		valid, err := f.awaitLock(ctx, info.Path)
		if err != nil {
			return err
		}
		if valid {
			f.progress.skip(info)
			return nil
		}
		err = f.importOnce(ctx, info)
		if !errors.Is(err, errStalled) {
			return err
		}
		f.m.log.Warn("import stalled, beginning anew", "path", info.Path)
	}
	return &localError{doing: "import output", err: fmt.Errorf("%s: %w %d times", info.Path, errStalled, maxImports)}
}

// errStalled says that nix-daemon took nothing of an import for importStall.
var errStalled = errors.New("nix-daemon made no progress")

// awaitLock waits until nobody holds the lock on an output, or the output is
// valid. Importing while another process holds it would wait for that process
// inside nix-daemon, where nothing can be seen or asked.
func (f *fetch) awaitLock(ctx context.Context, p nix.StorePath) (valid bool, err error) {
	for polls := 0; ; polls++ {
		held, err := lockHeld(f.b.store.Real(p) + ".lock")
		if err != nil {
			return false, &localError{doing: "look at output lock", err: err}
		}
		if polls > 0 {
			if valid, err := f.conn.IsValidPath(p); err != nil || valid {
				return valid, err
			}
		}
		if !held {
			return false, nil
		}
		if polls%lockReminder == lockReminder-1 {
			f.m.log.Warn("another process holds the lock of an output", "build_id", f.b.id, "path", p)
		}
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

// lockHeld tells whether some process holds Nix's lock on a path. The lock is
// only looked at: a lock file of non-zero size is stale, whoever holds it
// (src/libstore/unix/pathlocks.cc).
func lockHeld(lockFile string) (bool, error) {
	file, err := plainfile.OpenNoFollow(lockFile)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer file.Close()
	if st, err := file.Stat(); err != nil || st.Size() != 0 {
		return false, err
	}
	// A shared lock is enough to find out and lasts until the file is closed, a
	// moment in which an exclusive locker would merely have to try again.
	err = unix.Flock(int(file.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}

// importOnce streams one output from the machine into the local store.
func (f *fetch) importOnce(ctx context.Context, info nix.PathInfo) error {
	watch := newImportWatch(f.conn.abort)
	defer watch.pause()
	var remoteErr error
	err := f.conn.AddToStoreNar(&info, true, func(_ *nix.PathInfo, w io.Writer) error {
		out := f.progress.begin(info, &watchedWriter{importWatch: watch, w: w})
		err := f.r.dump(info, out)
		f.r.heard = time.Now()
		if err != nil && out.err == nil {
			remoteErr = err // reading failed, not writing
		}
		watch.waiting() // for nix-daemon's last word
		return err
	})
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case watch.stalled():
		f.conn.Close()
		conn, err := f.b.store.open(ctx)
		if err != nil {
			return err
		}
		f.conn = conn
		return errStalled
	case remoteErr != nil:
		return f.fault(doingOutputs, remoteErr)
	default:
		return f.importFault(info, err)
	}
}

// importFault tells whose fault a refused import is. What the machine said of the path has
// been checked, and the NAR was one: only its contents may not be those announced.
func (f *fetch) importFault(info nix.PathInfo, err error) error {
	if strings.Contains(nix.PlainText(err.Error()), "mismatch importing path '"+string(info.Path)+"'") {
		return f.fault(doingOutputs, err)
	}
	return &localError{doing: "import output " + string(info.Path), err: err}
}

// pastLock is how many bytes nix-daemon may have been sent, at most, while it
// still waits for the lock of the path: what fits into the socket's buffers. It
// takes the lock before it reads the NAR.
const pastLock = 1 << 20

// An importWatch ends an import that nix-daemon makes no progress with: while a
// write to it is blocked, or its last word is awaited. The time the link to the
// machine needs does not count. Until nix-daemon has surely got the lock it has
// importStall, then diskStall. Used by one goroutine but for the timer.
type importWatch struct {
	timer *time.Timer
	fired atomic.Bool
	taken int64
}

func newImportWatch(abort func()) *importWatch {
	w := &importWatch{}
	w.timer = time.AfterFunc(diskStall, func() {
		w.fired.Store(true)
		abort()
	})
	w.timer.Stop()
	return w
}

func (w *importWatch) stalled() bool { return w.fired.Load() }

// waiting begins a wait for nix-daemon; pause ends it.
func (w *importWatch) waiting() {
	if w.taken > pastLock {
		w.timer.Reset(diskStall)
	} else {
		w.timer.Reset(importStall)
	}
}

func (w *importWatch) pause() { w.timer.Stop() }

// A watchedWriter times the writes to nix-daemon. After a stall it lets the rest
// of the NAR pass into nothing, so that the remote process can be used on.
type watchedWriter struct {
	*importWatch
	w io.Writer
}

func (s *watchedWriter) Write(p []byte) (int, error) {
	if s.stalled() {
		return len(p), nil
	}
	s.waiting()
	n, err := s.w.Write(p)
	s.pause()
	s.taken += int64(n)
	if err != nil && s.stalled() {
		return len(p), nil
	}
	return n, err
}
