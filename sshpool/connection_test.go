package sshpool

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"nixdispatch/sshpool/sshtest"
)

// A session to spare costs nobody a place: neither the only one, nor one that others
// wait for, nor a further connection.
func TestSpareSessions(t *testing.T) {
	for _, tt := range []struct {
		name  string
		limit int
		// before are the sessions that are open.
		before int
		ok     bool
	}{
		{"it is not known how many there may be", 10, 0, false},
		{"beside another", 10, 1, true},
		{"beside the only one", 1, 1, false},
		{"all are taken", 3, 3, false},
		{"one is left", 3, 2, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, sshtest.ServerOptions{MaxSessions: tt.limit}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
				h := upHost(t, opts, cfg)
				for range tt.before {
					mustSession(t, h, "cat")
				}
				conns := h.Connections()
				if len(conns) != 1 {
					t.Fatalf("%d connections", len(conns))
				}
				got, err := conns[0].Spare(t.Context(), "true")
				if (err == nil) != tt.ok || err != nil && !errors.Is(err, ErrNoPlace) {
					t.Fatalf("%v", err)
				}
				if err == nil && got.Connection() != conns[0] {
					t.Error("it is on another connection")
				}
				if err == nil {
					got.Close()
				}
				synctest.Wait()
				if n := s.Handshakes(); n != 1 {
					t.Errorf("%d connections were made", n)
				}
				// What a refusal has told is remembered.
				if tt.limit == 1 && h.Status().SessionLimit != 1 {
					t.Errorf("the limit is %d", h.Status().SessionLimit)
				}
			})
		})
	}
}

func TestSpareSessionOfAHostThatIsIdleAgain(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		a, b := mustSession(t, h, "true"), mustSession(t, h, "true")
		a.Close()
		b.Close()
		synctest.Wait()
		c := h.Connections()[0]
		got, err := c.Spare(t.Context(), "true")
		if err != nil {
			t.Fatalf("two sessions had been allowed: %v", err)
		}
		got.Close()
		if c.Tag() != nil {
			t.Error("there is a tag")
		}
		c.SetTag(7)
		if c.Tag() != 7 || a.Connection().Tag() != 7 {
			t.Errorf("the tag is %v", c.Tag())
		}
		s.Cut()
		<-c.Ended()
		if _, err := c.Spare(t.Context(), "true"); err == nil {
			t.Error("a session on a connection that has ended")
		}
	})
}

// After a jump of the clock a connection must show life soon, and what waits does not.
func TestWake(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		p := New(opts)
		defer p.Close()
		h := p.Add(cfg)
		awaitStatus(t, h, "up", func(st Status) bool { return st.State == Up })
		p.Wake(10 * time.Second)
		time.Sleep(time.Minute)
		if st := h.Status(); st.State != Up || st.Connects != 1 {
			t.Fatalf("a connection that lives was given up: %+v", st)
		}
		s.Freeze(true)
		start := time.Now()
		p.Wake(10 * time.Second)
		awaitStatus(t, h, "down", func(st Status) bool { return st.State == Down })
		if d := time.Since(start); d > 11*time.Second {
			t.Errorf("a dead connection was given up after %v", d)
		}
		s.FailDials(errors.New("unreachable"))
		time.Sleep(10 * time.Minute)
		s.FailDials(nil)
		p.Wake(10 * time.Second)
		synctest.Wait()
		if st := h.Status(); st.State != Up {
			t.Errorf("it is not tried at once: %+v", st)
		}
	})
}

// What lay in the kernel's buffer when the clock jumped is read after it.
func TestWakeTakesOldBytesForNoLife(t *testing.T) {
	for said, lives := range map[time.Duration]bool{
		time.Second:     false,
		9 * time.Second: true, // the answer is long in coming, behind much else
	} {
		t.Run(said.String(), func(t *testing.T) {
			inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
				s.MuteRequests(true)
				h := upHost(t, opts, cfg)
				cat := mustSession(t, h, "cat")
				up := h.Status().Since
				h.wake(10 * time.Second)
				time.Sleep(said)
				if _, err := cat.Stdin.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				time.Sleep(11*time.Second - said)
				if st := h.Status(); st.Since.Equal(up) != lives {
					t.Errorf("a byte %v after the jump, then nothing: %+v", said, st)
				}
			})
		})
	}
}

func TestHasten(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		s.FailDials(errors.New("connection refused"))
		p := New(opts)
		defer p.Close()
		h := p.Add(cfg)
		time.Sleep(10 * time.Minute)
		for range 20 { // whoever asks often gets no more
			h.Hasten(5 * time.Second)
			time.Sleep(time.Second)
		}
		dials := s.Dials()
		recent := 0
		for _, at := range dials {
			if time.Since(at) < 20*time.Second {
				recent++
			}
		}
		if recent < 3 || recent > 4 {
			t.Errorf("%d attempts in 20 seconds, want one every 5 seconds", recent)
		}
		if left := time.Until(h.Status().RetryAt); left > 5*time.Second {
			t.Errorf("the next attempt is in %v", left)
		}
	})
}
