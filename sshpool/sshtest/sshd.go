package sshtest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// An SSHD is OpenSSH's server on a port of the loopback interface. Connections
// are accepted here and given to an "sshd -i" each, as inetd does, so that there
// is no race for a port, and each can be counted, frozen and killed.
type SSHD struct {
	Host     string // 127.0.0.1
	Port     int
	User     string // who may log in: the user the test runs as
	Identity string // file with the key that lets them in
	Version  string // what ssh -V says

	dir      string
	path     string
	hostKeys []string // public key lines
	listener net.Listener
	wg       sync.WaitGroup
	log      *os.File

	mu       sync.Mutex // protects following fields
	children map[*exec.Cmd]struct{}
	accepted int
}

// StartSSHD starts a server that ends with the test. config is lines of
// sshd_config, such as "MaxSessions 2". Where sshd is missing the test is skipped,
// unless the environment has CI or NIX_DISPATCH_REQUIRE_FLEET set. What the
// server logged is shown if the test fails.
func StartSSHD(t testing.TB, config ...string) *SSHD {
	t.Helper()
	path := findSSHD(t)
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	d := &SSHD{
		Host:     "127.0.0.1",
		User:     me.Username,
		dir:      t.TempDir(),
		path:     path,
		children: make(map[*exec.Cmd]struct{}),
	}
	d.writeFiles(t, config)
	if d.log, err = os.OpenFile(filepath.Join(d.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		t.Fatal(err)
	}
	if d.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	d.Port = d.listener.Addr().(*net.TCPAddr).Port
	d.wg.Go(d.serve)
	t.Cleanup(func() {
		d.Close()
		if t.Failed() {
			t.Logf("sshd's log:\n%s", d.Log())
		}
	})
	version, _ := exec.Command("ssh", "-V").CombinedOutput()
	d.Version = strings.TrimSpace(string(version))
	return d
}

func findSSHD(t testing.TB) string {
	t.Helper()
	// sshd insists on being started by its full name.
	return mustFind(t, "sshd", "/usr/sbin/sshd", "/usr/local/sbin/sshd")
}

// mustFind returns the full name of the first program that exists.
func mustFind(t testing.TB, names ...string) string {
	t.Helper()
	for _, name := range names {
		path, err := exec.LookPath(name)
		if err != nil {
			continue
		}
		if path, err = filepath.Abs(path); err == nil {
			return path
		}
	}
	if os.Getenv("CI") != "" || os.Getenv("NIX_DISPATCH_REQUIRE_FLEET") != "" {
		t.Fatalf("%s is not installed, and the environment forbids to skip what needs it", names[0])
	}
	t.Skipf("%s is not installed", names[0])
	return ""
}

func (d *SSHD) writeFiles(t testing.TB, config []string) {
	t.Helper()
	lines := []string{
		"UsePAM no",
		"StrictModes no",
		"PidFile none",
		"PasswordAuthentication no",
		"KbdInteractiveAuthentication no",
		"PermitRootLogin yes",
		"AuthorizedKeysFile " + filepath.Join(d.dir, "authorized_keys"),
		"LogLevel VERBOSE",
		// A bash that sshd starts reads ~/.bashrc, as quiet and quick or not as
		// that may be, unless it is told to be in another shell already.
		"SetEnv SHLVL=2",
	}
	for i, keyType := range []string{"ed25519", "ecdsa"} {
		name := filepath.Join(d.dir, "host_"+keyType)
		d.hostKeys = append(d.hostKeys, Keygen(t, name, "-t", keyType))
		lines = append(lines, "HostKey "+name)
		if i == 0 {
			d.Identity = filepath.Join(d.dir, "id_ed25519")
		}
	}
	public := Keygen(t, d.Identity, "-t", "ed25519")
	write(t, filepath.Join(d.dir, "authorized_keys"), public)
	// The first value of an option counts.
	write(t, filepath.Join(d.dir, "sshd_config"), strings.Join(append(config, lines...), "\n"))
	if os.Getuid() == 0 {
		// Privilege separation wants an empty directory, which distributions
		// make when their service starts.
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// Keygen makes a key pair with ssh-keygen, without a passphrase unless args say
// otherwise (-N), and returns the public key's line.
func Keygen(t testing.TB, name string, args ...string) string {
	t.Helper()
	mustFind(t, "ssh-keygen")
	args = append([]string{"-q", "-f", name, "-C", "test"}, args...)
	if !strings.Contains(strings.Join(args, " "), " -N ") {
		args = append(args, "-N", "")
	}
	if out, err := exec.Command("ssh-keygen", args...).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen %v: %v\n%s", args, err, out)
	}
	public, err := os.ReadFile(name + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(public))
}

func write(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// HostKeys returns the public key lines of the host: Ed25519 and ECDSA.
func (d *SSHD) HostKeys() []string { return d.hostKeys }

// KnownHosts returns a line of a known_hosts file for the n-th of [SSHD.HostKeys].
func (d *SSHD) KnownHosts(n int) string {
	return fmt.Sprintf("[%s]:%d %s", d.Host, d.Port, d.hostKeys[n])
}

// Authorize lets in one more key, given as its public key line.
func (d *SSHD) Authorize(t testing.TB, line string) {
	t.Helper()
	name := filepath.Join(d.dir, "authorized_keys")
	before, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	write(t, name, string(before)+line)
}

// Log returns what the server has logged.
func (d *SSHD) Log() string {
	text, err := os.ReadFile(d.log.Name())
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// Connections returns how many connections were accepted.
func (d *SSHD) Connections() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.accepted
}

// Freeze stops the server's processes for all connections there are, or lets
// them go on.
func (d *SSHD) Freeze(frozen bool) {
	if frozen {
		d.signal(syscall.SIGSTOP)
	} else {
		d.signal(syscall.SIGCONT)
	}
}

// Cut kills the server's processes for all connections there are.
func (d *SSHD) Cut() { d.signal(syscall.SIGKILL) }

func (d *SSHD) signal(sig syscall.Signal) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.children {
		syscall.Kill(-c.Process.Pid, sig)
	}
}

// Close stops listening, ends all connections and waits for the server's processes.
func (d *SSHD) Close() {
	d.listener.Close()
	d.Cut()
	d.wg.Wait()
	d.log.Close()
}

func (d *SSHD) serve() {
	for {
		c, err := d.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			err = d.start(c)
		}
		if err != nil {
			fmt.Fprintf(d.log, "sshtest: %v\n", err)
		}
	}
}

func (d *SSHD) start(c net.Conn) error {
	defer c.Close()
	socket, err := c.(*net.TCPConn).File()
	if err != nil {
		return err
	}
	defer socket.Close()
	cmd := exec.Command(d.path, "-i", "-e", "-f", filepath.Join(d.dir, "sshd_config"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = socket, socket, d.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	d.accepted++
	d.children[cmd] = struct{}{}
	d.wg.Go(func() {
		cmd.Wait()
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.children, cmd)
	})
	return nil
}

// RequireSSH ends a test that needs OpenSSH's client where it is missing, as
// [StartSSHD] does.
func RequireSSH(t testing.TB) {
	t.Helper()
	mustFind(t, "ssh")
}
