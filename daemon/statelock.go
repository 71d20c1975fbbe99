package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lockName is the file in the state directory that a daemon holds a lock on.
	lockName = "lock"
	// lockPatience is how long a daemon waits without a word for one that holds its
	// state directory, and altogether for one that is not shutting down.
	lockPatience = 2 * time.Second
	// lockPause is the time between two tries: flock tells nobody when it is free.
	lockPause = 50 * time.Millisecond
	// maxLockText bounds what is read from the lock file.
	maxLockText = 64
	// lockStopping follows the process's number while the holder shuts down.
	lockStopping = "stopping"
)

// A stateLock keeps other daemons from a state directory: the history, drained
// machines and detached builds in it have one writer. The kernel frees it when the
// process ends, however that happens. It is for one goroutine.
type stateLock struct{ f *os.File }

// lockState takes the lock of a state directory. It waits for a daemon that is
// shutting down to the end of ctx, as that may take as long as its builds, and
// refuses to start beside one that is not. The caller must call release.
func lockState(ctx context.Context, dir string, log *slog.Logger) (*stateLock, error) {
	name := filepath.Join(dir, lockName)
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	begin, told := time.Now(), false
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			l := &stateLock{f}
			return l, l.note("")
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
		}
		holder, stopping := lockHolder(f)
		late := time.Since(begin) >= lockPatience
		switch {
		case late && !stopping:
			return nil, errors.Join(fmt.Errorf("state directory %s: another nix-dispatchd (%s) uses it; "+
				"stop that one first, or choose another directory with --state-dir", dir, holder), f.Close())
		case late && !told:
			told = true
			log.Info("waiting for the nix-dispatchd that is shutting down", "holder", holder, "state_dir", dir)
		}
		if err := sleep(ctx, lockPause); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
}

// lockHolder says who holds the lock, by what that process wrote into the file.
func lockHolder(f *os.File) (holder string, stopping bool) {
	text, err := io.ReadAll(io.NewSectionReader(f, 0, maxLockText))
	pid, rest, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
	if n, numErr := strconv.ParseUint(pid, 10, 31); err != nil || numErr != nil || n == 0 {
		return "process unknown", false
	}
	return "process " + pid, rest == lockStopping
}

// stopping tells who waits for the lock that the daemon shuts down.
func (l *stateLock) stopping() error { return l.note(" " + lockStopping) }

func (l *stateLock) note(state string) error {
	text := strconv.Itoa(os.Getpid()) + state + "\n"
	_, err := l.f.WriteAt([]byte(text), 0)
	if err == nil {
		err = l.f.Truncate(int64(len(text)))
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", l.f.Name(), err)
	}
	return nil
}

// release lets another daemon use the directory. It may be called more than once.
func (l *stateLock) release() { _ = l.f.Close() } // which frees the lock, whatever it says
