package fleet

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"
)

// A tool is a program the fleet runs on this machine and the Debian package
// that brings it.
type tool struct{ program, pkg string }

var (
	runTools   = []tool{{"ip", "iproute2"}, {"bridge", "iproute2"}, {"tc", "iproute2"}, {"nsenter", "util-linux"}, {"pivot_root", "util-linux"}, {"mount", "mount"}}
	buildTools = []tool{{"debootstrap", "debootstrap"}}
)

// EnsureTools installs, with apt-get, the packages whose programs a fleet needs
// on this machine and does not find. It changes nothing when all are there. log gets
// a line when it installs something.
func EnsureTools(ctx context.Context, log *slog.Logger) error {
	return ensureTools(ctx, log, slices.Concat(runTools, buildTools))
}

// toolsMu lets one apt-get run at a time in this process.
var toolsMu sync.Mutex

func ensureTools(ctx context.Context, log *slog.Logger, tools []tool) error {
	toolsMu.Lock()
	defer toolsMu.Unlock()
	packages := missing(tools)
	if len(packages) == 0 {
		return nil
	}
	names := strings.Join(packages, " ")
	aptGet, err := exec.LookPath("apt-get")
	if err != nil || os.Geteuid() != 0 {
		return fmt.Errorf("programs are missing: install what Debian has in the packages %s", names)
	}
	log.Info("installing " + names)
	install := append([]string{"install", "-qq", "-y", "--no-install-recommends"}, packages...)
	if aptRun(ctx, aptGet, install...) == nil && len(missing(tools)) == 0 {
		return nil
	}
	// The package lists may be absent or old.
	if err := aptRun(ctx, aptGet, "update", "-qq"); err != nil {
		return err
	}
	if err := aptRun(ctx, aptGet, install...); err != nil {
		return err
	}
	if left := missing(tools); len(left) > 0 {
		return fmt.Errorf("apt-get installed %s, but their programs are not in PATH", strings.Join(left, " "))
	}
	return nil
}

func aptRun(ctx context.Context, aptGet string, args ...string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, aptGet, args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	// apt-get ends at once at SIGINT while it downloads, and lets dpkg finish, so that
	// no package is left half installed.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Minute
	if out, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("apt-get %s: %w: %s", strings.Join(args, " "), err, tail(out, 2000))
	}
	return nil
}

func missing(tools []tool) []string {
	var packages []string
	for _, t := range tools {
		if _, err := findTool(t.program); err != nil && !slices.Contains(packages, t.pkg) {
			packages = append(packages, t.pkg)
		}
	}
	return packages
}

// findTool looks in PATH and then in the sbin directories, which are not in
// every root's PATH.
func findTool(program string) (string, error) {
	if p, err := exec.LookPath(program); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		if p, err := exec.LookPath(dir + "/" + program); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s: not found in PATH, /usr/sbin or /sbin", program)
}

// tail returns the end of text, at most n bytes, from the beginning of a line.
func tail(text []byte, n int) string {
	s := strings.TrimSpace(string(text))
	if len(s) <= n {
		return s
	}
	s = s[len(s)-n:]
	if _, after, ok := strings.Cut(s, "\n"); ok {
		s = after
	}
	return "..." + s
}
