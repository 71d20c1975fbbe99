package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// listen returns what the service manager has bound for the daemon, or binds its
// socket.
func (d *Daemon) listen(ctx context.Context) (net.Listener, error) {
	if d.opts.Listener != nil {
		return d.opts.Listener, nil
	}
	return listenUnix(ctx, d.opts.Socket, d.group())
}

// listenUnix binds the daemon's socket. A socket that a dead daemon left behind
// is replaced; one that somebody answers on is an error.
//
// The socket is made under a name of its own, given its mode and group there
// and only then renamed into place: there is no moment at which it answers to
// the wrong people, nor one at which the path is missing during a restart.
func listenUnix(ctx context.Context, path, group string) (net.Listener, error) {
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
	if err := giveToGroup(making, group); err != nil {
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
		_ = conn.Close()
		return fmt.Errorf("listen on %s: another daemon answers there; stop it first, or choose another socket with --socket", path)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil
	default:
		return fmt.Errorf("listen on %s: %w", path, err)
	}
}

// giveToGroup opens the socket to the group where it exists; else it is for the
// daemon's user alone.
func giveToGroup(path, group string) error {
	if group == "" {
		return os.Chmod(path, 0o600)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return err
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return nil //nolint:nilerr // no such group: root only, as documented
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		return fmt.Errorf("group %s has the odd id %q", group, g.Gid)
	}
	if err := os.Chown(path, -1, gid); err != nil && os.Geteuid() == 0 {
		return err
	}
	return nil
}
