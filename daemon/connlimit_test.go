package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestConnLimit(t *testing.T) {
	t.Parallel()
	users := usage.New(usage.Amounts{usage.Connections: 4})
	l := &connLimit{log: slog.New(slog.DiscardHandler), usage: users, all: 12, others: 6}
	root, alice, bob, carol := caller{uid: 0}, caller{uid: 4711}, caller{uid: 4712}, caller{uid: 4713}
	var releases []func()
	admitted := func(c caller, n int) int {
		got := 0
		for range n {
			if release, err := l.admit(c); err == nil {
				got++
				releases = append(releases, release)
			} else if _, bound := errors.AsType[*usage.BoundError](err); !bound && !errors.Is(err, errTooManyConnections) {
				t.Fatal(err)
			}
		}
		return got
	}
	for _, tt := range []struct {
		who  string
		c    caller
		want int
	}{
		{"one user", alice, 4},
		{"another", bob, 2}, // the rest of what is not root's
		{"one who has none", carol, 1},
		{"root", root, 5}, // the rest of all
	} {
		if got := admitted(tt.c, 20); got != tt.want {
			t.Errorf("%s: %d connections, want %d", tt.who, got, tt.want)
		}
	}
	for range 2 {
		releases[0]()
		releases[0]() // counts once
		releases = releases[1:]
	}
	if got := admitted(bob, 20); got != 1 { // for carol's is beyond what is not root's
		t.Errorf("after two of alice's have gone: %d, want 1", got)
	}
	for _, release := range releases {
		release()
	}
	if l.total != 0 || l.strange != 0 || len(users.Users()) != 0 {
		t.Errorf("left over: %+v, %v", l, users.Users())
	}
}

// TestConnectsAreBounded has a user connect too often: others do not suffer, and after a
// while the user may again.
func TestConnectsAreBounded(t *testing.T) {
	t.Parallel()
	l := new(connLimit)
	now := time.Now()
	connects := func(uid uint32, n int, now time.Time) (may int) {
		for range n {
			if l.connectsLocked(uid, now) {
				may++
			}
		}
		return may
	}
	for _, tt := range []struct {
		uid   uint32
		after time.Duration
		want  int
	}{
		{4711, 0, connectBurst},
		{4711, 0, 0},
		{4712, 0, connectBurst},
		{4711, time.Second, connectRate},
		{4711, time.Hour, connectBurst},
	} {
		if got := connects(tt.uid, 1000, now.Add(tt.after)); got != tt.want {
			t.Errorf("user %d connects %d times after %v, want %d", tt.uid, got, tt.after, tt.want)
		}
	}
	connects(4713, 1, now.Add(2*time.Hour))
	if len(l.paces) != 1 {
		t.Errorf("%d users are remembered, want the last one", len(l.paces))
	}
}

// TestConnectionsAreCountedUntilTheyEnd has the server itself refuse and forget them.
func TestConnectionsAreCountedUntilTheyEnd(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	limit := s.d.connections
	dial := func() net.Conn {
		c, err := net.Dial("unix", s.d.opts.Socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	before := limit.inUse()
	c := dial()
	s.eventually("it is counted", func() bool { return limit.inUse() == before+1 })
	limit.mu.Lock()
	limit.all = limit.total
	limit.mu.Unlock()
	refused := dial()
	_ = refused.SetReadDeadline(time.Now().Add(patience))
	if n, err := refused.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one more connection reads %d, %v; want it closed", n, err)
	}
	if _, err := s.client.Status(t.Context(), &dispatchv1.StatusRequest{}); err != nil {
		t.Errorf("the others: %v", err)
	}
	c.Close()
	s.eventually("it is counted no more", func() bool { return limit.inUse() == before })
}

// TestSilentHooks has hooks say nothing at all, or nothing more: only the former are
// sent away.
func TestSilentHooks(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	waits := s.hook()
	waits.try(s.drv("asked", drvConfig{system: "nowhere"}), false) // its Hello has come
	s.d.helloWait = 50 * time.Millisecond
	silent, err := s.client.Hook(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := silent.Recv(); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "no Hello") {
		t.Errorf("a silent hook gets %v, want InvalidArgument", err)
	}
	r := s.drv("late", drvConfig{})
	waits.accepted(r)
	waits.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
}
