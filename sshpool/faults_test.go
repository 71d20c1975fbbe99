package sshpool

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"nixdispatch/sshpool/sshtest"
)

// What an attempt to connect can fail with: how long it takes, which step is
// named, and that it is made again.
func TestFailingConnects(t *testing.T) {
	probe := func(ctx context.Context, s *Session) error {
		out, err := io.ReadAll(s.Stdout)
		if err == nil && string(out) != "hello\n" {
			err = errors.New("unexpected greeting")
		}
		return err
	}
	tests := []struct {
		name   string
		set    func(s *sshtest.Server, cfg *Config)
		unset  func(s *sshtest.Server)
		step   Step
		after  time.Duration
		errHas string
	}{
		{"name not found",
			func(s *sshtest.Server, _ *Config) { s.FailDials(&net.DNSError{Err: "no such host", Name: "mac"}) },
			func(s *sshtest.Server) { s.FailDials(nil) },
			StepResolve, 0, "ssh://mac: resolve: lookup mac: no such host"},
		{"connection refused",
			func(s *sshtest.Server, _ *Config) { s.FailDials(errors.New("connection refused")) },
			func(s *sshtest.Server) { s.FailDials(nil) },
			StepConnect, 0, "ssh://mac: connect: connection refused"},
		{"no answer to connect",
			func(s *sshtest.Server, _ *Config) { s.HangDials(true) },
			func(s *sshtest.Server) { s.HangDials(false) },
			StepConnect, 15 * time.Second, "no answer within 15s"},
		{"silence instead of a handshake",
			func(s *sshtest.Server, _ *Config) { s.MuteDials(true) },
			func(s *sshtest.Server) { s.MuteDials(false) },
			StepHandshake, 30 * time.Second, "no answer within 30s"},
		{"no session allowed",
			func(s *sshtest.Server, _ *Config) {
				s.Reject(&ssh.OpenChannelError{Reason: ssh.ConnectionFailed, Message: "open failed"})
			},
			func(s *sshtest.Server) { s.Reject(nil) },
			StepOpenSession, 0, "the host refuses the session"},
		{"sessions prohibited",
			func(s *sshtest.Server, _ *Config) {
				s.Reject(&ssh.OpenChannelError{Reason: ssh.Prohibited, Message: "not you"})
			},
			func(s *sshtest.Server) { s.Reject(nil) },
			StepOpenSession, 0, "not you"},
		{"command refused",
			func(s *sshtest.Server, _ *Config) { s.RefuseExec(true) },
			func(s *sshtest.Server) { s.RefuseExec(false) },
			StepOpenSession, 0, `refuses to run "echo hello"`},
		{"silence instead of a session",
			func(s *sshtest.Server, _ *Config) { s.MuteOpens(true) },
			func(s *sshtest.Server) { s.MuteOpens(false) },
			StepProbe, 30 * time.Second, "open session: no answer within 30s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
				cfg.Probe, cfg.ProbeCommand = probe, "echo hello"
				tt.set(s, &cfg)
				p := New(opts)
				defer p.Close()
				start := time.Now()
				h := p.Add(cfg)
				if _, err := h.Session(t.Context(), "true"); !errors.Is(err, ErrNotUp) {
					t.Errorf("Session while connecting: %v", err)
				}
				st := awaitStatus(t, h, "down", func(st Status) bool { return st.State == Down })
				if d := time.Since(start); d < tt.after || d > tt.after+2*time.Second {
					t.Errorf("failed after %v, want %v", d, tt.after)
				}
				e := mustBe[*ConnectError](t, "LastError", st.LastError)
				if e.Step != tt.step || !strings.Contains(e.Error(), tt.errHas) {
					t.Errorf("error %q at step %q, want %q at %q", e, e.Step, tt.errHas, tt.step)
				}
				if st.Attempts != 1 || st.ConnectFailures != 1 || st.RetryAt.IsZero() || st.Connections != 0 {
					t.Errorf("after one failure: %+v", st)
				}
				_, err := h.Session(t.Context(), "true")
				if mustBe[*ConnectError](t, "Session", err); !errors.Is(err, ErrNotUp) {
					t.Errorf("Session while down: %v", err)
				}
				tt.unset(s)
				st = awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
				if st.Attempts != 0 || st.LastError != nil || !st.RetryAt.IsZero() || st.Connects != 1 {
					t.Errorf("when up again: %+v", st)
				}
			})
		})
	}
}

func TestPausesGrowAndKickEndsThem(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		s.FailDials(errors.New("connection refused"))
		p := New(opts)
		defer p.Close()
		h := p.Add(cfg)
		time.Sleep(10 * time.Minute)
		dials := s.Dials()
		for i, want := range []int{1, 2, 4, 8, 16, 32, 60, 60, 60} {
			mean := time.Duration(want) * time.Second
			if d := dials[i+1].Sub(dials[i]); d < mean/2 || d > mean*3/2 {
				t.Errorf("pause %d was %v, want within half of %v", i, d, mean)
			}
		}
		synctest.Wait()
		n := len(s.Dials())
		if st := h.Status(); st.Attempts != n || time.Until(st.RetryAt) <= 0 {
			t.Errorf("after %d attempts: %+v", n, st)
		}
		h.Kick()
		synctest.Wait()
		if got := len(s.Dials()); got != n+1 {
			t.Errorf("%d attempts after Kick, want %d", got, n+1)
		}
		s.FailDials(nil)
		h.Kick()
		synctest.Wait()
		if st := h.Status(); st.State != Up || st.Attempts != 0 {
			t.Errorf("after Kick: %+v", st)
		}
		h.Kick()
		synctest.Wait()
		if got := s.Handshakes(); got != 1 {
			t.Errorf("Kick while up made it %d connections", got)
		}
	})
}

func TestFlappingHostIsTriedLessAndLess(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		for range 10 * 60 {
			time.Sleep(time.Second)
			s.Cut()
		}
		if n := len(s.Dials()); n > 25 {
			t.Errorf("%d attempts in ten minutes", n)
		}
		awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
		time.Sleep(time.Minute)
		s.Cut()
		synctest.Wait()
		if d := time.Until(h.Status().RetryAt); d > 1500*time.Millisecond {
			t.Errorf("a connection that lasted is tried again after %v", d)
		}
	})
}

func TestProbe(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{MaxSessions: 1}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		var probes int
		var fail error
		cfg.ProbeCommand = "cat"
		cfg.Probe = func(ctx context.Context, session *Session) error {
			probes++
			if n := s.Sessions(); n != 1 {
				t.Errorf("%d sessions while probing", n)
			}
			io.WriteString(session.Stdin, "probe\n")
			session.Stdin.Close()
			out, err := io.ReadAll(session.Stdout)
			if err != nil || string(out) != "probe\n" {
				t.Errorf("probe: %q, %v", out, err)
			}
			return fail
		}
		fail = errors.New("not Nix")
		p := New(opts)
		defer p.Close()
		h := p.Add(cfg)
		st := awaitStatus(t, h, "down", func(st Status) bool { return st.State == Down })
		if e := mustBe[*ConnectError](t, "LastError", st.LastError); e.Step != StepProbe || !errors.Is(e, fail) {
			t.Errorf("LastError: %v", e)
		}
		fail = nil
		awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
		if probes != 2 {
			t.Errorf("%d probes, want 2", probes)
		}
		mustSession(t, h, "cat")
		mustSession(t, h, "cat")
		if st := h.Status(); st.Connections != 2 || probes != 2 {
			t.Errorf("%d probes for %+v", probes, st)
		}
	})
}

func TestHangingProbeIsEnded(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		cfg.ProbeCommand = "cat"
		cfg.Probe = func(_ context.Context, session *Session) error {
			_, err := io.ReadAll(session.Stdout)
			return err
		}
		p := New(opts)
		defer p.Close()
		start := time.Now()
		h := p.Add(cfg)
		st := awaitStatus(t, h, "down", func(st Status) bool { return st.State == Down })
		if d := time.Since(start); d < time.Minute || d > 65*time.Second {
			t.Errorf("ended after %v", d)
		}
		if e := mustBe[*ConnectError](t, "LastError", st.LastError); e.Step != StepProbe || !strings.Contains(e.Error(), "no answer within 1m") {
			t.Errorf("LastError: %v", e)
		}
	})
}

// A connection meant as one more can become the first while it is made.
func TestLateConnectionIsProbedWhenItIsTheFirst(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{MaxSessions: 1}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		probes := 0
		cfg.ProbeCommand = "true"
		cfg.Probe = func(context.Context, *Session) error { probes++; return nil }
		dials := 0
		opts.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if dials++; dials == 2 {
				time.Sleep(10 * time.Second)
			}
			return s.Dial(ctx, network, addr)
		}
		h := upHost(t, opts, cfg)
		mustSession(t, h, "cat")
		waiter := make(chan error)
		go func() {
			_, err := h.Session(t.Context(), "cat")
			waiter <- err
		}()
		time.Sleep(5 * time.Second)
		s.Cut()
		if err := <-waiter; !errors.Is(err, ErrNotUp) {
			t.Errorf("waiting for a place when the host was lost: %v", err)
		}
		// The waiter may hear of the loss before the state changes.
		awaitStatus(t, h, "up again", func(st Status) bool { return st.State == Up && st.Connects == 2 })
		if probes != 2 || dials != 2 {
			t.Errorf("%d probes and %d dials, want 2 and 2", probes, dials)
		}
	})
}

func TestSilentPeerAtSessionOpenCostsTheConnection(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		s.MuteOpens(true)
		start := time.Now()
		_, err := h.Session(context.Background(), "true")
		mustBe[*LostError](t, "Session", err)
		if d := time.Since(start); d != 30*time.Second {
			t.Errorf("given up after %v", d)
		}
		s.MuteOpens(false)
		awaitStatus(t, h, "up again", func(st Status) bool { return st.State == Up && st.Connects == 2 })
	})
}

// trickle makes data move from the server slowly, until the returned function is
// called.
func trickle(t *testing.T, h *Host) (stop func()) {
	s := mustSession(t, h, "head -c 1000000000 /dev/zero")
	done := make(chan struct{})
	go func() {
		buf := make([]byte, 100<<10)
		for {
			select {
			case <-done:
				return
			case <-time.After(10 * time.Second):
			}
			if _, err := io.ReadFull(s.Stdout, buf); err != nil {
				return
			}
		}
	}()
	return func() { close(done) }
}

func TestSlowLinkThatMovesIsNotTakenForDead(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		s.MuteRequests(true) // no keepalive is ever answered
		h := upHost(t, opts, cfg)
		stop := trickle(t, h)
		time.Sleep(10 * time.Minute)
		if st := h.Status(); st.State != Up || st.Connects != 1 {
			t.Errorf("after ten minutes: %+v", st)
		}
		s.MuteOpens(true)
		start := time.Now()
		_, err := h.Session(context.Background(), "true")
		mustBe[*LostError](t, "Session", err)
		if d := time.Since(start); d != 2*time.Minute {
			t.Errorf("a busy peer gets %v to open a session, want four times 30 s", d)
		}
		stop()
		s.MuteOpens(false)
		awaitStatus(t, h, "up", func(st Status) bool { return st.Connects == 2 })
		start = time.Now()
		awaitStatus(t, h, "down", func(st Status) bool { return st.State == Down })
		if d := time.Since(start); d < 45*time.Second || d > time.Minute {
			t.Errorf("a peer that says nothing is lost after %v", d)
		}
	})
}

func TestCloseAtAnyTimeTakesNoTime(t *testing.T) {
	tests := []struct {
		name string
		set  func(s *sshtest.Server)
		wait time.Duration
	}{
		{"dialling", func(s *sshtest.Server) { s.HangDials(true) }, 5 * time.Second},
		{"handshake", func(s *sshtest.Server) { s.MuteDials(true) }, 5 * time.Second},
		{"probe", func(s *sshtest.Server) {}, 5 * time.Second},
		{"opening the probe's session", func(s *sshtest.Server) { s.MuteOpens(true) }, 5 * time.Second},
		{"pause", func(s *sshtest.Server) { s.FailDials(io.EOF) }, 500 * time.Millisecond},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
				cfg.ProbeCommand = "cat"
				cfg.Probe = func(_ context.Context, session *Session) error {
					_, err := io.ReadAll(session.Stdout)
					return err
				}
				tt.set(s)
				p := New(opts)
				p.Add(cfg)
				time.Sleep(tt.wait)
				start := time.Now()
				p.Close()
				if d := time.Since(start); d > 0 {
					t.Errorf("Close took %v", d)
				}
			})
		})
	}
}

func TestOnChangeIsToldInOrder(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{MaxSessions: 1}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		var mu sync.Mutex // protects following variables
		var states []State
		var last Status
		opts.OnChange = func(st Status) {
			if !mu.TryLock() {
				t.Error("OnChange called twice at once")
				return
			}
			defer mu.Unlock()
			time.Sleep(time.Millisecond)
			if n := len(states); n == 0 || states[n-1] != st.State {
				states = append(states, st.State)
			}
			last = st
		}
		p := New(opts)
		h := p.Add(cfg)
		awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
		mustSession(t, h, "cat")
		mustSession(t, h, "cat")
		time.Sleep(time.Second)
		mu.Lock()
		if last.Connections != 2 {
			t.Errorf("a second connection was not told: %+v", last)
		}
		mu.Unlock()
		s.Cut()
		awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up && st.Connects == 3 })
		p.Close()
		if want := []State{Up, Down, Up, Down}; !slices.Equal(states, want) {
			t.Errorf("states %v, want %v", states, want)
		}
		if !errors.Is(last.LastError, ErrClosed) {
			t.Errorf("at the end: %+v", last)
		}
	})
}

func TestChangedHostKeyNeverConnects(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		s.SetHostKey(sshtest.NewKey())
		s.Cut()
		time.Sleep(time.Hour)
		st := h.Status()
		e := mustBe[*ConnectError](t, "LastError", st.LastError)
		if e.Step != StepHostKey || st.State != Down || st.Connects != 1 || s.Handshakes() != 1 {
			t.Errorf("with another key: %+v, %d handshakes", st, s.Handshakes())
		}
		if !strings.Contains(e.Error(), "not the one given for it") {
			t.Errorf("message: %v", e)
		}
	})
}
