package sshpool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"nixdispatch/sshpool/sshtest"
)

// A target is a server that the table below is run against.
type target struct {
	cfg         Config
	opts        Options
	freeze      func(bool)
	cut         func()
	connections func() int // made to the server so far
}

// TestSessions is run against the in-memory server, where time passes only when
// everyone waits, and against OpenSSH's sshd, with the limits made short.
func TestSessions(t *testing.T) {
	tests := []struct {
		name        string
		maxSessions int
		run         func(t *testing.T, to *target)
	}{
		{"streams and exit status", 10, testStreams},
		{"bulk both ways", 10, testBulk},
		{"16 sessions of one a connection", 1, testFull},
		{"16 sessions of two a connection", 2, testFull},
		{"16 sessions of ten a connection", 10, testFull},
		{"places used again and again", 2, testReuse},
		{"cut connection", 10, testCut},
		{"frozen peer", 10, testFrozen},
		{"cancelled before the session is open", 10, testCancel},
		{"closed under a running command", 10, testCloseSession},
		{"closed with everything in flight", 2, testCloseInFlight},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Run("memory", func(t *testing.T) {
				inMemory(t, sshtest.ServerOptions{MaxSessions: tt.maxSessions}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
					tt.run(t, &target{cfg, opts, s.Freeze, s.Cut, s.Handshakes})
				})
			})
			t.Run("sshd", func(t *testing.T) {
				t.Parallel()
				d := sshtest.StartSSHD(t, fmt.Sprintf("MaxSessions %d", tt.maxSessions))
				t.Log(d.Version)
				opts := Options{
					BackoffMin: 20 * time.Millisecond,
					BackoffMax: 200 * time.Millisecond,
				}
				if tt.name == "frozen peer" {
					opts.KeepaliveInterval = time.Second
				}
				tt.run(t, &target{sshdConfig(d), opts, d.Freeze, d.Cut, d.Connections})
			})
		})
	}
}

func sshdConfig(d *sshtest.SSHD) Config {
	return Config{
		Name:          "ssh://mac",
		Host:          d.Host,
		Port:          d.Port,
		User:          d.User,
		IdentityFiles: []string{d.Identity},
		AgentSocket:   "none",
		HostKey:       []byte(d.HostKeys()[0]),
	}
}

// inMemory runs f in a bubble with a server, and a config and options to reach
// it. The bubble fails the test if a goroutine is left at the end.
func inMemory(t *testing.T, server sshtest.ServerOptions, f func(t *testing.T, s *sshtest.Server, opts Options, cfg Config)) {
	t.Helper()
	identity, _ := sshtest.WriteKey(t, t.TempDir())
	synctest.Test(t, func(t *testing.T) {
		s := sshtest.NewServer(server)
		t.Cleanup(s.Close)
		f(t, s, Options{Dial: s.Dial}, Config{
			Name:          "ssh://mac",
			Host:          "mac",
			User:          "nix",
			IdentityFiles: []string{identity},
			AgentSocket:   "none",
			HostKey:       s.HostKey(),
		})
	})
}

// upHost adds a host to a new pool and waits until it is up.
func upHost(t testing.TB, opts Options, cfg Config) *Host {
	t.Helper()
	p := New(opts)
	t.Cleanup(p.Close)
	h := p.Add(cfg)
	awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
	return h
}

func awaitStatus(t testing.TB, h *Host, what string, ok func(Status) bool) Status {
	t.Helper()
	for range 30000 { // five minutes, of whichever time
		if st := h.Status(); ok(st) {
			return st
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("host does not get %s: %+v", what, h.Status())
	return Status{}
}

func mustSession(t testing.TB, h *Host, command string) *Session {
	t.Helper()
	s, err := h.Session(t.Context(), command)
	if err != nil {
		t.Fatalf("Session(%q): %v", command, err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func mustBe[E error](t *testing.T, what string, err error) E {
	t.Helper()
	e, ok := errors.AsType[E](err)
	if !ok {
		t.Fatalf("%s: got error %v (%T), want a %T", what, err, err, e)
	}
	return e
}

func testStreams(t *testing.T, to *target) {
	h := upHost(t, to.opts, to.cfg)
	tests := []struct {
		command, stdout, stderr string
		want                    ExitError
	}{
		{command: "echo hello", stdout: "hello\n"},
		{command: "echo oh no >&2", stderr: "oh no\n"},
		{command: "exit 3", want: ExitError{Status: 3}},
		{command: "kill -KILL $$", want: ExitError{Status: 128, Signal: "KILL"}},
	}
	for _, tt := range tests {
		s := mustSession(t, h, tt.command)
		var stderr []byte
		var wg sync.WaitGroup
		wg.Go(func() { stderr, _ = io.ReadAll(s.Stderr) })
		stdout, err := io.ReadAll(s.Stdout)
		wg.Wait()
		if err != nil || string(stdout) != tt.stdout || string(stderr) != tt.stderr {
			t.Errorf("%s: stdout %q (%v), stderr %q", tt.command, stdout, err, stderr)
		}
		err = s.Wait()
		if tt.want == (ExitError{}) {
			if err != nil {
				t.Errorf("%s: Wait: %v", tt.command, err)
			}
		} else if e := mustBe[*ExitError](t, tt.command, err); *e != tt.want {
			t.Errorf("%s: Wait: %+v, want %+v", tt.command, *e, tt.want)
		}
		s.Close()
		s.Close()
	}
	if st := h.Status(); st.Sessions != 0 || st.Connections != 1 || to.connections() != 1 {
		t.Errorf("at the end: %+v, %d connections made", st, to.connections())
	}
}

func testBulk(t *testing.T, to *target) {
	h := upHost(t, to.opts, to.cfg)
	s := mustSession(t, h, "cat")
	block := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 200 {
			if _, err := s.Stdin.Write(block); err != nil {
				t.Error(err)
				break
			}
		}
		s.Stdin.Close()
	})
	var got int
	buf := make([]byte, len(block))
	for {
		n, err := io.ReadFull(s.Stdout, buf)
		if got += n; err == io.EOF {
			break
		}
		if err != nil || !bytes.Equal(buf, block) {
			t.Fatalf("after %d bytes: %v", got, err)
		}
	}
	wg.Wait()
	if want := 200 * len(block); got != want {
		t.Errorf("got %d bytes back, want %d", got, want)
	}
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
}

// testFull opens 16 sessions at once, all of which stay open.
func testFull(t *testing.T, to *target) {
	h := upHost(t, to.opts, to.cfg)
	sessions := make([]*Session, 16)
	var wg sync.WaitGroup
	for i := range sessions {
		wg.Go(func() {
			var err error
			if sessions[i], err = h.Session(t.Context(), "cat"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for i, s := range sessions {
		want := fmt.Sprintf("line %d\n", i)
		io.WriteString(s.Stdin, want)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(s.Stdout, got); err != nil || string(got) != want {
			t.Errorf("session %d: %q, %v", i, got, err)
		}
	}
	st := h.Status()
	if st.Sessions != 16 || st.Connections != (15+st.SessionLimit)/st.SessionLimit {
		t.Errorf("with 16 sessions: %+v", st)
	}
	if to.connections() != st.Connections || st.Connects != uint64(st.Connections) {
		t.Errorf("%d connections made; %+v", to.connections(), st)
	}
	for _, s := range sessions {
		s.Close()
	}
	if st := h.Status(); st.Sessions != 0 || st.State != Up {
		t.Errorf("after all were closed: %+v", st)
	}
}

// testReuse runs more commands than there are places at a time.
func testReuse(t *testing.T, to *target) {
	to.opts.MaxConnections = 2
	h := upHost(t, to.opts, to.cfg)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5 {
				s, err := h.Session(t.Context(), "cat")
				if err != nil {
					t.Error(err)
					return
				}
				s.Stdin.Close()
				if err := s.Wait(); err != nil {
					t.Error(err)
				}
				s.Close()
			}
		})
	}
	wg.Wait()
	if st := h.Status(); st.Sessions != 0 || st.Connections != 2 || to.connections() != 2 {
		t.Errorf("at the end: %+v, %d connections made", st, to.connections())
	}
}

func testCut(t *testing.T, to *target) {
	h := upHost(t, to.opts, to.cfg)
	s := mustSession(t, h, "cat")
	io.WriteString(s.Stdin, "x")
	buf := make([]byte, 10)
	if n, err := s.Stdout.Read(buf); n != 1 || err != nil {
		t.Fatalf("Read: %d, %v", n, err)
	}
	to.cut()
	_, err := s.Stdout.Read(buf)
	mustBe[*LostError](t, "Stdout.Read", err)
	_, err = s.Stderr.Read(buf)
	mustBe[*LostError](t, "Stderr.Read", err)
	mustBe[*LostError](t, "Wait", s.Wait())
	_, err = s.Stdin.Write(buf)
	mustBe[*LostError](t, "Stdin.Write", err)

	st := awaitStatus(t, h, "up again", func(st Status) bool { return st.Connects == 2 })
	if st.State != Up || st.LastError != nil || to.connections() != 2 {
		t.Errorf("after reconnecting: %+v, %d connections made", st, to.connections())
	}
	if err := mustSession(t, h, "true").Wait(); err != nil {
		t.Error(err)
	}
}

func testFrozen(t *testing.T, to *target) {
	h := upHost(t, to.opts, to.cfg)
	interval := 15 * time.Second
	if to.opts.KeepaliveInterval != 0 {
		interval = to.opts.KeepaliveInterval
	}
	// In memory every keepalive is answered in time. sshd has three seconds, which may
	// be too few on a busy host: but not again and again.
	tries := 1
	if to.opts.KeepaliveInterval != 0 {
		tries = 10
	}
	for try := 1; ; try++ {
		before := awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
		time.Sleep(4 * interval)
		if st := h.Status(); st.Connects == before.Connects && st.State == Up {
			break
		} else if try == tries {
			t.Fatalf("idle for long: %+v", st)
		}
	}
	s := mustSession(t, h, "cat")
	start := time.Now()
	to.freeze(true)
	defer to.freeze(false)
	_, err := s.Stdout.Read(make([]byte, 1))
	mustBe[*LostError](t, "Stdout.Read", err)
	if d := time.Since(start); d < 2*interval {
		t.Errorf("given up after %v", d)
	}
	awaitStatus(t, h, "connected again", func(st Status) bool { return st.Connects > 1 && st.State == Up })
}

func testCancel(t *testing.T, to *target) {
	h := upHost(t, to.opts, to.cfg)
	to.freeze(true)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := h.Session(ctx, "cat"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Session: %v, want the context's error", err)
	}
	if st := h.Status(); st.Sessions != 1 {
		t.Errorf("the peer may still open it, but the place is free: %+v", st)
	}
	to.freeze(false)
	st := awaitStatus(t, h, "free", func(st Status) bool { return st.Sessions == 0 })
	if st.State != Up || st.Connects != 1 {
		t.Errorf("after a cancelled session: %+v", st)
	}
}

func testCloseSession(t *testing.T, to *target) {
	h := upHost(t, to.opts, to.cfg)
	s := mustSession(t, h, "sleep 20")
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := s.Stdout.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("Read of a closed session: %v", err)
		}
	})
	time.Sleep(50 * time.Millisecond)
	s.Close()
	wg.Wait()
	if err := s.Wait(); err == nil {
		t.Error("Wait of a closed session returned nil")
	}
	if st := h.Status(); st.Sessions != 0 || st.State != Up {
		t.Errorf("after Close: %+v", st)
	}
}

func testCloseInFlight(t *testing.T, to *target) {
	p := New(to.opts)
	h := p.Add(to.cfg)
	awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() {
			s, err := h.Session(t.Context(), "cat")
			if err != nil {
				if !errors.Is(err, ErrClosed) && !errors.Is(err, ErrNotUp) {
					t.Errorf("Session: %v", err)
				}
				return
			}
			defer s.Close()
			if _, err := io.Copy(io.Discard, s.Stdout); !errors.Is(err, ErrClosed) {
				t.Errorf("Stdout: %v, want ErrClosed", err)
			}
			if err := s.Wait(); !errors.Is(err, ErrClosed) {
				t.Errorf("Wait: %v, want ErrClosed", err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond)
	p.Close()
	wg.Wait()
	if st := h.Status(); st.State != Down || !errors.Is(st.LastError, ErrClosed) || st.Connections != 0 {
		t.Errorf("after Close: %+v", st)
	}
	if _, err := h.Session(context.Background(), "true"); !errors.Is(err, ErrClosed) {
		t.Errorf("Session after Close: %v", err)
	}
	h = p.Add(to.cfg)
	h.Close()
	if _, err := h.Session(context.Background(), "true"); !errors.Is(err, ErrClosed) {
		t.Errorf("Session of a host added to a closed pool: %v", err)
	}
}
