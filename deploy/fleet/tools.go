package fleet

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// A tool is a program the fleet runs on this machine and the Debian package
// that brings it.
type tool struct{ program, pkg string }

var (
	runTools   = []tool{{"ip", "iproute2"}, {"bridge", "iproute2"}, {"tc", "iproute2"}, {"nsenter", "util-linux"}, {"pivot_root", "util-linux"}, {"mount", "mount"}}
	buildTools = []tool{{"debootstrap", "debootstrap"}}
)

// EnsureTools installs, with apt-get, the packages whose programs a fleet needs
// on this machine and does not find. It changes nothing when all are there.
func EnsureTools(ctx context.Context) error {
	return ensureTools(ctx, slices.Concat(runTools, buildTools))
}

func ensureTools(ctx context.Context, tools []tool) error {
	packages := missing(tools)
	if len(packages) == 0 {
		return nil
	}
	aptGet, err := exec.LookPath("apt-get")
	if err != nil || os.Geteuid() != 0 {
		return fmt.Errorf("a fleet needs the Debian packages %s: install them", strings.Join(packages, " "))
	}
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
	cmd := exec.CommandContext(ctx, aptGet, args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	if out, err := cmd.CombinedOutput(); err != nil {
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
