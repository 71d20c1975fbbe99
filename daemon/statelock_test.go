package daemon

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A lockedLog is a log that is read while it is written.
type lockedLog struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func TestStateLock(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var log lockedLog
	logger := slog.New(slog.NewTextHandler(&log, nil))
	// What a process that was killed has left means nothing.
	if err := os.WriteFile(filepath.Join(dir, lockName), []byte(strings.Repeat("99 stopping\n", 20)), 0o600); err != nil {
		t.Fatal(err)
	}
	first, err := lockState(t.Context(), dir, logger)
	if err != nil {
		t.Fatal(err)
	}
	me := fmt.Sprintf("(process %d)", os.Getpid())
	if _, err := lockState(t.Context(), dir, logger); err == nil || !strings.Contains(err.Error(), me) || !strings.Contains(err.Error(), dir) {
		t.Errorf("beside one that serves: %v, want an error that names the directory and %s", err, me)
	}
	if err := first.stopping(); err != nil {
		t.Fatal(err)
	}
	type result struct {
		l   *stateLock
		err error
	}
	taken := make(chan result, 1)
	go func() {
		l, err := lockState(t.Context(), dir, logger)
		taken <- result{l, err}
	}()
	for deadline := time.Now().Add(patience); !strings.Contains(log.String(), "waiting for the nix-dispatchd that is shutting down"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the wait is not told; the log:\n%s", log.String())
		}
	}
	if !strings.Contains(log.String(), fmt.Sprintf(`"process %d"`, os.Getpid())) {
		t.Errorf("the log does not name the process: %s", log.String())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := lockState(ctx, dir, logger); err == nil {
		t.Error("a daemon that is to stop has taken the lock")
	}
	select {
	case r := <-taken:
		t.Fatalf("taken before it was free: %v", r.err)
	default:
	}
	first.release()
	select {
	case r := <-taken:
		if r.err != nil {
			t.Fatal(r.err)
		}
		r.l.release()
	case <-time.After(patience):
		t.Fatal("the lock is free, and not taken")
	}
	// A name that leads elsewhere is not followed.
	elsewhere := t.TempDir()
	if err := os.Symlink("/dev/null", filepath.Join(elsewhere, lockName)); err != nil {
		t.Fatal(err)
	}
	if _, err := lockState(t.Context(), elsewhere, logger); err == nil {
		t.Error("a link was taken for the lock")
	}
}

// The next daemon may be started while this one still lets a build end. It takes over
// when that is done, with all that this one has written down.
func TestSuccessorTakesOver(t *testing.T) {
	t.Parallel()
	s, h, call, release := draining(t, time.Hour, nil)
	opts := s.d.opts
	var log lockedLog
	opts.Version, opts.Logger = "the next", slog.New(slog.NewTextHandler(&log, nil))
	next, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	next.stores.own.LocalStore, next.ssh = s.store(), s.d.ssh
	next.ssh.OnChange = next.hostChanged
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- next.Run(ctx) }()
	defer func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run of the next daemon: %v", err)
			}
		case <-time.After(patience):
			t.Error("the next daemon does not end")
		}
	}()
	s.eventually("the next daemon says what it waits for", func() bool {
		return strings.Contains(log.String(), "waiting for the nix-dispatchd that is shutting down")
	})
	if v := s.status().GetVersion(); v != opts.Version && v != s.d.opts.Version {
		t.Errorf("a daemon of version %q answers", v)
	}
	release()
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	(<-call).mustSucceed(t)
	s.eventually("the next daemon answers", func() bool {
		r, err := s.client.Status(t.Context(), &dispatchv1.StatusRequest{})
		return err == nil && r.GetVersion() == opts.Version
	})
	s.ended(3, &dispatchv1.HistoryRequest{})
	if last := next.dispatcher.nextID(); last <= 3 {
		t.Errorf("the next build is number %d, after three", last)
	}
}
