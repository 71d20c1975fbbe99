package fleet

import (
	"bufio"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

//go:embed systemd.sh
var systemdScript string

// systemdLayer returns the directory that is laid over a suite's base root for
// hosts with systemd, making it if needed.
func systemdLayer(ctx context.Context, log *slog.Logger, suite, base string) (string, error) {
	sum := sha256.Sum256([]byte(systemdScript))
	prefix := base + ".systemd-"
	dir := prefix + hex.EncodeToString(sum[:6])
	return cachedRoot(ctx, log, "systemd for "+suite, suite, dir, func() error {
		removeOldRoots(log, prefix+"*", filepath.Join(filepath.Dir(base), "."+filepath.Base(prefix)+"*"))
		return buildRoot(ctx, log, suite, dir, systemdScript, base)
	})
}

// PrepareSystemd is Prepare for hosts with HostConfig.Systemd.
func PrepareSystemd(ctx context.Context, log *slog.Logger, suites ...string) error {
	return prepare(suites, func(suite string) error {
		base, err := baseRoot(ctx, log, suite)
		if err == nil {
			_, err = systemdLayer(ctx, log, suite, base)
		}
		return err
	})
}

// runSystemd is the end of a host's init script: systemd takes over as process 1, in
// a control group of its own, which it takes for the root of all.
func (h *Host) runSystemd() string {
	group := shellQuote("/sys/fs/cgroup/" + h.cgroup())
	return "mount -t cgroup2 none /sys/fs/cgroup\nmkdir -p " + group + "\necho $$ >" + group + "/cgroup.procs\n" +
		"umount /sys/fs/cgroup\n" +
		"exec unshare --cgroup sh -c 'mount -t cgroup2 none /sys/fs/cgroup; exec env -i PATH=" + hostPath +
		" container=fleet /lib/systemd/systemd --unit=multi-user.target --log-target=console'\n"
}

// cgroup is the name of the host's own control group.
func (h *Host) cgroup() string { return cgroupPrefix(h.fleet.dir) + h.name }

// cgroupPrefix begins the names of the control groups of the fleet in dir. Another
// cache may hold a fleet of the same name, so the whole path is in it.
func cgroupPrefix(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return "nix-dispatch-fleet." + filepath.Base(dir) + "." + hex.EncodeToString(sum[:4]) + "."
}

// removeCgroups removes the empty control groups that hosts with systemd leave.
// pattern is matched as a whole, as by filepath.Match: one host's group is no other's
// because its name begins in the same way.
func removeCgroups(pattern string) error {
	groups, err := filepath.Glob(filepath.Join(cgroupMount(), pattern))
	for _, group := range groups {
		var dirs []string
		err = errors.Join(err, filepath.WalkDir(group, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		}))
		for _, dir := range slices.Backward(dirs) {
			if rmErr := unix.Rmdir(dir); rmErr != nil && rmErr != unix.ENOENT {
				err = errors.Join(err, &fs.PathError{Op: "rmdir", Path: dir, Err: rmErr})
			}
		}
	}
	return err
}

// cgroupMount is where this machine has the second version of control groups.
func cgroupMount() string {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "/sys/fs/cgroup"
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		words := strings.Fields(lines.Text())
		if i := slices.Index(words, "-"); i > 4 && i+1 < len(words) && words[i+1] == "cgroup2" {
			return words[4]
		}
	}
	return "/sys/fs/cgroup"
}
