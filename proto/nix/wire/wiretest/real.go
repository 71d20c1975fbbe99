package wiretest

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"nixdispatch/proto/nix"
)

// A RealNix is an installed Nix.
type RealNix struct {
	// Version is what it says of itself, such as "2.34.8".
	Version string
	root    string // directory to change root to; "" for none
}

// RealNixes finds the installed Nixes: the one in PATH, and with the rights of
// root those in the base roots of the test fleet (package deploy/fleet). The
// test is skipped if there is none, and fails instead where CI or
// NIX_DISPATCH_REQUIRE_FLEET is set in the environment.
func RealNixes(t testing.TB) []RealNix {
	t.Helper()
	var found []RealNix
	if _, err := exec.LookPath("nix-store"); err == nil {
		found = append(found, RealNix{})
	}
	if os.Geteuid() == 0 {
		cache := os.Getenv("NIX_DISPATCH_FLEET_CACHE")
		if cache == "" {
			cache = "/var/cache/nix-dispatch-fleet"
		}
		roots, _ := filepath.Glob(filepath.Join(cache, "roots", "*-*[0-9a-f]")) // the pattern is good
		for _, root := range roots {
			// With a dot it is a layer to be laid over a root, of hosts with systemd.
			if !strings.Contains(filepath.Base(root), ".") {
				found = append(found, RealNix{root: root})
			}
		}
	}
	if len(found) == 0 {
		if os.Getenv("CI") != "" || os.Getenv("NIX_DISPATCH_REQUIRE_FLEET") != "" {
			t.Fatal("no Nix is installed, which this environment requires")
		}
		t.Skip("no Nix is installed")
	}
	var nixes []RealNix // one of each version
	for _, n := range found {
		words := strings.Fields(string(n.NewStore(t).Output("nix-store", "--version")))
		n.Version = words[len(words)-1]
		if !slices.ContainsFunc(nixes, func(m RealNix) bool { return m.Version == n.Version }) {
			nixes = append(nixes, n)
		}
	}
	return nixes
}

// A RealStore is an empty store of a real Nix, away from /nix.
type RealStore struct {
	t    testing.TB
	nix  RealNix
	host string // the directory of everything, as the test sees it
	dir  string // the same, as Nix sees it
}

// NewStore makes a store that goes away with the test.
func (n RealNix) NewStore(t testing.TB) *RealStore {
	host := t.TempDir()
	dir := host
	if n.root != "" {
		dir = "/mnt"
	}
	// Store directories are read-only, which keeps TempDir from removing them.
	t.Cleanup(func() {
		filepath.WalkDir(host, func(path string, d os.DirEntry, _ error) error {
			if d != nil && d.IsDir() {
				os.Chmod(path, 0o700) //nolint:errcheck // RemoveAll will tell
			}
			return nil
		})
	})
	return &RealStore{t: t, nix: n, host: host, dir: dir}
}

// Path makes a path in the store's directory; see [Path].
func (s *RealStore) Path(n int, name string) nix.StorePath {
	return nix.StorePath(s.dir + "/store/" + Path(n, name).Base())
}

// File is a file outside the store by its two names, the test's and Nix's.
func (s *RealStore) File(name string) (host, inside string) {
	return filepath.Join(s.host, name), filepath.Join(s.dir, name)
}

// enterRoot runs "$2"... in the base root "$0" with the directory "$1" at /mnt, in a
// mount namespace of its own. The base root is other tests' too, and the lower
// layer of running hosts: it is mounted read-only, for Nix makes what it misses
// even for --version.
const enterRoot = `
set -e
mount --bind "$0" "$0"
mount -o remount,bind,ro "$0"
mount -t proc proc "$0/proc"
mount --rbind /dev "$0/dev"
mount -t tmpfs tmpfs "$0/tmp"
mount --bind "$1" "$0/mnt"
root=$0
shift
exec chroot "$root" "$@"`

func (s *RealStore) command(argv ...string) *exec.Cmd {
	if s.nix.root != "" {
		argv = append([]string{s.nix.root, s.host}, argv...)
		argv = append([]string{"unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", enterRoot}, argv...)
	}
	cmd := exec.CommandContext(s.t.Context(), argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "TMPDIR=" + s.dir, "NIX_CONF_DIR=" + s.dir + "/etc",
		"NIX_STORE_DIR=" + s.dir + "/store", "NIX_STATE_DIR=" + s.dir + "/var", "NIX_LOG_DIR=" + s.dir + "/log",
		"NIX_CONFIG=sandbox = false\nbuild-users-group =\nsubstituters =",
	}
	return cmd
}

// Output runs a program of Nix to its end and returns what it prints.
func (s *RealStore) Output(argv ...string) []byte {
	s.t.Helper()
	cmd := s.command(argv...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, stderr.Bytes())
	}
	return out
}

// Instantiate makes a derivation that runs script and returns its path.
func (s *RealStore) Instantiate(name, script string) nix.StorePath {
	s.t.Helper()
	out := s.Output("nix-instantiate", "--argstr", "name", name, "--argstr", "script", script, "--expr",
		`{ name, script }: derivation { inherit name; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" script ]; }`)
	path, _, _ := strings.Cut(strings.TrimSpace(string(out)), "!")
	return nix.StorePath(path)
}

// Start runs a program of Nix that speaks a protocol on its standard streams.
// It ends with the test, or when in is closed.
func (s *RealStore) Start(argv ...string) (out io.Reader, in io.WriteCloser) {
	s.t.Helper()
	cmd := s.command(argv...)
	in, err := cmd.StdinPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	out, err = cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	stderr := &syncBuffer{}
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		in.Close()
		cmd.Wait() //nolint:errcheck // the protocol has its own ends
		if s.t.Failed() {
			s.t.Logf("%s printed: %s", argv[0], stderr.String())
		}
	})
	return out, in
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
