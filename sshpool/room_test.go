package sshpool

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ssh"

	"nixdispatch/sshpool/sshtest"
)

func TestRefusalsThatAreNoLimit(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		mustSession(t, h, "cat")
		s.Reject(&ssh.OpenChannelError{Reason: ssh.Prohibited, Message: "not you"})
		_, err := h.Session(t.Context(), "true")
		if e := mustBe[*ConnectError](t, "Session", err); e.Step != StepOpenSession {
			t.Errorf("Session: %v", e)
		}
		s.Reject(nil)
		s.RefuseExec(true)
		_, err = h.Session(t.Context(), "true")
		mustBe[*ConnectError](t, "Session", err)
		s.RefuseExec(false)
		if err := mustSession(t, h, "true").Wait(); err != nil {
			t.Error(err)
		}
		if st := h.Status(); st.Connections != 1 || st.SessionLimit != 0 {
			t.Errorf("refusals of other kinds: %+v", st)
		}
		s.Reject(&ssh.OpenChannelError{Reason: ssh.ConnectionFailed, Message: "open failed"})
		start := time.Now()
		_, err = h.Session(context.Background(), "true")
		mustBe[*ConnectError](t, "Session", err)
		if d := time.Since(start); d > time.Minute {
			t.Errorf("a host that refuses all sessions is asked for %v", d)
		}
	})
}

// A server may count a session for a while after its end.
func TestRefusalBelowTheLimitIsTriedAgain(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{MaxSessions: 1, Linger: 200 * time.Millisecond}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		opts.MaxConnections = 1
		h := upHost(t, opts, cfg)
		for range 5 {
			session := mustSession(t, h, "true")
			if err := session.Wait(); err != nil {
				t.Error(err)
			}
			session.Close()
		}
		if st := h.Status(); st.SessionLimit != 1 || s.Handshakes() != 1 {
			t.Errorf("%+v after %d handshakes", st, s.Handshakes())
		}
	})
}

func TestBoundOfConnections(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{MaxSessions: 2}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		opts.MaxConnections = 2
		h := upHost(t, opts, cfg)
		var sessions []*Session
		for range 4 {
			sessions = append(sessions, mustSession(t, h, "cat"))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if _, err := h.Session(ctx, "cat"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a fifth session: %v", err)
		}
		got := make(chan error)
		go func() {
			_, err := h.Session(context.Background(), "true")
			got <- err
		}()
		synctest.Wait()
		sessions[2].Close()
		if err := <-got; err != nil {
			t.Error(err)
		}
		if s.Handshakes() != 2 {
			t.Errorf("%d handshakes", s.Handshakes())
		}
	})
}

// While one more connection cannot be made, the host stays up and sessions wait
// for the places there are.
func TestFailureOfOneMoreConnection(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{MaxSessions: 1}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		first := mustSession(t, h, "cat")
		s.FailDials(errors.New("connection refused"))
		got := make(chan error)
		go func() {
			session, err := h.Session(context.Background(), "cat")
			if err == nil {
				defer session.Close()
			}
			got <- err
		}()
		time.Sleep(time.Minute)
		if st := h.Status(); st.State != Up || st.LastError == nil || st.Connections != 1 {
			t.Errorf("with the second connection refused: %+v", st)
		}
		first.Close()
		if err := <-got; err != nil {
			t.Error(err)
		}
	})
}

func TestSurplusConnectionsAreClosedWhenIdle(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{MaxSessions: 1}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		a, b, c := mustSession(t, h, "cat"), mustSession(t, h, "cat"), mustSession(t, h, "cat")
		a.Close()
		b.Close()
		time.Sleep(time.Minute)
		if st := h.Status(); st.Connections != 3 {
			t.Errorf("after a minute: %+v", st)
		}
		time.Sleep(61 * time.Second)
		if st := h.Status(); st.Connections != 2 || st.Sessions != 1 {
			t.Errorf("after two minutes: %+v", st)
		}
		c.Close()
		time.Sleep(time.Hour)
		if st := h.Status(); st.Connections != 1 || st.State != Up || st.LastError != nil || st.Connects != 3 {
			t.Errorf("after an hour: %+v", st)
		}
	})
}

// Losing one of several connections is not losing the host.
func TestLossOfOneConnectionOfTwo(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{MaxSessions: 1}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		a := mustSession(t, h, "cat")
		mustSession(t, h, "true").Close() // on a second one, now idle
		time.Sleep(3 * time.Minute)
		s.Freeze(true) // what is left: the first
		session := mustSession(t, h, "cat")
		mustBe[*LostError](t, "Wait", a.Wait())
		synctest.Wait()
		if st := h.Status(); st.State != Up || st.Connections != 1 || st.Connects != 3 {
			t.Errorf("after losing one: %+v", st)
		}
		io.WriteString(session.Stdin, "x")
		if n, err := session.Stdout.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Errorf("Read on the other: %d, %v", n, err)
		}
	})
}

func TestCancelledSessionsLeaveNothingBehind(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{MaxSessions: 3}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		opts.MaxConnections = 3
		h := upHost(t, opts, cfg)
		var wg sync.WaitGroup
		var opened atomic.Int32
		for i := range 100 {
			ctx, cancel := context.WithCancel(t.Context())
			wg.Go(func() {
				session, err := h.Session(ctx, "cat")
				if err == nil {
					opened.Add(1)
					session.Close()
				} else if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
			if i%10 == 0 {
				synctest.Wait()
			}
			wg.Go(cancel)
		}
		wg.Wait()
		synctest.Wait()
		if st := h.Status(); st.Sessions != 0 || st.State != Up || s.Sessions() != 0 {
			t.Errorf("%d opened; left: %+v, %d at the server", opened.Load(), st, s.Sessions())
		}
		if err := mustSession(t, h, "true").Wait(); err != nil {
			t.Error(err)
		}
	})
}
