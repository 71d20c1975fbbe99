package sshpool

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"nixdispatch/sshpool/sshtest"
)

// hostBlock is what leads to d under an alias. What is in more wins.
func hostBlock(t testing.TB, alias string, d *sshtest.SSHD, more ...string) string {
	t.Helper()
	known := filepath.Join(t.TempDir(), "known_hosts")
	writeFile(t, known, d.KnownHosts(0)+"\n")
	lines := append([]string{"Host " + alias}, more...)
	lines = append(lines,
		"HostName "+d.Host, "Port "+strconv.Itoa(d.Port), "User "+d.User, "IdentityFile "+d.Identity,
		"IdentityAgent none", "UserKnownHostsFile "+known, "GlobalKnownHostsFile none")
	return strings.Join(lines, "\n  ") + "\n"
}

func writeFile(t testing.TB, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// replaceFile changes a file in one go, for whoever may be reading it.
func replaceFile(t testing.TB, name, text string) {
	t.Helper()
	writeFile(t, name+".new", text)
	if err := os.Rename(name+".new", name); err != nil {
		t.Fatal(err)
	}
}

// A logBuffer is a logger's text, to be read while it is written.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBuffer) options() Options {
	return Options{Logger: slog.New(slog.NewTextHandler(b, nil)), BackoffMin: 20 * time.Millisecond, BackoffMax: 200 * time.Millisecond}
}

// mustRun runs a command on a host that it waits for.
func mustRun(t *testing.T, opts Options, cfg Config) *Host {
	t.Helper()
	h := upHost(t, opts, cfg)
	if err := mustSession(t, h, "true").Wait(); err != nil {
		t.Error(err)
	}
	return h
}

// sshAgrees checks that ssh itself gets in, or does not.
func sshAgrees(t *testing.T, cfg Config, in bool) {
	t.Helper()
	args := append([]string{"-oBatchMode=yes", cfg.Host, "-x"}, cfg.SSHOptions...)
	out, err := exec.CommandContext(t.Context(), "ssh", append(args, "true")...).CombinedOutput()
	if (err == nil) != in {
		t.Errorf("gets in: %v; but ssh: %v\n%s", in, err, out)
	}
}

// failure is the error of a host that cannot be connected to.
func failure(t *testing.T, opts Options, cfg Config) *ConnectError {
	t.Helper()
	p := New(opts)
	defer p.Close()
	st := awaitStatus(t, p.Add(cfg), "down", func(st Status) bool { return st.State != Connecting })
	if st.State == Up {
		t.Fatal("it is up")
	}
	return mustBe[*ConnectError](t, "LastError", st.LastError)
}

func mustFail(t *testing.T, cfg Config, step Step, cause Cause, words ...string) {
	t.Helper()
	e := failure(t, Options{}, cfg)
	if e.Step != step || e.Cause != cause {
		t.Errorf("failed at %q because of %q, want %q, %q: %v", e.Step, e.Cause, step, cause, e)
	}
	for _, w := range words {
		if !strings.Contains(e.Error(), w) {
			t.Errorf("error %q, want %q in it", e, w)
		}
	}
}

func TestAliasAndJumpsWithSSHD(t *testing.T) {
	t.Parallel()
	end, jump, first := sshtest.StartSSHD(t), sshtest.StartSSHD(t), sshtest.StartSSHD(t)
	file := filepath.Join(t.TempDir(), "config")
	jumps := hostBlock(t, "first", first) + hostBlock(t, "jump", jump)
	for _, tt := range []struct {
		name, option string
		jumps        int // connections to jump and first
	}{
		{"alias", "", 0},
		{"ProxyJump", "ProxyJump jump", 1},
		{"ProxyJump with user and port", fmt.Sprintf("ProxyJump %s@jump:%d", jump.User, jump.Port), 1},
		{"ProxyJump over two", "ProxyJump first,jump", 2},
		{"ProxyCommand", "ProxyCommand ssh -F " + file + " -W %h:%p jump", 1},
		{"ProxyCommand with a pipeline", "ProxyCommand cat | ssh -F " + file + " -W %h:%p jump | cat", 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			writeFile(t, file, hostBlock(t, "mac", end, tt.option)+jumps)
			before := jump.Connections() + first.Connections()
			mustRun(t, Options{}, Config{Name: "ssh://mac", Host: "mac", SSHConfig: true, SSHOptions: []string{"-F", file}})
			if n := jump.Connections() + first.Connections() - before; n != tt.jumps {
				t.Errorf("%d connections to jump hosts, want %d", n, tt.jumps)
			}
		})
	}
	t.Run("much data", func(t *testing.T) {
		writeFile(t, file, hostBlock(t, "mac", end, "ProxyJump jump")+jumps)
		testBulk(t, &target{cfg: Config{Name: "ssh://mac", Host: "mac", SSHConfig: true, SSHOptions: []string{"-F", file}}})
	})
	t.Run("jump host gone", func(t *testing.T) {
		writeFile(t, file, hostBlock(t, "mac", end, "ProxyJump jump")+jumps)
		h := mustRun(t, new(logBuffer).options(), Config{Name: "ssh://mac", Host: "mac", SSHConfig: true, SSHOptions: []string{"-F", file}})
		s := mustSession(t, h, "cat")
		jump.Cut()
		mustBe[*LostError](t, "Wait", s.Wait())
		awaitStatus(t, h, "up again", func(st Status) bool { return st.Connects == 2 && st.State == Up })
	})
}

func TestFailingProxiesWithSSHD(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	for _, tt := range []struct {
		name, option string
		words        []string
	}{
		{"exits", "ProxyCommand sh -c 'echo no way from here >&2; exit 3'", []string{"connect: proxy \"exec sh -c", "exit status 3: no way from here"}},
		{"is not there", "ProxyCommand /no/such/program", []string{"exit status 127", "/no/such/program"}},
		{"ends at once", "ProxyCommand true", []string{"it ended"}},
		{"closes its output", "ProxyCommand sh -c 'exec >&-; sleep 600'", []string{"it has closed its output, and does not end"}},
		{"says much", "ProxyCommand yes no way | head -c 1000000 >&2; exit 1", []string{"exit status 1", "no way: no way"}},
		{"jump host unknown", "ProxyJump no-such-host.invalid", []string{"proxy \"ssh -F", "no-such-host.invalid"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := configured(t, hostBlock(t, "mac", d, tt.option))
			mustFail(t, cfg, StepConnect, CauseProxy, tt.words...)
		})
	}
	t.Run("no ssh at its end", func(t *testing.T) {
		cfg := configured(t, hostBlock(t, "mac", d, "ProxyCommand echo hello; cat"))
		e := failure(t, Options{HandshakeTimeout: time.Second}, cfg)
		if e.Step != StepHandshake && e.Cause != CauseProxy {
			t.Errorf("failed at %q: %v", e.Step, e)
		}
	})
}

// With the connection ends whatever its proxy has started.
func TestProxyEndsWithItsConnection(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	file, pids := filepath.Join(t.TempDir(), "config"), filepath.Join(t.TempDir(), "pids")
	writeFile(t, file, hostBlock(t, "mac", d,
		"ProxyCommand sh -c 'trap \"\" TERM; sleep 600 & echo $$ $! >"+pids+"; ssh -F "+file+" -W %h:%p direct'")+hostBlock(t, "direct", d))
	p := New(Options{})
	h := p.Add(Config{Name: "ssh://mac", Host: "mac", SSHConfig: true, SSHOptions: []string{"-F", file}})
	awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
	text, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	for _, pid := range strings.Fields(string(text)) {
		awaitGone(t, pid)
	}
}

// awaitGone waits for the end of a process that has been killed.
func awaitGone(t *testing.T, pid string) {
	t.Helper()
	for range 12000 { // two minutes
		state, err := os.ReadFile("/proc/" + strings.TrimSpace(pid) + "/stat")
		if err != nil || strings.Contains(string(state), ") Z ") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("process %s lives on", pid)
}

// ProxyUseFdpass: the command hands over a connection instead of being it.
func TestPassedConnectionWithSSHD(t *testing.T) {
	t.Parallel()
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("python3 is not installed")
	}
	d := sshtest.StartSSHD(t)
	script := filepath.Join(t.TempDir(), "pass.py")
	writeFile(t, script, "import socket,sys\ns=socket.create_connection((sys.argv[1],int(sys.argv[2])))\n"+
		"socket.send_fds(socket.socket(fileno=1),[b'x'],[s.fileno()])\n")
	mustRun(t, Options{}, configured(t, hostBlock(t, "mac", d, "ProxyCommand "+python+" "+script+" %h %p", "ProxyUseFdpass yes")))
	mustFail(t, configured(t, hostBlock(t, "mac", d, "ProxyCommand sh -c 'echo no >&2; exit 4'", "ProxyUseFdpass yes")),
		StepConnect, CauseProxy, "exit status 4", ": no")
}

// ssh_config edited while the host is down counts at the next attempt.
func TestEditedConfigCounts(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	cfg := configured(t, hostBlock(t, "mac", d, "ProxyCommand exit 1", "Compression yes"))
	log := new(logBuffer)
	p := New(log.options())
	defer p.Close()
	h := p.Add(cfg)
	awaitStatus(t, h, "down twice", func(st Status) bool { return st.ConnectFailures >= 2 })
	replaceFile(t, cfg.SSHOptions[1], hostBlock(t, "mac", d, "Compression yes"))
	awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
	if n := strings.Count(log.String(), "ssh option compression"); n != 1 {
		t.Errorf("%d warnings about Compression, want 1:\n%s", n, log)
	}
}

// Refresh makes an edited ssh_config count for a host that is up, without an end
// to what runs.
func TestRefreshWithSSHD(t *testing.T) {
	t.Parallel()
	one, two := sshtest.StartSSHD(t), sshtest.StartSSHD(t)
	cfg := configured(t, hostBlock(t, "mac", one))
	log := new(logBuffer)
	h := upHost(t, log.options(), cfg)
	s := mustSession(t, h, "cat")

	h.Refresh()
	h.Refresh()
	try := func() {
		t.Helper()
		s := mustSession(t, h, "true")
		if err := s.Wait(); err != nil {
			t.Error(err)
		}
		s.Close()
	}
	try()
	if n := one.Connections(); n != 1 {
		t.Errorf("%d connections after a refresh with nothing new, want 1", n)
	}

	// A way that leads nowhere changes nothing.
	replaceFile(t, cfg.SSHOptions[1], hostBlock(t, "mac", one, "Port 1"))
	h.Refresh()
	st := awaitStatus(t, h, "told of the failure", func(st Status) bool { return st.LastError != nil })
	if e := mustBe[*ConnectError](t, "LastError", st.LastError); st.State != Up || e.Cause != CauseRefused {
		t.Errorf("after a refresh that led nowhere: %+v", st)
	}
	try()

	replaceFile(t, cfg.SSHOptions[1], hostBlock(t, "mac", two))
	h.Refresh()
	awaitStatus(t, h, "connected twice", func(st Status) bool { return st.Connects == 2 })
	try()
	if n := two.Connections(); n != 1 {
		t.Errorf("%d connections to the new place, want 1", n)
	}
	fmt.Fprintln(s.Stdin, "still here")
	line := make([]byte, len("still here\n"))
	if _, err := io.ReadFull(s.Stdout, line); err != nil {
		t.Errorf("the old session: %v", err)
	}
	s.Stdin.Close()
	if err := s.Wait(); err != nil {
		t.Errorf("the old session: %v", err)
	}
	s.Close()
	st = awaitStatus(t, h, "rid of the old connection", func(st Status) bool { return st.Connections == 1 })
	if st.State != Up || st.LastError != nil {
		t.Errorf("at the end: %+v", st)
	}

	// A host that is down is tried at once.
	two.Close()
	awaitStatus(t, h, "down", func(st Status) bool { return st.State == Down })
	replaceFile(t, cfg.SSHOptions[1], hostBlock(t, "mac", one))
	h.Refresh()
	awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
}

func TestOtherOptionsWithSSHD(t *testing.T) {
	t.Setenv("MOOD", "bad")
	t.Setenv("WEATHER", "fine")
	d := sshtest.StartSSHD(t, "AcceptEnv GREETING MOOD WEATHER", "Ciphers aes256-ctr,aes256-gcm@openssh.com")
	h := upHost(t, Options{}, configured(t, hostBlock(t, "mac", d, "SetEnv GREETING=\"good day\" OTHER=x MOOD=good", "SendEnv MOOD WEA*",
		"BindAddress 127.0.0.1", "AddressFamily inet", "RekeyLimit 1M", "ConnectTimeout 20")))
	s := mustSession(t, h, `test "$GREETING$OTHER, $MOOD, $WEATHER" = "good day, good, fine"`)
	if err := s.Wait(); err != nil {
		t.Errorf("SetEnv, SendEnv: %v", err)
	}
	other, _ := sshtest.WriteKey(t, t.TempDir())
	refused := hostBlock(t, "mac", d, "GSSAPIAuthentication yes", "IdentityFile "+other)
	mustFail(t, configured(t, strings.Replace(refused, "IdentityFile "+d.Identity, "IdentitiesOnly yes", 1)), StepAuthenticate, CauseKeyRefused,
		"GSSAPIAuthentication is set, and not tried here")
	mustFail(t, configured(t, hostBlock(t, "mac", d, "Ciphers aes128-ctr")), StepHandshake, CauseNoSSH, "no common algorithm")
	mustFail(t, configured(t, hostBlock(t, "mac", d, "AddressFamily inet6")), StepConnect, CauseUnreachable)
	mustFail(t, configured(t, hostBlock(t, "mac", d, "BindAddress no-such-host.invalid")), StepConfig, CauseConfig, "BindAddress")
	mustFail(t, configured(t, hostBlock(t, "mac", d, "HostName no-such-host.invalid")), StepResolve, CauseHostUnknown)
	mustFail(t, configured(t, hostBlock(t, "mac", d, "Port 1")), StepConnect, CauseRefused, "start sshd there")
}
