package buildhook

import (
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"nixdispatch/proto/hookcall"
)

// clientOf finds out whose connection a process serves, the parent of this one, if
// it is a Nix daemon's; nil if it is not. The kernel knows who connected. Where it
// may not be asked, the process is called after its client, as in "nix-daemon 4711"
// (nix 2.34.8 src/nix/unix/daemon.cc).
func clientOf(pid int) *hookcall.Client {
	c := findClient(pid)
	if c != nil {
		c.SSHPeer = sshPeer(int(c.PID))
	}
	return c
}

func findClient(pid int) *hookcall.Client {
	if c := connectedTo(pid); c != nil {
		return c
	}
	argv := arguments(pid)
	if len(argv) < 2 || filepath.Base(argv[0]) != "nix-daemon" && (filepath.Base(argv[0]) != "nix" || argv[1] == "" || argv[1][0] > '9') {
		return nil
	}
	if client, err := strconv.ParseUint(argv[1], 10, 31); err == nil {
		var st unix.Stat_t
		if unix.Stat("/proc/"+argv[1], &st) == nil {
			return &hookcall.Client{UID: st.Uid, UIDKnown: true, PID: uint32(client)}
		}
	}
	return &hookcall.Client{PID: uint32(pid)} //nolint:gosec // a process id
}

// connectedTo returns who is at the other end of the connection that a process has
// accepted on a unix socket with a name; nil if there is none, or it may not be known.
func connectedTo(pid int) *hookcall.Client {
	dir := "/proc/" + strconv.Itoa(pid) + "/fd/"
	fds, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(pidfd) //nolint:errcheck // nothing to lose
	for _, entry := range fds {
		if link, err := os.Readlink(dir + entry.Name()); err != nil || !strings.HasPrefix(link, "socket:") {
			continue
		}
		fd, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if c := peerOf(pidfd, fd); c != nil {
			return c
		}
	}
	return nil
}

// peerOf is connectedTo for one of the process's descriptors.
func peerOf(pidfd, fd int) *hookcall.Client {
	own, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(own) //nolint:errcheck // the process has it still
	name, err := unix.Getsockname(own)
	if local, ok := name.(*unix.SockaddrUnix); err != nil || !ok || !filepath.IsAbs(local.Name) {
		return nil
	}
	if listens, err := unix.GetsockoptInt(own, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || listens != 0 {
		return nil
	}
	cred, err := unix.GetsockoptUcred(own, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil || cred.Pid <= 0 {
		return nil
	}
	return &hookcall.Client{UID: cred.Uid, UIDKnown: true, PID: uint32(cred.Pid)}
}

// maxEnvironment bounds how much is read of a process's environment, in bytes.
const maxEnvironment = 256 << 10

// sshPeer is the address from which another host sends builds to a process of its own
// that serves them: nix-daemon --stdio or nix-store --serve, started over SSH. "" for
// others: who is logged in by SSH and builds here is no other host.
func sshPeer(pid int) string {
	argv := arguments(pid)
	if !slices.Contains(argv, "--stdio") && !slices.Contains(argv, "--serve") {
		return ""
	}
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return ""
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxEnvironment))
	if err != nil {
		return ""
	}
	for v := range strings.SplitSeq(string(text), "\x00") {
		if from, ok := strings.CutPrefix(v, "SSH_CONNECTION="); ok {
			from, _, _ = strings.Cut(from, " ")
			if addr, err := netip.ParseAddr(from); err == nil {
				return addr.Unmap().WithZone("").String()
			}
			return ""
		}
	}
	return ""
}

// arguments are a process's command line.
func arguments(pid int) []string {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil {
		return nil
	}
	return strings.Split(string(text), "\x00")
}
