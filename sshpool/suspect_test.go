package sshpool

import (
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"nixdispatch/sshpool/sshtest"
)

func isSuspect(st Status) bool { return !st.SuspectSince.IsZero() }

// A host that falls silent is suspect within the bounds, stays connected, and is
// no longer suspect with the first byte.
func TestSilentHostIsSuspect(t *testing.T) {
	tests := []struct {
		name     string
		busy     bool // has a session before it falls silent
		from, to time.Duration
	}{
		{"with work", true, time.Second, 2300 * time.Millisecond},
		{"idle, then given work", false, time.Second, 1100 * time.Millisecond},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
				h := upHost(t, opts, cfg)
				open := func() { mustSession(t, h, "cat") }
				if tt.busy {
					open()
				}
				// Keepalives are sent at whole intervals: not in the moment of the freeze.
				time.Sleep(10*time.Minute + time.Second)
				if st := h.Status(); isSuspect(st) {
					t.Fatalf("a host that answers is suspect: %+v", st)
				}
				s.Freeze(true)
				time.Sleep(10 * time.Second)
				if st := h.Status(); isSuspect(st) != tt.busy {
					t.Fatalf("after 10 s of silence: %+v", st)
				}
				start := time.Now()
				if !tt.busy {
					go h.Session(t.Context(), "cat")
					awaitStatus(t, h, "suspect", isSuspect)
				} else {
					start = start.Add(-10 * time.Second)
				}
				st := h.Status()
				if after := st.SuspectSince.Sub(start); after < tt.from || after > tt.to {
					t.Errorf("suspect after %v, want %v to %v", after, tt.from, tt.to)
				}
				if st.State != Up || st.Connects != 1 {
					t.Errorf("a suspect host: %+v", st)
				}
				s.Freeze(false)
				synctest.Wait()
				if st := h.Status(); isSuspect(st) || st.State != Up || st.Connects != 1 {
					t.Errorf("a host that answers again: %+v", st)
				}
			})
		})
	}
}

// A host that is not used is asked by keepalives only.
func TestIdleHostIsSuspectAfterAKeepalive(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		time.Sleep(time.Minute + time.Second) // not in the moment of a keepalive
		s.Freeze(true)
		start := time.Now()
		st := awaitStatus(t, h, "suspect", isSuspect)
		if d := time.Since(start); d > 32*time.Second {
			t.Errorf("suspect after %v", d)
		}
		st = awaitStatus(t, h, "down", func(st Status) bool { return st.State == Down })
		if d := time.Since(start); d < 45*time.Second || d > time.Minute || isSuspect(st) {
			t.Errorf("after %v: %+v", d, st)
		}
	})
}

func TestChangeOfSuspicionIsTold(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		changes := make(chan Status, 100)
		opts.OnChange = func(st Status) { changes <- st }
		h := upHost(t, opts, cfg)
		mustSession(t, h, "cat")
		next := func(suspect bool) {
			t.Helper()
			for st := range changes {
				if isSuspect(st) == suspect {
					return
				}
			}
		}
		for range 3 {
			s.Freeze(true)
			next(true)
			s.Freeze(false)
			next(false)
		}
	})
}

func TestPatienceIsFourRoundTrips(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q question
		answer := func(after time.Duration) time.Duration {
			if q.begin() != nil {
				t.Fatal("a question is open")
			}
			time.Sleep(after)
			q.end(true)
			_, patience := q.open()
			return patience
		}
		if got := answer(100 * time.Millisecond); got != time.Second {
			t.Errorf("patience after 100 ms: %v", got)
		}
		for range 50 {
			answer(500 * time.Millisecond)
		}
		if got := answer(500 * time.Millisecond); got < 1900*time.Millisecond || got > 2*time.Second {
			t.Errorf("patience after many answers of 500 ms: %v", got)
		}
		for range 50 {
			answer(time.Hour)
		}
		if got := answer(time.Hour); got > 4*maxRTT {
			t.Errorf("patience after answers of an hour: %v", got)
		}
	})
}

// While the way to a host takes what is sent, an answer is not overdue.
func TestUplinkThatTakesDataIsNotSuspect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(Config{}, Options{}.withDefaults(), nil)
		c := &conn{host: h, net: &liveConn{made: time.Now()}}
		c.question.begin()
		var w vigil
		c.net.writing.Store(1)
		for range 40 { // as long as an upload takes
			c.net.written.Add(32 << 10)
			time.Sleep(min(250*time.Millisecond, c.look(&w, time.Now())))
			if !c.suspect.IsZero() {
				t.Fatal("suspect while it takes data")
			}
		}
		stalled := time.Now()
		for c.suspect.IsZero() && time.Since(stalled) < time.Minute {
			time.Sleep(c.look(&w, time.Now()))
		}
		if d := c.suspect.Sub(stalled); d < 750*time.Millisecond || d > 1250*time.Millisecond {
			t.Errorf("suspect %v after it took the last data", d)
		}
	})
}

// The kernel tells what the peer's kernel has not taken.
func TestTakenOfTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	c := &liveConn{Conn: near}
	const size = 64 << 20 // more than the kernel's buffers take
	go near.Write(make([]byte, size))
	await := func(what string, ok func(taken uint64, more bool) bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			taken, more := c.taken()
			if ok(taken, more) {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s: %d bytes taken, more %v", what, taken, more)
			}
		}
	}
	await("nobody reads", func(taken uint64, more bool) bool { return taken > 0 && taken < size && more })
	go io.Copy(io.Discard, far)
	await("all is read", func(taken uint64, more bool) bool { return taken >= size && !more })
}

func TestDyingConnectionGetsNoSession(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		mustSession(t, h, "cat")
		h.conns[0].markLost(errors.New("reset by the test")) // what a session sees first
		if st := h.Status(); st.State != Up {
			t.Fatalf("the owner knows already: %+v", st)
		}
		_, err := h.Session(t.Context(), "cat")
		mustBe[*LostError](t, "Session", err)
		if !errors.Is(err, ErrNotUp) {
			t.Errorf("Session on a dying connection: %v", err)
		}
		if n := len(s.Commands()); n != 1 {
			t.Errorf("%d commands were run, want 1", n)
		}
	})
}

// A loss before the host accepted the session says that nothing was started.
func TestLossBeforeTheSessionIsAccepted(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		s.MuteOpens(true)
		time.AfterFunc(time.Second, s.Cut)
		_, err := h.Session(t.Context(), "cat")
		mustBe[*LostError](t, "Session", err)
		if !errors.Is(err, ErrNotUp) {
			t.Errorf("Session: %v", err)
		}
	})
}

func TestSuspectConnectionIsAvoided(t *testing.T) {
	inMemory(t, sshtest.ServerOptions{MaxSessions: 1}, func(t *testing.T, s *sshtest.Server, opts Options, cfg Config) {
		h := upHost(t, opts, cfg)
		first, second := mustSession(t, h, "cat"), mustSession(t, h, "cat")
		first.Close()
		second.Close()
		synctest.Wait()
		a, b := first.conn, second.conn
		h.setSuspect(a, time.Now())
		synctest.Wait()
		if st := h.Status(); isSuspect(st) {
			t.Errorf("one of two connections is suspect: %+v", st)
		}
		if third := mustSession(t, h, "cat"); third.conn != b {
			t.Error("the suspect connection got a session")
		}
		h.setSuspect(b, time.Now())
		synctest.Wait()
		if st := h.Status(); !isSuspect(st) {
			t.Errorf("all connections are suspect: %+v", st)
		}
		if fourth := mustSession(t, h, "cat"); fourth.conn != a {
			t.Error("where all are suspect, the free one did not get the session")
		}
	})
}
