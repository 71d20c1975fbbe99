package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"nixdispatch/cmd/internal/buildhook"
	"nixdispatch/cmd/internal/daemonsocket"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/sshpool/plainfile"
)

// A host is this computer as the doctor sees it. The fields are for tests.
type host struct {
	uid    int
	getenv func(string) string
	// proc is the directory /proc.
	proc     string
	readFile func(string) ([]byte, error)
	// askNix asks the local nix-daemon who it is; askOwn asks the Nix of a store that
	// this user opens without it.
	askNix, askOwn func() (localNix, error)
	// findStock finds Nix's own hook as buildhook.FindStock does.
	findStock func(getenv func(string) string, startedBy string) (string, error)
	group     func(name string) (*user.Group, error)
	// home is the user's directory; rootHome and rootUID are root's home directory and number.
	home, rootHome string
	rootUID        int
}

// A localNix is a running nix-daemon. The caller must close it.
type localNix struct {
	version string
	trust   worker.Trust
	close   func()
}

func thisHost() *host {
	return &host{
		uid: os.Getuid(), getenv: os.Getenv, proc: "/proc", readFile: readConfFile,
		askNix: askNix, askOwn: askOwn, home: os.Getenv("HOME"), findStock: buildhook.FindStock, group: user.LookupGroup, rootHome: "/root",
	}
}

// askTimeout bounds the conversation with the local nix-daemon.
const askTimeout = 10 * time.Second

func askNix() (localNix, error) {
	store, err := nix.FindLocalStore("daemon", nix.ThisStoreHost(os.Getenv))
	if err != nil {
		return localNix{}, err
	}
	return askSocket(store.Socket)
}

func askSocket(socket string) (localNix, error) {
	conn, err := net.DialTimeout("unix", socket, askTimeout)
	if err != nil {
		return localNix{}, err
	}
	if err = conn.SetDeadline(time.Now().Add(askTimeout)); err == nil {
		var c *worker.Client
		if c, err = worker.NewClient(conn, conn, nil); err == nil {
			return localNix{version: c.NixVersion(), trust: c.Trust(), close: func() { conn.Close() }}, nil
		}
	}
	conn.Close()
	return localNix{}, err
}

// readConfFile reads a file of Nix's configuration.
func readConfFile(name string) ([]byte, error) { return plainfile.Read(name, nix.MaxConfSize) }

// look tells of all there is to see on this host. served is nil if nix-dispatchd
// does not tell.
func (h *host) look(socket string, served *servedList, tell func(finding)) {
	owner := h.lookAtSocket(socket, tell)
	if owner == h.uid && socket == daemonsocket.User() {
		h.lookAtOwn(tell)
		return
	}
	local, err := h.askNix()
	if err != nil {
		tell(problem("nix-daemon", "start it, or see whether this user may use it (allowed-users)",
			"this host's nix-daemon, which hands inputs out and takes outputs in, cannot be asked: %v", err))
		return
	}
	defer local.close() // until then nix-daemon runs, even if it is started for each caller
	tell(fine("nix-daemon", "Nix %s answers", local.version))
	h.lookAtTrust(owner, local.trust, tell)
	v := hookRules(local.version)
	d, err := h.findNixDaemon()
	if err != nil {
		h.lookAtFilesAlone(v, err, tell)
		h.lookAtStock(h.getenv, "", tell)
		return
	}
	h.lookAtHook(d, v, tell)
	if served != nil {
		h.lookAtBuilders(d, served, tell)
	}
	h.lookAtStock(func(name string) string { return d.env[name] }, d.exe, tell)
}

// lookAtStock looks for Nix's own hook as a hook would that a Nix has started.
func (h *host) lookAtStock(getenv func(string) string, nixProgram string, tell func(finding)) {
	const subject = "Nix's own hook"
	if hook, err := h.findStock(getenv, nixProgram); err == nil {
		tell(fine(subject, "%s", hook))
	} else {
		tell(warning(subject, "set NIX_DISPATCH_STOCK_HOOK in nix-daemon's environment", "what nix-dispatch leaves to it would fail: %v", err))
	}
}

// lookAtSocket returns the user that nix-dispatchd runs as; -1 if not known.
func (h *host) lookAtSocket(socket string, tell func(finding)) (owner int) {
	info, err := os.Stat(socket)
	if err != nil {
		return -1 // told already
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return -1
	}
	owner = int(st.Uid)
	group, err := h.group("nix-dispatch")
	switch {
	case info.Mode().Perm()&0o007 != 0:
		tell(warning("socket", "restart nix-dispatchd, which makes it with mode 0660 or 0600",
			"%s has mode %#o: everybody can connect, though only those allowed are served", socket, info.Mode().Perm()))
	case owner != 0:
		tell(fine("socket", "%s is user %d's own", socket, owner))
	case err != nil:
		tell(fine("socket", "only root may use nix-dispatch's commands: there is no group nix-dispatch (nix build needs none)"))
	case group.Gid != strconv.Itoa(int(st.Gid)):
		tell(warning("socket", "restart nix-dispatchd", "%s does not belong to the group nix-dispatch, which was made later", socket))
	default:
		tell(fine("socket", "root and the group nix-dispatch may use it"))
	}
	return owner
}

// lookAtTrust is about a nix-dispatchd that is not root's: what it imports must be
// trusted by the local nix-daemon.
func (h *host) lookAtTrust(owner int, trust worker.Trust, tell func(finding)) {
	const subject = "trusted-users"
	switch {
	case owner < 0:
	case owner == 0:
		tell(fine(subject, "nix-dispatchd runs as root, which is trusted"))
	case owner != h.uid || trust == worker.TrustUnknown:
		tell(warning(subject, fmt.Sprintf("run this as user %d, or look for it in nix.conf", owner),
			"not known whether the local nix-daemon trusts user %d, whose nix-dispatchd imports outputs", owner))
	case trust == worker.NotTrusted:
		tell(problem(subject, "add the user to trusted-users in nix.conf, and restart nix-daemon",
			"nix-dispatchd runs as user %d, whom the local nix-daemon does not trust: outputs that no trusted key has signed cannot be imported", owner))
	default:
		tell(fine(subject, "the local nix-daemon trusts user %d, whom nix-dispatchd runs as", owner))
	}
}

// A nixDaemon is the running process.
type nixDaemon struct {
	exe  string // its program; "" if that cannot be seen
	args []string
	env  map[string]string
}

// maxProcFile bounds what is read of a process.
const maxProcFile = 4 << 20

var errNoNixDaemon = errors.New("no process nix-daemon is to be seen")

// findNixDaemon finds root's nix-daemon that accepts connections.
func (h *host) findNixDaemon() (*nixDaemon, error) {
	dirs, err := filepath.Glob(h.proc + "/[0-9]*")
	if err != nil {
		return nil, err
	}
	result := errNoNixDaemon
	for _, dir := range dirs {
		comm, err := os.ReadFile(dir + "/comm")
		info, statErr := os.Stat(dir)
		if err != nil || statErr != nil || strings.TrimSpace(string(comm)) != "nix-daemon" {
			continue
		}
		if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != h.rootUID {
			continue // anybody can call a process so
		}
		args, argsErr := procStrings(dir + "/cmdline")
		env, envErr := procStrings(dir + "/environ")
		if err := errors.Join(argsErr, envErr); err != nil {
			result = err
			continue
		}
		if !acceptsConnections(args) {
			continue // it serves one client
		}
		exe, err := os.Readlink(dir + "/exe")
		if err != nil {
			exe = ""
		}
		d := &nixDaemon{exe: exe, args: args, env: make(map[string]string)}
		for _, e := range env {
			name, value, _ := strings.Cut(e, "=")
			d.env[name] = value
		}
		return d, nil
	}
	return nil, result
}

// procStrings reads a file of strings that end with NUL.
func procStrings(name string) ([]string, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxProcFile))
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(text), "\x00"), "\x00"), nil
}

// hookProgram tells whether a value of build-hook is nix-dispatch's, and which
// program it starts.
func hookProgram(value string) (program string, ours, withArguments bool) {
	words := strings.Fields(value)
	if len(words) == 0 {
		return "", false, false
	}
	base := path.Base(words[0])
	ours = base == "nix-dispatch-hook" || base == "nix-dispatch" && len(words) > 1 && words[1] == "hook"
	return words[0], ours, len(words) > 1
}
