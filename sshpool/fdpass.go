package sshpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fdpassTimeout bounds how long a command of ProxyUseFdpass may take to connect.
const fdpassTimeout = 30 * time.Second

// dialFdpass runs a command that makes a connection, passes it back over its
// standard output and ends: ssh_proxy_fdpass_connect in OpenSSH's sshconnect.c.
func (h *Host) dialFdpass(ctx context.Context, args []string) (net.Conn, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	defer theirs.Close()
	socket, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	stderr := &tailBuffer{limit: 2 << 10}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, stderr
	cmd.Env = childEnv()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		return nil, &ProxyError{Command: args[len(args)-1], Err: err}
	}
	theirs.Close()
	ctx, cancel := context.WithTimeout(ctx, fdpassTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { socket.Close() })
	defer stop()
	nc, err := receiveConn(socket.(*net.UnixConn))
	// It has done its work, or will not.
	exited := make(chan struct{})
	h.wg.Go(func() {
		awaitExit(cmd.Process.Pid)
		close(exited)
	})
	select {
	case <-exited:
	case <-time.After(time.Second):
	}
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	waitErr := cmd.Wait()
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, &ProxyError{Command: args[len(args)-1], Err: errors.Join(err, waitErr), Stderr: oneLine(stderr.bytes())}
	}
	return nc, nil
}

// receiveConn receives one connection: mm_receive_fd in OpenSSH's monitor_fdpass.c.
func receiveConn(socket *net.UnixConn) (net.Conn, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := socket.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, fmt.Errorf("no connection was passed back: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) == 0 {
		return nil, errors.New("no connection was passed back")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.New("not one connection was passed back")
	}
	f := os.NewFile(uintptr(fds[0]), "proxy")
	defer f.Close()
	return net.FileConn(f)
}
