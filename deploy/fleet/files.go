package fleet

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// A bootFile is a file the fleet writes into a host.
type bootFile struct {
	name string // absolute
	text string
	mode int64
	uid  int
}

// The ids that base.sh gives to users.
var userIDs = map[string]int{"root": 0, "alice": 1001, "bob": 1002, "nix": 1003}

func home(user string) string {
	if user == "root" {
		return "/root"
	}
	return "/home/" + user
}

// bootFiles are written at every boot: what makes this host this host. What a
// test writes to the same files later lasts until the next boot.
func (h *Host) bootFiles() []bootFile {
	f, config := h.fleet, h.snapshot().Config
	files := []bootFile{
		{name: "/etc/hostname", text: h.name + "\n", mode: 0o644},
		{name: "/etc/nix/nix.conf", text: nixConf(config), mode: 0o644},
		{name: "/etc/ssh/sshd_config", text: sshdConfig(config.Suite), mode: 0o644},
		{name: "/etc/ssh/sshd_config.first", text: config.SSHDConfig + "\n", mode: 0o644},
		{name: "/etc/ssh/ssh_host_ed25519_key", text: h.key.Private, mode: 0o600},
		{name: "/etc/ssh/ssh_host_ed25519_key.pub", text: h.key.Public + "\n", mode: 0o644},
	}
	for _, user := range []string{"root", "alice", "nix"} {
		files = append(files, bootFile{
			name: home(user) + "/.ssh/authorized_keys", text: f.clientKey.Public + "\n",
			mode: 0o600, uid: userIDs[user],
		})
	}
	for _, user := range []string{"root", "alice"} {
		files = append(files,
			bootFile{name: home(user) + "/.ssh/id_ed25519", text: f.clientKey.Private, mode: 0o600, uid: userIDs[user]},
			bootFile{name: home(user) + "/.ssh/id_ed25519.pub", text: f.clientKey.Public + "\n", mode: 0o644, uid: userIDs[user]},
		)
	}
	return append(files, f.nameFiles()...)
}

// nameFiles are the files that change when a host is added.
func (f *Fleet) nameFiles() []bootFile {
	hosts, known := f.nameTables()
	return []bootFile{
		{name: "/etc/hosts", text: hosts, mode: 0o644},
		{name: "/root/.ssh/known_hosts", text: known, mode: 0o644},
		{name: "/home/alice/.ssh/known_hosts", text: known, mode: 0o644, uid: userIDs["alice"]},
	}
}

// nameTables are /etc/hosts and known_hosts with every host and proxy.
func (f *Fleet) nameTables() (hosts, known string) {
	all := f.Hosts()
	f.hostsMu.Lock()
	defer f.hostsMu.Unlock()
	var h, k strings.Builder
	h.WriteString("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
	fmt.Fprintf(&h, "%s bridge\n", bridgeAddr)
	for _, host := range all {
		fmt.Fprintf(&h, "%s %s\n", host.Addr(), host.name)
		fmt.Fprintf(&k, "%s,%s %s\n", host.name, host.Addr(), host.key.Public)
	}
	for name, far := range f.far {
		fmt.Fprintf(&h, "%s %s\n", farAddr(far.Index), name)
		if host := f.hosts[far.Host]; host != nil {
			fmt.Fprintf(&k, "%s,%s %s\n", name, farAddr(far.Index), host.key.Public)
		}
	}
	return h.String(), k.String()
}

// tellNames writes the names into every running host.
func (f *Fleet) tellNames(ctx context.Context) error {
	files := f.nameFiles()
	for _, h := range f.Hosts() {
		for _, file := range files {
			err := h.write(file.name, []byte(file.text), os.FileMode(file.mode), file.uid)
			if err != nil && h.On() && ctx.Err() == nil {
				return err
			}
		}
	}
	return f.save()
}

func tarOf(files []bootFile) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, file := range files {
		err := w.WriteHeader(&tar.Header{
			Name: file.name[1:], Mode: file.mode, Uid: file.uid, Gid: file.uid, Size: int64(len(file.text)),
		})
		if err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, file.text); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return out.Bytes(), err
}

// WriteFile writes a file of the host as root, making directories as needed.
// Symbolic links are followed as the host itself would.
func (h *Host) WriteFile(name string, data []byte, mode os.FileMode) error {
	return h.write(name, data, mode, 0)
}

func (h *Host) write(name string, data []byte, mode os.FileMode, uid int) (err error) {
	defer wrapFile(&err, "write", name, h)
	root, err := h.openRoot()
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := openIn(root, name, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, mode)
	if errors.Is(err, os.ErrNotExist) {
		if err := mkdirIn(root, path.Dir(name)); err != nil {
			return err
		}
		f, err = openIn(root, name, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, mode)
	}
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(f.Chmod(mode), f.Chown(uid, uid), f.Close())
}

// ReadFile reads a file of the host as root. Symbolic links are followed as the
// host itself would.
func (h *Host) ReadFile(name string) (data []byte, err error) {
	defer wrapFile(&err, "read", name, h)
	root, err := h.openRoot()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, err := openIn(root, name, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(f)
}

// ReadDir lists the names in a directory of the host, sorted.
func (h *Host) ReadDir(name string) (names []string, err error) {
	defer wrapFile(&err, "list", name, h)
	root, err := h.openRoot()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, err := openIn(root, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names, err
}

func wrapFile(err *error, verb, name string, h *Host) {
	if *err != nil {
		*err = fmt.Errorf("%s %q on host %s: %w", verb, name, h.name, *err)
	}
}

func (h *Host) openRoot() (*os.File, error) {
	if !h.On() {
		return nil, ErrOff
	}
	fd, err := unix.Open(h.Root(), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), h.Root()), nil
}

// openIn opens name with root as "/", also for symbolic links on the way.
func openIn(root *os.File, name string, flags int, mode os.FileMode) (*os.File, error) {
	fd, err := unix.Openat2(int(root.Fd()), name, &unix.OpenHow{
		Flags: uint64(flags | unix.O_CLOEXEC), Mode: creationMode(flags, mode), Resolve: unix.RESOLVE_IN_ROOT,
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// creationMode is 0 where nothing is created, as openat2 demands.
func creationMode(flags int, mode os.FileMode) uint64 {
	if flags&unix.O_CREAT == 0 {
		return 0
	}
	return uint64(mode.Perm())
}

// mkdirIn makes a directory and its parents, with root as "/".
func mkdirIn(root *os.File, name string) error {
	name = path.Clean("/" + name)
	if name == "/" {
		return nil
	}
	if err := mkdirIn(root, path.Dir(name)); err != nil {
		return err
	}
	parent, err := openIn(root, path.Dir(name), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer parent.Close()
	err = unix.Mkdirat(int(parent.Fd()), path.Base(name), 0o755)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
