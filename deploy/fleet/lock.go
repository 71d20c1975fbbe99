package fleet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// lockFile takes the lock on the file name, creating it, and returns what
// releases it. It waits until ctx is done. The lock ends with this process.
func lockFile(ctx context.Context, name string) (unlock func(), err error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		unlock, err := tryLockFile(name)
		if unlock != nil || err != nil {
			return unlock, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for the lock %s: %w", name, ctx.Err())
		}
	}
}

// tryLockFile is lockFile without the wait: unlock is nil when another holds it.
func tryLockFile(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	switch {
	case err == nil:
		return func() { f.Close() }, nil
	case errors.Is(err, unix.EWOULDBLOCK):
		f.Close()
		return nil, nil
	default:
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
}

// mounted reports whether any process sees a mount that names dir: as the
// place mounted on, or as a layer of an overlay.
func mounted(dir string) bool {
	infos, _ := filepath.Glob("/proc/[0-9]*/mountinfo")
	for _, info := range infos {
		// A process may end meanwhile.
		if text, err := os.ReadFile(info); err == nil && strings.Contains(string(text), dir) {
			return true
		}
	}
	return false
}
