package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// listen returns what the service manager has bound for the daemon, or binds its
// socket.
func (d *Daemon) listen(ctx context.Context) (net.Listener, error) {
	if d.opts.Listener != nil {
		return d.opts.Listener, nil
	}
	return listenUnix(ctx, d.opts.Socket, d.access())
}

// listenUnix binds the daemon's socket. A socket that a dead daemon left behind
// is replaced; one that somebody answers on is an error.
//
// The socket is made under a name of its own, given its mode and group there
// and only then renamed into place: there is no moment at which it answers to
// the wrong people, nor one at which the path is missing during a restart.
func listenUnix(ctx context.Context, path string, who socketAccess) (net.Listener, error) {
	if err := makeSocketDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := refuseLiveSocket(ctx, path); err != nil {
		return nil, err
	}
	making := path + ".new"
	if err := os.Remove(making); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: making, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// The listener knows only the name it was made under.
	l.SetUnlinkOnClose(false)
	if err := who.apply(making); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close())
	}
	if err := os.Rename(making, path); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close())
	}
	return l, nil
}

// makeSocketDir makes the directory if it is missing, for all to pass through
// whatever the umask: who may connect is the socket's own business.
func makeSocketDir(dir string) error {
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chmod(dir, 0o755)
}

// refuseLiveSocket lets nothing be replaced but the socket of a dead daemon.
func refuseLiveSocket(ctx context.Context, path string) error {
	switch st, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("listen on %s: %w", path, err)
	case st.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("listen on %s: there is something that is no socket; move it away, or choose another socket with --socket", path)
	}
	var d net.Dialer
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	conn, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		holder, credErr := callerOf(conn)
		_ = conn.Close()
		if credErr != nil {
			return fmt.Errorf("listen on %s: %w", path, credErr)
		}
		return fmt.Errorf("listen on %s: another daemon (process %d) answers there; stop it first, or choose another socket with --socket", path, holder.pid)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil
	default:
		return fmt.Errorf("listen on %s: %w", path, err)
	}
}

// A socketAccess is who may connect to a socket, beside root and the daemon's user.
type socketAccess struct {
	// group is whether there may be a group of users; has is whether it is known, by
	// the number gid.
	group, has bool
	gid        uint32
}

func (d *Daemon) access() socketAccess {
	a := socketAccess{group: d.group() != ""}
	if a.group {
		a.gid, a.has = d.groups.gid(d.group())
	}
	return a
}

// apply gives a socket its mode and group. Without a group it is for the daemon's user
// and root only.
func (a socketAccess) apply(path string) error {
	if !a.group {
		return os.Chmod(path, 0o600)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return err
	}
	if !a.has {
		return nil // root only, as documented
	}
	if err := os.Lchown(path, -1, int(a.gid)); err != nil && os.Geteuid() == 0 {
		return err
	}
	return nil
}

// regroup gives the socket to the group once its number is known, or another.
func (d *Daemon) regroup() {
	if a := d.access(); d.opts.Listener == nil && a.has {
		if err := os.Lchown(d.opts.Socket, -1, int(a.gid)); err != nil {
			d.log.Warn("cannot give the socket to its group", "group", d.group(), "err", err)
		}
	}
}
