package sshpool

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// killGrace is how long a local command gets between SIGTERM and SIGKILL.
const killGrace = 2 * time.Second

// runLocal is [conn.run] for a local host: the command is a child of this
// process, in a process group of its own, with pipes for its streams.
func (c *conn) runLocal(ctx context.Context, command string, result chan<- opened) {
	defer c.host.wg.Done()
	l, err := startLocal(command)
	if err != nil {
		c.host.release(c, false)
		deliver(ctx, result, opened{err: c.host.fail(StepOpenSession, CauseSessionRefused, err, "")})
		return
	}
	c.host.accepted(c)
	s := &Session{
		conn:     c,
		Stdin:    l.stdin,
		end:      l.closeStreams,
		release:  func() { c.host.release(c, true) },
		closing:  make(chan struct{}),
		finished: make(chan struct{}),
	}
	s.Stdout, s.Stderr = localOutput{l.stdout, c, s}, localOutput{l.stderr, c, s}
	if !deliver(ctx, result, opened{session: s}) {
		s.Close()
	}
	l.serve(c, s)
}

// A local is a command that runs as a child of this process.
type local struct {
	cmd                   *exec.Cmd
	stdin, stdout, stderr *os.File
}

func startLocal(command string) (*local, error) {
	l := &local{cmd: exec.Command("/bin/sh", "-c", command)}
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	pipe := func() (r, w *os.File, err error) {
		if r, w, err = os.Pipe(); err != nil {
			l.closeStreams()
		}
		return r, w, err
	}
	in, w, err := pipe()
	if err != nil {
		return nil, err
	}
	l.stdin, theirs = w, append(theirs, in)
	r, out, err := pipe()
	if err != nil {
		return nil, err
	}
	l.stdout, theirs = r, append(theirs, out)
	r, errw, err := pipe()
	if err != nil {
		return nil, err
	}
	l.stderr, theirs = r, append(theirs, errw)
	l.cmd.Stdin, l.cmd.Stdout, l.cmd.Stderr = in, out, errw
	if err := l.cmd.Start(); err != nil {
		l.closeStreams()
		return nil, err
	}
	return l, nil
}

// closeStreams closes our ends of the pipes, which also ends reads and writes
// that are under way.
func (l *local) closeStreams() {
	for _, f := range []*os.File{l.stdin, l.stdout, l.stderr} {
		if f != nil {
			f.Close()
		}
	}
}

// serve waits for the command's end, and brings it about when the session or
// the host is closed.
func (l *local) serve(c *conn, s *Session) {
	exited := make(chan struct{})
	c.host.wg.Go(func() {
		awaitExit(l.cmd.Process.Pid)
		close(exited)
	})
	stopped := false
	select {
	case <-exited:
	case <-s.closing:
		stopped = true
	case <-c.dying:
		stopped = true
		l.closeStreams()
	}
	if stopped {
		// The leader is not reaped yet, so its group's number is still its own.
		group := -l.cmd.Process.Pid
		syscall.Kill(group, syscall.SIGTERM)
		timer := time.NewTimer(killGrace)
		defer timer.Stop()
		select {
		case <-exited:
		case <-timer.C:
		}
		syscall.Kill(group, syscall.SIGKILL)
		<-exited
	}
	err := l.cmd.Wait()
	switch {
	case !stopped:
		s.err = localExit(err)
	case isClosed(s.closing):
		s.err = ErrClosed
	default:
		s.err = c.lost()
	}
	close(s.finished)
}

// awaitExit waits until a child has ended, without reaping it.
func awaitExit(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err != unix.EINTR {
			return
		}
	}
}

// localExit makes what a session's Wait returns of an error of [exec.Cmd.Wait].
func localExit(err error) error {
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return err
	}
	status := exit.Sys().(syscall.WaitStatus)
	if status.Signaled() {
		name := unix.SignalName(status.Signal())
		return &ExitError{Status: 128, Signal: name[min(len("SIG"), len(name)):]}
	}
	return &ExitError{Status: exit.ExitCode()}
}

// A localOutput is a pipe from a command. What ends it is the command, unless
// the session or the host was closed before.
type localOutput struct {
	file *os.File
	conn *conn
	s    *Session
}

func (o localOutput) Read(p []byte) (int, error) {
	n, err := o.file.Read(p)
	if err == nil {
		return n, nil
	}
	if isClosed(o.s.closing) {
		return n, ErrClosed
	}
	if isClosed(o.conn.dying) {
		return n, o.conn.lost()
	}
	return n, err
}
