package sshpool

import (
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

// inMemory runs f in a bubble where time passes only when everyone waits, with a
// server, and a config and options to reach it. The bubble fails the test if a
// goroutine is left.
func inMemory(t *testing.T, server sshtest.ServerOptions, f func(t *testing.T, s *sshtest.Server, opts Options, cfg Config)) {
	t.Helper()
	identity, _ := sshtest.WriteKey(t, t.TempDir())
	synctest.Test(t, func(t *testing.T) {
		s := sshtest.NewServer(server)
		defer s.Close()
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
func upHost(t *testing.T, opts Options, cfg Config) (*Pool, *Host) {
	t.Helper()
	p := New(opts)
	t.Cleanup(p.Close)
	h := p.Add(cfg)
	awaitState(t, h, Up)
	return p, h
}

func awaitState(t *testing.T, h *Host, want State) {
	t.Helper()
	for range 10000 {
		if h.Status().State == want {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("host is %+v, want %v", h.Status(), want)
}

func mustSession(t *testing.T, h *Host, command string) *Session {
	t.Helper()
	s, err := h.Session(t.Context(), command)
	if err != nil {
		t.Fatalf("Session(%q): %v", command, err)
	}
	return s
}

func TestFirstLook(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, srv *sshtest.Server, opts Options, cfg Config) {
		_, h := upHost(t, opts, cfg)
		s := mustSession(t, h, "echo hello")
		out, err := io.ReadAll(s.Stdout)
		if err != nil || string(out) != "hello\n" {
			t.Errorf("output %q, %v", out, err)
		}
		if err := s.Wait(); err != nil {
			t.Errorf("Wait: %v", err)
		}
		s.Close()
	})
}

func TestFullConnectionsGetCompany(t *testing.T) {
	for _, limit := range []int{1, 2, 10} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			inMemory(t, sshtest.ServerOptions{MaxSessions: limit}, func(t *testing.T, srv *sshtest.Server, opts Options, cfg Config) {
				_, h := upHost(t, opts, cfg)
				var wg sync.WaitGroup
				sessions := make([]*Session, 16)
				for i := range sessions {
					wg.Go(func() {
						var err error
						sessions[i], err = h.Session(t.Context(), "cat")
						if err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
				st := h.Status()
				if st.Sessions != 16 || st.SessionLimit != limit || st.Connections != (15+limit)/limit {
					t.Errorf("with 16 sessions: %+v", st)
				}
				if srv.Handshakes() != st.Connections {
					t.Errorf("%d handshakes for %d connections", srv.Handshakes(), st.Connections)
				}
				for _, s := range sessions {
					s.Close()
				}
				if st := h.Status(); st.Sessions != 0 {
					t.Errorf("sessions closed: %+v", st)
				}
				time.Sleep(3 * time.Minute)
				if st := h.Status(); st.Connections != 1 || st.State != Up {
					t.Errorf("after idling: %+v", st)
				}
			})
		})
	}
}

func TestFrozenPeerIsLostAndFoundAgain(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, srv *sshtest.Server, opts Options, cfg Config) {
		_, h := upHost(t, opts, cfg)
		s := mustSession(t, h, "cat")
		defer s.Close()
		time.Sleep(time.Hour)
		if st := h.Status(); st.State != Up || st.Connects != 1 {
			t.Fatalf("an idle hour: %+v", st)
		}
		start := time.Now()
		srv.Freeze(true)
		_, err := s.Stdout.Read(make([]byte, 1))
		if _, ok := errors.AsType[*LostError](err); !ok {
			t.Errorf("read of a dead session: %v", err)
		}
		if d := time.Since(start); d < 30*time.Second || d > time.Minute {
			t.Errorf("death noticed after %v", d)
		}
		if _, ok := errors.AsType[*LostError](s.Wait()); !ok {
			t.Errorf("Wait of a dead session: %v", s.Wait())
		}
		time.Sleep(time.Millisecond)
		if _, err := h.Session(context.Background(), "true"); !errors.Is(err, ErrNotUp) {
			t.Errorf("Session on a lost host: %v", err)
		}
		awaitState(t, h, Up)
	})
}
