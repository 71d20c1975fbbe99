package buildhook

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"nixdispatch/proto/nix"
)

// outputLocks are the lock files that the asking Nix holds while the hook runs.
// An import through the local nix-daemon would wait for them for ever, so the
// hook frees them when the daemon is about to import.
//
// See PathLocks::lockPaths in src/libstore/unix/pathlocks.cc of Nix 2.34.8.
type outputLocks struct {
	locks []outputLock
}

type outputLock struct {
	output nix.StorePath
	path   string
	fd     int
}

// openOutputLocks opens the lock file of each output of drvPath in a store whose path
// is known. A lock that does not exist is nobody's. The caller must have been asked
// by a Nix that still waits for the answer: it holds them.
func openOutputLocks(store nix.LocalStore, drvPath nix.StorePath) (*outputLocks, error) {
	if drvPath.Dir() != store.Dir {
		return nil, fmt.Errorf("it is not in the store %s", store.Dir)
	}
	drv, err := readDerivation(store.Real(drvPath))
	if err != nil {
		return nil, err
	}
	l := new(outputLocks)
	for _, out := range drv.Outputs {
		if out.Path == "" {
			continue
		}
		lock := outputLock{output: out.Path, path: store.Real(out.Path) + ".lock"}
		lock.fd, err = openFile(lock.path, unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			l.close()
			return nil, fmt.Errorf("open the output's lock: %w", err)
		}
		l.locks = append(l.locks, lock)
	}
	return l, nil
}

func readDerivation(path string) (*nix.Derivation, error) {
	text, err := readFile(path, nix.MaxDerivationSize+1)
	if err != nil {
		return nil, fmt.Errorf("read derivation: %w", err)
	}
	drv, err := nix.ParseDerivation(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return drv, nil
}

// handOver frees the locks of outputs, each at most once: the file is removed
// and marked as stale, so that whoever waits for it looks anew. A lock file that
// is not the one opened is somebody else's and is left alone.
func (l *outputLocks) handOver(outputs []string) error {
	for i := 0; i < len(l.locks); {
		lock := l.locks[i]
		if !slices.Contains(outputs, string(lock.output)) {
			i++
			continue
		}
		if err := lock.free(); err != nil {
			return fmt.Errorf("hand over the lock of '%s': %w", lock.output, err)
		}
		closeFile(lock.fd)
		l.locks = slices.Delete(l.locks, i, i+1)
	}
	return nil
}

func (l outputLock) free() error {
	var there, held unix.Stat_t
	err := unix.Lstat(l.path, &there)
	if err == unix.ENOENT { //nolint:errorlint // unwrapped
		return nil
	}
	if err == nil {
		err = unix.Fstat(l.fd, &held)
	}
	if err != nil {
		return &os.PathError{Op: "look at", Path: l.path, Err: err}
	}
	if held.Dev != there.Dev || held.Ino != there.Ino {
		return nil
	}
	if err := unix.Unlink(l.path); err != nil {
		return &os.PathError{Op: "remove", Path: l.path, Err: err}
	}
	if _, err := unix.Write(l.fd, []byte("d")); err != nil { // Nix's mark, see deleteLockFile
		return &os.PathError{Op: "write to", Path: l.path, Err: err}
	}
	return nil
}

func (l *outputLocks) close() {
	for _, lock := range l.locks {
		closeFile(lock.fd)
	}
	l.locks = nil
}
