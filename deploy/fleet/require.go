package fleet

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// TB is the part of testing.TB that Require uses.
type TB interface {
	Helper()
	Skipf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// Require ends a test that needs a fleet where there can be none: it is skipped
// with the reason, or fails if CI or NIX_DISPATCH_REQUIRE_FLEET is set in the
// environment, so that nobody takes a skip for a pass.
func Require(t TB) {
	t.Helper()
	require(t, Available())
}

func require(t TB, err error) {
	t.Helper()
	if err == nil {
		return
	}
	for _, name := range []string{"NIX_DISPATCH_REQUIRE_FLEET", "CI"} {
		if os.Getenv(name) != "" {
			t.Fatalf("what this test needs is not here: %v (%s is set, so this is not skipped)", err, name)
			return
		}
	}
	t.Skipf("what this test needs is not here: %v", err)
}

// RequireProgram finds a program for a test that needs it, and ends the test as
// Require does where it is not installed.
func RequireProgram(t TB, name string) (path string) {
	t.Helper()
	path, err := exec.LookPath(name)
	require(t, err)
	return path
}

// tryNamespaces starts a process the way hosts are started.
func tryNamespaces() error {
	cmd := exec.Command("/bin/sh", "-c", "mount --make-rprivate / && mount -t tmpfs tmpfs /mnt && mount -t proc proc /proc")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: hostNamespaces}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("this process may not make namespaces and mounts (a container must be privileged: docker run --privileged): %w: %s", err, tail(out, 300))
	}
	return nil
}

// checkCache says why a host's root cannot be made in CacheDir.
func checkCache() error {
	dir := CacheDir()
	var fs unix.Statfs_t
	for err := unix.Statfs(dir, &fs); err != nil; err = unix.Statfs(dir, &fs) {
		if err != unix.ENOENT || dir == filepath.Dir(dir) {
			return fmt.Errorf("look at %s: %w", dir, err)
		}
		dir = filepath.Dir(dir) // it is made when it is needed
	}
	if fs.Type == unix.OVERLAYFS_SUPER_MAGIC {
		return fmt.Errorf("%s is on an overlay file system, which cannot be the upper layer of another: "+
			"set NIX_DISPATCH_FLEET_CACHE to a directory on ext4, xfs, btrfs or tmpfs", CacheDir())
	}
	return nil
}

const hostNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET
