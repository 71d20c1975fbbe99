package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// GroupName is the group whose members may submit builds, where it exists.
const GroupName = "nix-dispatch"

// A caller is the process at the other end of a connection, as the kernel
// vouched for it when it connected (SO_PEERCRED, SO_PEERGROUPS).
type caller struct {
	uid uint32
	gid uint32
	pid int32
	// groups are the process's supplementary groups.
	groups []uint32
}

// String identifies the user, for logs.
func (c caller) String() string { return "uid " + strconv.FormatUint(uint64(c.uid), 10) }

// commands tells whether the caller may tell the daemon what to do, beyond
// submitting builds: root and the user that it runs as may.
func (c caller) commands() bool {
	return c.uid == 0 || c.uid == uint32(os.Geteuid()) //nolint:gosec // a uid
}

// in tells whether the caller's process has a group, which is not to be asked of the
// list of users: services, containers and directory users have groups that are in no
// file, and not every process has all groups of its user.
func (c caller) in(gid uint32) bool { return c.gid == gid || slices.Contains(c.groups, gid) }

// peerCredentials are transport credentials that learn who is calling from the
// unix socket itself. Nothing is encrypted: the bytes never leave the host.
type peerCredentials struct{}

type peerInfo struct {
	credentials.CommonAuthInfo
	caller  caller
	arrival *arrival // nil where the connection is none of the daemon's listener
}

func (peerInfo) AuthType() string { return "peercred" }

// ServerHandshake tells who is calling.
func (peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info := peerInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
	if l, ok := conn.(*limitedConn); ok {
		info.caller, info.arrival = l.caller, l.arrival
		return conn, info, nil
	}
	var err error
	if info.caller, err = callerOf(conn); err != nil {
		return nil, nil, err
	}
	return conn, info, nil
}

// callerOf asks the kernel for the peer's credentials.
func callerOf(conn net.Conn) (caller, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return caller{}, fmt.Errorf("peer credentials: %T is not a socket", conn)
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return caller{}, fmt.Errorf("peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var groups []uint32
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		if cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr == nil {
			groups, credErr = peerGroups(int(fd))
		}
	}); err != nil {
		return caller{}, fmt.Errorf("peer credentials: %w", err)
	}
	if credErr != nil {
		return caller{}, fmt.Errorf("peer credentials: %w", credErr)
	}
	return caller{uid: cred.Uid, gid: cred.Gid, pid: cred.Pid, groups: groups}, nil
}

// peerGroups asks the kernel for the peer's supplementary groups. The library has no
// function for that: its text option ends at the first zero byte.
func peerGroups(fd int) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(len(groups)) * 4 //nolint:gosec // 65,536 groups at most
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == unix.ERANGE && int(size/4) > len(groups):
			groups = make([]uint32, size/4) // the kernel has said how many there are
		case errno != 0:
			return nil, fmt.Errorf("SO_PEERGROUPS: %w", errno)
		default:
			return slices.Clone(groups[:size/4]), nil
		}
	}
}

// ClientHandshake is never used: the daemon is no client.
func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials: server side only")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peercred"}
}
func (c peerCredentials) Clone() credentials.TransportCredentials { return c }
func (peerCredentials) OverrideServerName(string) error           { return nil }

// callerFrom is the caller of the RPC that ctx belongs to.
func callerFrom(ctx context.Context) (caller, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return caller{}, false
	}
	info, ok := p.AuthInfo.(peerInfo)
	return info.caller, ok
}

// A gate decides who may call: root, the daemon's own user and the members of
// one group, if group is not "".
type gate struct {
	own    uint32
	group  string
	groups *groupTable
}

// allows tells whether a caller is let in.
func (g gate) allows(c caller) bool {
	if c.uid == 0 || c.uid == g.own {
		return true
	}
	if g.group == "" {
		return false
	}
	gid, ok := g.groups.gid(g.group)
	return ok && c.in(gid)
}

// healthService is open to everyone who can reach the socket.
const healthService = "/grpc.health.v1.Health/"

func (g gate) check(ctx context.Context, method string) error {
	if strings.HasPrefix(method, healthService) {
		return nil
	}
	c, ok := callerFrom(ctx)
	if !ok {
		return status.Error(codes.PermissionDenied, "nobody knows who is calling")
	}
	if !g.allows(c) {
		return status.Errorf(codes.PermissionDenied,
			"%s may not use nix-dispatch: only root, the daemon's user and the group %q may", c, g.group)
	}
	return nil
}

func (g gate) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := g.check(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (g gate) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := g.check(ss.Context(), info.FullMethod); err != nil {
		return err
	}
	return next(srv, ss)
}
