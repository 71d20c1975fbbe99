package sshpool

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// proxyPipe is how much a pipe to a proxy holds, if the system allows.
const proxyPipe = 1 << 20

// A ProxyError says how the command that was to be the transport ended.
type ProxyError struct {
	Command string // what was run
	Err     error  // nil if it exited with status 0
	Stderr  string // the end of what it printed, in one line
}

// Error tells the command, how it ended and what it printed.
func (e *ProxyError) Error() string {
	how := "it ended"
	if e.Err != nil {
		how = e.Err.Error()
	}
	if e.Stderr != "" {
		how += ": " + e.Stderr
	}
	return fmt.Sprintf("proxy %q: %s", e.Command, how)
}

// Unwrap returns how it ended.
func (e *ProxyError) Unwrap() error { return e.Err }

// proxyArguments are the program and arguments of the proxy a target asks for;
// nil if it asks for none.
func (t *Target) proxyArguments() ([]string, error) {
	if t.ProxyCommand != "" {
		return []string{"/bin/sh", "-c", "exec " + t.ProxyCommand}, nil
	}
	if t.ProxyJump == "" {
		return nil, nil
	}
	// As in main of OpenSSH's ssh.c: the last jump is the host to start from, the
	// others are how to reach it.
	last := lastJump(t.ProxyJump)
	user, host, port := splitJump(last)
	if host == "" || host[0] == '-' || strings.HasPrefix(user, "-") {
		return nil, fmt.Errorf("ProxyJump %q: no host in it", t.ProxyJump)
	}
	args := []string{t.sshProgram}
	if user != "" {
		args = append(args, "-l", user)
	}
	if port != "" {
		args = append(args, "-p", port)
	}
	if extra := strings.TrimSuffix(strings.TrimSuffix(t.ProxyJump, last), ","); extra != "" {
		args = append(args, "-J", extra)
	}
	if t.SSHConfigFile != "" {
		args = append(args, "-F", t.SSHConfigFile)
	}
	return append(args, "-W", fmt.Sprintf("[%s]:%d", t.Host, t.Port), "--", host), nil
}

func lastJump(jumps string) string { return jumps[strings.LastIndexByte(jumps, ',')+1:] }

// splitJump splits "user@host:port" as ssh -G prints it: with brackets around an
// address.
func splitJump(jump string) (user, host, port string) {
	rest := strings.TrimPrefix(jump, "ssh://")
	if at := strings.LastIndexByte(rest, '@'); at >= 0 {
		user, rest = rest[:at], rest[at+1:]
	}
	if in, ok := strings.CutPrefix(rest, "["); ok {
		host, rest, _ = strings.Cut(in, "]")
		return user, host, strings.TrimPrefix(rest, ":")
	}
	host, port, _ = strings.Cut(rest, ":")
	return user, host, port
}

// A proxyConn is a connection made by a child process, over its standard input
// and output. Its end is the child's.
type proxyConn struct {
	command string
	cmd     *exec.Cmd
	in, out *os.File // ours: what we write, what we read
	stderr  *tailBuffer
	ended   chan struct{} // closed when the child has been waited for
	waitErr error         // valid after ended

	closing   chan struct{} // closed by Close
	closeOnce sync.Once
}

// dialProxy starts the proxy. Its processes are counted in h.wg.
func (h *Host) dialProxy(args []string) (net.Conn, error) {
	p := &proxyConn{
		command: args[len(args)-1],
		cmd:     exec.Command(args[0], args[1:]...),
		stderr:  &tailBuffer{limit: 2 << 10},
		ended:   make(chan struct{}),
		closing: make(chan struct{}),
	}
	if args[0] != "/bin/sh" {
		p.command = "ssh " + strings.Join(args[1:], " ")
	}
	theirIn, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, theirIn.Close(), in.Close())
	}
	p.in, p.out = in, out
	for _, f := range []*os.File{in, out} {
		setPipeSize(f)
	}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = theirIn, theirOut, p.stderr
	p.cmd.Env = childEnv()
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// What it leaves behind may hold its stderr for as long as it likes.
	p.cmd.WaitDelay = time.Second
	err = p.cmd.Start()
	theirIn.Close()
	theirOut.Close()
	if err != nil {
		in.Close()
		out.Close()
		return nil, &ProxyError{Command: p.command, Err: err}
	}
	h.wg.Go(func() { p.supervise(h) })
	return p, nil
}

func setPipeSize(f *os.File) {
	if raw, err := f.SyscallConn(); err == nil {
		// An unprivileged user may have used up what the system allows.
		_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, proxyPipe) })
	}
}

// Read returns a [*ProxyError] when the proxy has closed its output.
func (p *proxyConn) Read(b []byte) (int, error) {
	n, err := p.out.Read(b)
	if err == io.EOF {
		err = p.failure()
	}
	return n, err
}

// Write returns a [*ProxyError] when the proxy has closed its input.
func (p *proxyConn) Write(b []byte) (int, error) {
	n, err := p.in.Write(b)
	if errors.Is(err, syscall.EPIPE) {
		err = p.failure()
	}
	return n, err
}

// failure says how the proxy ended, once it has; it is given a moment.
func (p *proxyConn) failure() error {
	timer := time.NewTimer(2 * time.Second)
	defer timer.Stop()
	e := &ProxyError{Command: p.command}
	select {
	case <-p.ended:
		e.Err = p.waitErr
	case <-timer.C:
		e.Err = errors.New("it has closed its output, and does not end")
	}
	e.Stderr = oneLine(p.stderr.bytes())
	return e
}

// supervise waits for the proxy's end, or brings it about when the connection is
// closed. Nothing of its process group survives it: a group's number may be used
// again as soon as its leader has been waited for.
func (p *proxyConn) supervise(h *Host) {
	group := -p.cmd.Process.Pid
	exited := make(chan struct{})
	h.wg.Go(func() {
		awaitExit(p.cmd.Process.Pid)
		close(exited)
	})
	select {
	case <-exited:
	case <-p.closing:
		_ = syscall.Kill(group, syscall.SIGTERM)
		timer := time.NewTimer(killGrace)
		defer timer.Stop()
		select {
		case <-exited:
		case <-timer.C:
		}
	}
	_ = syscall.Kill(group, syscall.SIGKILL)
	<-exited
	p.waitErr = p.cmd.Wait()
	close(p.ended)
}

// Close ends the proxy and all it started, and returns at once.
func (p *proxyConn) Close() error {
	p.closeOnce.Do(func() {
		p.in.Close()
		p.out.Close()
		close(p.closing)
	})
	return nil
}

// A proxyAddr is the address of a connection whose ends are not known.
type proxyAddr struct{}

func (proxyAddr) Network() string { return "proxy" }
func (proxyAddr) String() string  { return "proxy" }

func (p *proxyConn) LocalAddr() net.Addr  { return proxyAddr{} }
func (p *proxyConn) RemoteAddr() net.Addr { return proxyAddr{} }

func (p *proxyConn) SetDeadline(t time.Time) error {
	return errors.Join(p.in.SetWriteDeadline(t), p.out.SetReadDeadline(t))
}
func (p *proxyConn) SetReadDeadline(t time.Time) error  { return p.out.SetReadDeadline(t) }
func (p *proxyConn) SetWriteDeadline(t time.Time) error { return p.in.SetWriteDeadline(t) }

// A tailBuffer keeps the last bytes written to it.
type tailBuffer struct {
	limit int

	mu   sync.Mutex
	text []byte
}

// Write never fails.
func (b *tailBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text = append(b.text, p[max(0, len(p)-b.limit):]...)
	b.text = b.text[max(0, len(b.text)-b.limit):]
	return len(p), nil
}

func (b *tailBuffer) bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]byte(nil), b.text...)
}
