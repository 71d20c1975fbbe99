package daemon

import (
	"fmt"
	"io"
	"os/exec"
	"sync"
	"syscall"

	"nixdispatch/proto/nix"
)

// A childDaemon is a nix-daemon --stdio of our own. It gets pipes rather than a
// socketpair because Nix 2.8 splices.
type childDaemon struct {
	io.Reader
	io.WriteCloser
	cmd    *exec.Cmd
	stderr *stderrReader
	once   sync.Once
}

func (s *localStore) startDaemon() (io.ReadWriteCloser, error) {
	cmd := exec.Command("nix-daemon", s.daemonArgs...)
	cmd.Env = s.env
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("nix-daemon does not listen for store %s, and starting it failed: %w", s.RealDir, err)
	}
	return &childDaemon{Reader: stdout, WriteCloser: stdin, cmd: cmd, stderr: newStderrReader(stderr, func() {})}, nil
}

// SyscallConn is what can be waited on for something to read.
func (c *childDaemon) SyscallConn() (syscall.RawConn, error) {
	return c.Reader.(syscall.Conn).SyscallConn()
}

// Close ends the child and waits for it. It may be called more than once, also
// at the same time.
func (c *childDaemon) Close() error {
	c.once.Do(func() {
		_ = c.WriteCloser.Close()
		_ = c.cmd.Process.Kill() // it may have ended by itself
		<-c.stderr.ended
		_ = c.cmd.Wait() // killed: its status says nothing
	})
	return nil
}

// explain adds the last words of a child that has been closed to an error.
func (c *childDaemon) explain(err error) error {
	if said := nix.PlainText(c.stderr.last()); said != "" {
		return fmt.Errorf("%w: nix-daemon said: %s", err, said)
	}
	return err
}
