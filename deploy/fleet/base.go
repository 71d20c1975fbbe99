package fleet

import (
	"bufio"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// The Debian suites a host can be made from, by the Nix they carry. Sid moves:
// its Nix is whatever Debian has when the base root is made.
const (
	Bookworm = "bookworm" // Nix 2.8.0
	Trixie   = "trixie"   // Nix 2.26.3
	Sid      = "sid"      // Nix 2.34 or newer
)

// Suites are all suites, oldest Nix first.
func Suites() []string { return []string{Bookworm, Trixie, Sid} }

//go:embed base.sh
var baseScript string

// CacheDir is where base roots and the run directories of fleets are kept:
// NIX_DISPATCH_FLEET_CACHE, by default /var/cache/nix-dispatch-fleet. It must
// be on a file system that can be the upper layer of an overlay (ext4, xfs,
// btrfs, tmpfs; not itself an overlay).
func CacheDir() string {
	if dir := os.Getenv("NIX_DISPATCH_FLEET_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/nix-dispatch-fleet"
}

// Prepare makes the base roots of the suites that are not in the cache yet, all
// suites when none is named. Making one downloads about 65 MB from the Debian
// mirror of this machine's apt sources and takes a minute or two; log gets a line
// at every step and every 15 seconds. Several processes may prepare at once: one
// builds a root, the others wait for it. A root appears in the cache only when
// it is complete.
func Prepare(ctx context.Context, log *slog.Logger, suites ...string) error {
	return prepare(suites, func(suite string) error {
		_, err := baseRoot(ctx, log, suite)
		return err
	})
}

func prepare(suites []string, one func(suite string) error) error {
	if len(suites) == 0 {
		suites = Suites()
	}
	var g errgroup.Group
	for _, suite := range slices.Compact(slices.Sorted(slices.Values(suites))) {
		g.Go(func() error { return one(suite) })
	}
	return g.Wait()
}

// baseRoot returns the directory of a suite's base root, making it if needed.
func baseRoot(ctx context.Context, log *slog.Logger, suite string) (string, error) {
	if !slices.Contains(Suites(), suite) {
		return "", fmt.Errorf("unknown suite %q: want one of %s", suite, strings.Join(Suites(), ", "))
	}
	sum := sha256.Sum256([]byte(baseScript + "\x00" + runtime.GOARCH))
	roots := filepath.Join(CacheDir(), "roots")
	dir := filepath.Join(roots, suite+"-"+hex.EncodeToString(sum[:6]))
	return cachedRoot(ctx, log, "base root of "+suite, suite, dir, func() error {
		mirror, err := hostMirror()
		if err != nil {
			return err
		}
		removeOldRoots(log, filepath.Join(roots, suite+"-*"), filepath.Join(roots, "."+suite+"-*"))
		return buildRoot(ctx, log, suite, dir, baseScript, mirror.URI, mirror.Keyring)
	})
}

// cachedRoot returns dir, which make makes if it is not there. The suite's lock is
// held meanwhile.
func cachedRoot(ctx context.Context, log *slog.Logger, what, suite, dir string, make func() error) (string, error) {
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if os.Geteuid() != 0 {
		return "", fmt.Errorf("%s is not in %s, and making it needs root", what, CacheDir())
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return "", fmt.Errorf("make %s: %w", what, err)
	}
	lock := filepath.Join(CacheDir(), suite+".lock")
	unlock, err := tryLockFile(lock)
	if err == nil && unlock == nil {
		log.Info("waiting for another process, which makes the "+what, "lock", lock)
		unlock, err = lockFile(ctx, lock)
	}
	if err != nil {
		return "", fmt.Errorf("make %s: %w", what, err)
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil { // another process made it meanwhile
		return dir, nil
	}
	if err := make(); err != nil {
		return "", fmt.Errorf("make %s: %w", what, err)
	}
	return dir, nil
}

// buildRoot has a script make a directory of the cache: it gets the suite, an empty
// directory, args and where downloaded packages are kept.
func buildRoot(ctx context.Context, log *slog.Logger, suite, dir, script string, args ...string) error {
	if err := EnsureTools(ctx, log); err != nil {
		return err
	}
	temp := filepath.Join(filepath.Dir(dir), "."+filepath.Base(dir))
	debs := filepath.Join(CacheDir(), "debs", suite)
	for _, d := range []string{temp, debs} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	started := time.Now()
	logName := filepath.Join(CacheDir(), suite+".log")
	if err := runScript(ctx, log, logName, script, suite, append(append([]string{temp}, args...), debs)...); err != nil {
		log.Info("removing the unfinished root", "suite", suite)
		return errors.Join(err, os.RemoveAll(temp))
	}
	if err := os.Rename(temp, dir); err != nil {
		return err
	}
	log.Info("root made", "suite", suite, "seconds", int(time.Since(started).Seconds()))
	return nil
}

// removeOldRoots removes what an interrupted run or an older recipe left, as
// far as no host stands on it. The caller holds the suite's lock.
func removeOldRoots(log *slog.Logger, patterns ...string) {
	for _, pattern := range patterns {
		old, _ := filepath.Glob(pattern)
		for _, dir := range old {
			if mounted(dir) {
				continue
			}
			if err := os.RemoveAll(dir); err != nil {
				log.Warn("old base root stays", "dir", dir, "err", err)
			}
		}
	}
}

func runScript(ctx context.Context, log *slog.Logger, logName, script, suite string, args ...string) error {
	logFile, err := os.Create(logName)
	if err != nil {
		return err
	}
	defer logFile.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, "/bin/sh", append([]string{"-c", script, "script", suite}, args...)...)
	cmd.Stdout, cmd.Stderr = w, w
	cmd.WaitDelay = 10 * time.Second
	// Pdeathsig is tied to the thread that starts the child, so the whole run
	// keeps this one.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID,
		Pdeathsig:  unix.SIGKILL,
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { relay(log, suite, r, logFile) })
	wg.Go(func() { heartbeat(log, suite, stop) })
	err = cmd.Wait()
	close(stop)
	wg.Wait()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err() // it was killed, so its output does not say why
	}
	text, readErr := os.ReadFile(logName)
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	return fmt.Errorf("%w; the end of %s:\n%s", err, logName, tail(text, 2000))
}

// relay copies the script's output to the log file and its own lines, which
// begin with the suite, to log.
func relay(log *slog.Logger, suite string, r *os.File, file *os.File) {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadString('\n')
		file.WriteString(line)
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), suite+": "); ok {
			log.Info("base root: "+text, "suite", suite)
		}
		if err != nil {
			return
		}
	}
}

func heartbeat(log *slog.Logger, suite string, stop <-chan struct{}) {
	started := time.Now()
	tick := time.NewTicker(15 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			log.Info("base root: still working", "suite", suite, "seconds", int(time.Since(started).Seconds()))
		case <-stop:
			return
		}
	}
}
