package usage

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
)

var alice, bob = User{UID: 4711}, User{UID: 4712}

func TestBoundsAreEachUsersOwn(t *testing.T) {
	t.Parallel()
	l := New(Amounts{Calls: 3})
	var uses []*Use
	for range 3 {
		u, err := l.Take(alice, Calls, 1)
		if err != nil {
			t.Fatal(err)
		}
		uses = append(uses, u)
	}
	_, err := l.Take(alice, Calls, 1)
	var bound *BoundError
	if !errors.As(err, &bound) || *bound != (BoundError{Resource: Calls, Bound: 3}) {
		t.Errorf("one more: %v, want a BoundError", err)
	}
	for _, want := range []string{"calls in progress", "one user may have 3", "wait until"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not tell %q", err, want)
		}
	}
	if _, err := l.Take(bob, Calls, 1); err != nil {
		t.Errorf("another user: %v", err)
	}
	if _, err := l.Take(alice, Streams, 100); err != nil {
		t.Errorf("something without a bound: %v", err)
	}
	uses[0].Release()
	uses[0].Release() // counts once
	if _, err := l.Take(alice, Calls, 1); err != nil {
		t.Errorf("after one has ended: %v", err)
	}
	if _, err := l.Take(alice, Calls, 1); err == nil {
		t.Error("what was released twice counted twice")
	}
	if got, want := l.Refused(), (Amounts{Calls: 2}); got != want {
		t.Errorf("refused %v, want %v", got, want)
	}
}

// Who has nothing of a resource in progress gets what they ask for.
func TestWhoHasNothingIsTaken(t *testing.T) {
	t.Parallel()
	l := New(Amounts{RequestBytes: 10})
	u, err := l.Take(alice, RequestBytes, 100)
	if err != nil {
		t.Errorf("the first: %v", err)
	}
	if _, err := l.Take(alice, RequestBytes, 1); err == nil {
		t.Error("one more was taken beside it")
	}
	u.Release()
	if got := l.Users(); len(got) != 0 {
		t.Errorf("left over: %v", got)
	}
}

func TestWaitIsInTurn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := New(Amounts{Builds: 1})
		first, err := l.Wait(t.Context(), alice, Builds)
		if err != nil {
			t.Fatal(err)
		}
		if u, err := l.Wait(t.Context(), bob, Builds); err != nil {
			t.Errorf("another user: %v", err)
		} else {
			u.Release()
		}
		reason := errors.New("left")
		ctx, leave := context.WithCancelCause(t.Context())
		got := make(chan int)
		uses := make(map[int]*Use)
		for n := range 3 {
			go func() {
				ctx := ctx
				if n != 0 {
					ctx = t.Context()
				}
				u, err := l.Wait(ctx, alice, Builds)
				if n == 0 {
					if !errors.Is(err, reason) {
						t.Errorf("who left got %v, want %v", err, reason)
					}
					return
				}
				uses[n] = u
				got <- n
			}()
			synctest.Wait() // so that they come in this order
		}
		leave(reason)
		synctest.Wait()
		for want := 1; want <= 2; want++ {
			select {
			case n := <-got:
				t.Errorf("number %d has it beside another", n)
			default:
			}
			first.Release()
			if n := <-got; n != want {
				t.Errorf("number %d has it, want %d", n, want)
			}
			if n := l.Of(alice, Builds); n != 1 {
				t.Errorf("%d are counted, want 1", n)
			}
			first = uses[want]
		}
		first.Release()
		if got := l.Users(); len(got) != 0 {
			t.Errorf("left over: %v", got)
		}
	})
}

func TestGrowAndMove(t *testing.T) {
	t.Parallel()
	l := New(Amounts{LogBytes: 10})
	u := l.Count(alice, LogBytes, 0)
	if !u.Grow(6, true) || u.Grow(6, true) || !u.Grow(4, true) {
		t.Error("6 and 4 fit into 10, and 6 more do not")
	}
	if !u.Grow(5, false) {
		t.Error("5 more did not fit though there was no bound")
	}
	u.Move(bob, HookBytes)
	if a, b := l.Of(alice, LogBytes), l.Of(bob, HookBytes); a != 0 || b != 15 {
		t.Errorf("alice has %d, bob %d; want 0 and 15", a, b)
	}
	u.Release()
	var none *Use
	none.Release()
	if got := l.Users(); len(got) != 0 {
		t.Errorf("left over: %v", got)
	}
}
