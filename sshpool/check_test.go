package sshpool

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/sshpool/sshtest"
)

// stepsOf connects and tells of each step in a line.
func stepsOf(t *testing.T, cfg Config, opts Options) (*Check, []string, error) {
	t.Helper()
	var steps []string
	k, err := Connect(t.Context(), cfg, opts, func(r StepReport) {
		if r.Took < 0 {
			t.Errorf("step %q took %v", r.Step, r.Took)
		}
		steps = append(steps, string(r.Step)+": "+strings.Join(append([]string{r.Detail}, r.Warnings...), "; "))
	})
	if k != nil {
		t.Cleanup(k.Close)
	}
	return k, steps, err
}

// matches compares lines with wanted beginnings.
func matches(t *testing.T, got, want []string) {
	t.Helper()
	short := make([]string, len(got))
	for i, s := range got {
		if i < len(want) && strings.HasPrefix(s, want[i]) {
			s = want[i]
		}
		short[i] = s
	}
	if diff := cmp.Diff(want, short); diff != "" {
		t.Errorf("steps (-want +got):\n%s", diff)
	}
}

func output(t *testing.T, k *Check, command string) string {
	t.Helper()
	s, err := k.Session(t.Context(), command)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	text, err := io.ReadAll(s.Stdout)
	if err != nil || s.Wait() != nil {
		t.Fatalf("%s: %q, %v, %v", command, text, err, s.Wait())
	}
	return string(text)
}

func TestCheckTellsEachStep(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	cfg := sshdConfig(d)
	other, _ := sshtest.WriteKey(t, t.TempDir())
	cfg.IdentityFiles = []string{other, d.Identity}
	k, steps, err := stepsOf(t, cfg, Options{})
	if err != nil {
		t.Fatal(err)
	}
	addr := k.h.target.addr()
	matches(t, steps, []string{
		"ssh config: " + d.User + "@" + addr,
		"resolve: 127.0.0.1",
		"connect: " + addr,
		"handshake: SSH-2.0-OpenSSH",
		"host key: ssh-ed25519 SHA256:",
		"authenticate: as user \"" + d.User + "\" with " + d.Identity + " (SHA256:",
	})
	if !strings.HasSuffix(steps[4], ", the one given for it") {
		t.Errorf("host key: %q", steps[4])
	}
	// One connection, several commands.
	for _, word := range []string{"one", "two"} {
		if got := output(t, k, "echo "+word); got != word+"\n" {
			t.Errorf("echo printed %q", got)
		}
	}
	if n := d.Connections(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	k.Close()
	if _, err := k.Session(t.Context(), "true"); err == nil {
		t.Error("a session on a closed connection")
	}
}

func TestCheckTellsWhereTheHostKeyIsKnownFrom(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	known := t.TempDir() + "/known"
	for _, tt := range []struct{ name, text, want string }{
		{"with the port", "# mine\n[127.0.0.1]:PORT KEY\n", ", known from " + known + ":2"},
		{"without", "127.0.0.1 KEY\n", ", known from " + known + ":1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := sshdConfig(d)
			cfg.HostKey, cfg.KnownHostsFiles = nil, []string{known}
			_, port, _ := net.SplitHostPort(plainTarget(cfg, &localUser{}).addr())
			writeFile(t, known, strings.NewReplacer("PORT", port, "KEY", strings.TrimSpace(d.HostKeys()[0])).Replace(tt.text))
			_, steps, err := stepsOf(t, cfg, Options{})
			if err != nil || !strings.HasSuffix(steps[4], tt.want) {
				t.Errorf("%v, steps %q; want the host key %q", err, steps, tt.want)
			}
		})
	}
}

func TestCheckNamesTheStepThatFails(t *testing.T) {
	tests := []struct {
		name  string
		set   func(s *sshtest.Server, cfg *Config)
		steps []string
		step  Step
		cause Cause
	}{
		{"no answer", func(s *sshtest.Server, _ *Config) { s.HangDials(true) }, []string{"ssh config: nix@mac:22"}, StepConnect, CauseTimeout},
		{"silence", func(s *sshtest.Server, _ *Config) { s.MuteDials(true) }, []string{"ssh config: nix@mac:22", "connect: "}, StepHandshake, CauseTimeout},
		{"another host key", func(s *sshtest.Server, _ *Config) { s.SetHostKey(sshtest.NewKey()) },
			[]string{"ssh config: nix@mac:22", "connect: ", "handshake: SSH-2.0-"}, StepHostKey, CauseHostKeyChanged},
		{"no key", func(_ *sshtest.Server, cfg *Config) { cfg.IdentityFiles = []string{"/nonexistent"} },
			[]string{"ssh config: nix@mac:22", "connect: ", "handshake: SSH-2.0-", "host key: "}, StepAuthenticate, CauseNoKey},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
				tt.set(s, &cfg)
				k, steps, err := stepsOf(t, cfg, opts)
				if k != nil {
					t.Fatal("it connected")
				}
				matches(t, steps, tt.steps)
				e := mustBe[*ConnectError](t, "Connect", err)
				if e.Step != tt.step || e.Cause != tt.cause || e.Fix == "" {
					t.Errorf("step %q, cause %q, fix %q; want %q, %q and a fix", e.Step, e.Cause, e.Fix, tt.step, tt.cause)
				}
			})
		})
	}
}

func TestCheckGivesUpWithItsContext(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		s.MuteDials(true)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if _, err := Connect(ctx, cfg, opts, func(StepReport) {}); err == nil {
			t.Error("it connected")
		}
		if d := time.Since(start); d > 2*time.Second {
			t.Errorf("it took %v", d)
		}
	})
}

// What answers may be no sshd at all.
func TestCheckShowsWhatSpeaksNoSSH(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "220 mail\x1b[2J\r\n") //nolint:errcheck // a fake
			c.Close()
		}
	}()
	cfg := Config{Name: "ssh://mac", Host: "127.0.0.1", Port: l.Addr().(*net.TCPAddr).Port, AgentSocket: "none"}
	_, _, err = stepsOf(t, cfg, Options{})
	e := mustBe[*ConnectError](t, "Connect", err)
	if e.Step != StepHandshake || !strings.Contains(e.Error(), `it says "220 mail\x1b[2J\r\n"`) {
		t.Errorf("%v", e)
	}
}

func TestCheckByProxy(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	_, steps, err := stepsOf(t, configured(t, hostBlock(t, "mac", d, "ProxyCommand exit 3")), Options{})
	e := mustBe[*ConnectError](t, "Connect", err)
	if e.Step != StepConnect || e.Cause != CauseProxy || len(steps) != 1 {
		t.Errorf("after %q: %v", steps, err)
	}
	_, steps, err = stepsOf(t, configured(t, hostBlock(t, "mac", d, "ProxyJump jump")+hostBlock(t, "jump", d)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	matches(t, steps, []string{"ssh config: ", "connect: by ProxyJump jump", "handshake: SSH-2.0-OpenSSH", "host key: ", "authenticate: "})
}

func TestCheckOfALocalHostRunsCommands(t *testing.T) {
	t.Parallel()
	k, steps, err := stepsOf(t, Config{Name: "ssh://localhost", Local: true}, Options{})
	if err != nil || len(steps) != 0 {
		t.Fatalf("%v, steps %q", err, steps)
	}
	if got := output(t, k, "echo here"); got != "here\n" {
		t.Errorf("echo printed %q", got)
	}
}

func TestVersionLine(t *testing.T) {
	for _, tt := range []struct{ head, want string }{
		{"", ""}, {"HTTP/1.1 400\r\n", ""}, {"SSH-2.0-x\r\nmore", "SSH-2.0-x"}, {"hello\nSSH-2.0-y", "SSH-2.0-y"},
	} {
		if got := versionLine([]byte(tt.head)); got != tt.want {
			t.Errorf("versionLine(%q) = %q, want %q", tt.head, got, tt.want)
		}
	}
}

func TestBeginningIsBounded(t *testing.T) {
	l := &liveConn{made: time.Now(), Conn: readConn{bytes.NewReader(bytes.Repeat([]byte("x"), 3*maxHead))}, onError: func(error) {}}
	if _, err := io.CopyBuffer(io.Discard, struct{ io.Reader }{l}, make([]byte, 300)); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if head, at := l.beginning(); len(head) != maxHead || at.IsZero() {
		t.Errorf("%d bytes kept, want %d", len(head), maxHead)
	}
}

type readConn struct{ io.Reader }

func (readConn) Write(p []byte) (int, error)      { return len(p), nil }
func (readConn) Close() error                     { return nil }
func (readConn) LocalAddr() net.Addr              { return proxyAddr{} }
func (readConn) RemoteAddr() net.Addr             { return proxyAddr{} }
func (readConn) SetDeadline(time.Time) error      { return nil }
func (readConn) SetReadDeadline(time.Time) error  { return nil }
func (readConn) SetWriteDeadline(time.Time) error { return nil }
