package fleet

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// HostConfig says what a host is. Only Name is required.
type HostConfig struct {
	// Name is the host name: lower-case letters, digits and dashes.
	Name string

	// Suite chooses the Nix: Bookworm, Trixie (the default) or Sid.
	Suite string

	// NixConf is appended to /etc/nix/nix.conf, and wins over what is there:
	// sandbox = false, no substituters, experimental-features = nix-command,
	// trusted-users = root.
	NixConf string

	// SystemFeatures is Nix's setting system-features. Nil: Nix's own default.
	SystemFeatures []string

	// NixTrusted puts the user nix, whom others reach as nix@Name, among the
	// trusted-users.
	NixTrusted bool

	// SSHDConfig is sshd_config(5) text that wins over the fleet's own, such as
	// "MaxSessions 2". Match blocks may be used.
	SSHDConfig string

	// NixDaemon says how nix-daemon is started.
	NixDaemon NixDaemon

	// NoDaemon leaves nix-daemon off (StartNixDaemon starts it later).
	NoDaemon bool

	// Systemd makes systemd process 1, of the suite's version, and nix-daemon a service
	// of it, with Debian's own unit; NixDaemon and NoDaemon do not apply. It has no say
	// over resources: the host's control group has no controllers.
	Systemd bool

	// Binds shows directories or files of this machine in the host, read-only:
	// absolute path in the host -> path here.
	Binds map[string]string
}

// NixDaemon says how a host's nix-daemon is started.
type NixDaemon struct {
	Env  []string // further environment, "NAME=value"
	Args []string // command line, such as "--option", "build-hook", "..."
}

// A Host is one machine: a root of its own (an overlay on a suite's base root),
// namespaces of its own (mount, pid, uts, ipc, network), sshd on port 22 and
// nix-daemon. Users are root, alice and bob (ordinary users) and nix (for SSH);
// root and alice have the fleet's SSH key and known_hosts, and the key lets in
// as root, nix and alice. Methods may be called concurrently.
type Host struct {
	fleet *Fleet
	name  string
	index int
	dir   string // upper and work: the overlay's, root: where it is mounted, nix: /nix
	base  string
	layer string  // over base; "" for none
	key   keyPair // of sshd

	powerMu sync.Mutex // one of Boot, Kill, Freeze, CutOff... at a time

	mu     sync.Mutex // guards the fields below
	config HostConfig
	init   process // zero when off
	cut    bool
	frozen bool
}

// ErrOff says that a host is not running.
var ErrOff = errors.New("the host is off")

// Host makes a host and boots it; it returns when sshd and nix-daemon answer.
// The suite's base root is made first if it is not in the cache: see Prepare.
func (f *Fleet) Host(ctx context.Context, config HostConfig) (*Host, error) {
	if config.Suite == "" {
		config.Suite = Trixie
	}
	if !nameForm.MatchString(config.Name) {
		return nil, fmt.Errorf("host name %q: want lower-case letters, digits and dashes", config.Name)
	}
	base, err := baseRoot(ctx, f.log, config.Suite)
	if err != nil {
		return nil, fmt.Errorf("make host %s: %w", config.Name, err)
	}
	key, err := newKeyPair()
	if err != nil {
		return nil, fmt.Errorf("make host %s: %w", config.Name, err)
	}
	h := &Host{fleet: f, name: config.Name, dir: f.hostDir(config.Name), base: base, key: key, config: config}
	if config.Systemd {
		if h.layer, err = systemdLayer(ctx, f.log, config.Suite, base); err != nil {
			return nil, fmt.Errorf("make host %s: %w", config.Name, err)
		}
	}
	if err := f.add(h); err != nil {
		return nil, fmt.Errorf("make host %s: %w", config.Name, err)
	}
	if err := h.create(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("make host %s: %w", config.Name, err), h.Remove(context.WithoutCancel(ctx)))
	}
	return h, nil
}

// add gives the host its index.
func (f *Fleet) add(h *Host) error {
	f.hostsMu.Lock()
	defer f.hostsMu.Unlock()
	if _, taken := f.hosts[h.name]; taken {
		return errors.New("the fleet has a host of that name")
	}
	if _, taken := f.far[h.name]; taken {
		return errors.New("the fleet has a proxy of that name")
	}
	if len(f.hosts) >= maxHosts {
		return fmt.Errorf("a fleet has room for %d hosts", maxHosts)
	}
	h.index = firstHost
	for f.hasIndex(h.index) {
		h.index++
	}
	f.hosts[h.name] = h
	return nil
}

// hasIndex needs hostsMu.
func (f *Fleet) hasIndex(index int) bool {
	for _, h := range f.hosts {
		if h.index == index {
			return true
		}
	}
	return false
}

func (h *Host) create(ctx context.Context) error {
	for _, sub := range []string{"upper", "work", "root", "nix"} {
		if err := os.MkdirAll(filepath.Join(h.dir, sub), 0o755); err != nil {
			return err
		}
	}
	if err := h.Boot(ctx); err != nil {
		return err
	}
	return h.fleet.tellNames(ctx)
}

// Remove kills the host and removes all it has written.
func (h *Host) Remove(ctx context.Context) error {
	f := h.fleet
	f.hostsMu.Lock()
	known := f.hosts[h.name] == h
	f.hostsMu.Unlock()
	if !known {
		return nil
	}
	err := h.Kill(ctx)
	if err == nil {
		err = removeTree(ctx, h.dir)
	}
	if err != nil {
		return fmt.Errorf("remove host %s: %w", h.name, err)
	}
	f.hostsMu.Lock()
	delete(f.hosts, h.name)
	f.hostsMu.Unlock()
	return f.save()
}

func (f *Fleet) hostDir(name string) string { return filepath.Join(f.dir, "hosts", name) }

// Name is the host's name, which every host of the fleet resolves.
func (h *Host) Name() string { return h.name }

// Addr is the host's IPv4 address on the fleet's network.
func (h *Host) Addr() string { return hostAddr(h.index) }

// Suite is the Debian suite the host is made from.
func (h *Host) Suite() string { return h.snapshot().Config.Suite }

// HostKey is the public key of the host's sshd, "ssh-ed25519 AAAA...".
func (h *Host) HostKey() string { return h.key.Public }

// NixVersion is the version of the host's Nix, such as "2.26.3".
func (h *Host) NixVersion() string {
	text, err := os.ReadFile(filepath.Join(h.base, "etc/nix-version"))
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(text))
}

// Root is the host's root directory as this machine sees it, while the host is
// on. Symbolic links in it lead out of it: ReadFile and WriteFile do not follow
// them there, plain file operations do.
func (h *Host) Root() string { return fmt.Sprintf("/proc/%d/root", h.snapshot().Init.PID) }

// On reports whether the host runs.
func (h *Host) On() bool { return h.snapshot().Init.alive() }

// PID is the process id, on this machine, of the host's first process; its
// namespaces are the host's. 0 when the host is off.
func (h *Host) PID() int {
	if p := h.snapshot().Init; p.alive() {
		return p.PID
	}
	return 0
}

func (h *Host) snapshot() hostState {
	h.mu.Lock()
	defer h.mu.Unlock()
	return hostState{
		Config: h.config, Index: h.index, Base: h.base, Layer: h.layer, HostKey: h.key,
		Init: h.init, Cut: h.cut, Frozen: h.frozen,
	}
}

func (h *Host) change(fn func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	fn()
}

// State is one word: "off", "frozen", "cut off" or "on".
func (h *Host) State() string {
	s := h.snapshot()
	switch {
	case !s.Init.alive():
		return "off"
	case s.Frozen:
		return "frozen"
	case s.Cut:
		return "cut off"
	default:
		return "on"
	}
}
