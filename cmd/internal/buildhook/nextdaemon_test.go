package buildhook

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"nixdispatch/cmd/internal/daemonsocket"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestHookWhenTheDaemonDiesWhileItBuilds(t *testing.T) {
	d := building(t, func(s hookStream, _ *dispatchv1.Start) error {
		s.Send(logged("begun\n"))
		<-s.Context().Done()
		return nil
	})
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket, hookPatienceEnv+"=300ms")
	n.try(testSystem, true)
	n.begin()
	d.server.Stop()
	if got := n.wait(); got != 1 {
		t.Errorf("exit status = %d, want 1", got)
	}
	if got := n.said(0); !strings.Contains(got, "nix-dispatchd went away") || !strings.Contains(got, string(n.drv)) ||
		!strings.Contains(got, "did not come back within 300ms") {
		t.Errorf("said %q", got)
	}
	if got := n.said(1); !strings.Contains(got, "waiting for the daemon to come back") {
		t.Errorf("said %q while it waited", got)
	}
}

// TestHookOffersTheBuildToTheNextDaemon has the daemon die twice: while it builds,
// and when it is about to import the outputs.
func TestHookOffersTheBuildToTheNextDaemon(t *testing.T) {
	var asked []*dispatchv1.HookRequest
	var mu sync.Mutex
	calls := 0
	d := &fakeDaemon{hook: func(s hookStream) error {
		mu.Lock()
		calls++
		call := calls
		mu.Unlock()
		for {
			req, err := s.Recv()
			if err != nil {
				return nil
			}
			mu.Lock()
			asked = append(asked, req)
			mu.Unlock()
			switch {
			case req.GetTry() != nil && call == 3:
				s.Send(replyWith(dispatchv1.Reply_ACTION_POSTPONE, "no room yet", false))
			case req.GetTry() != nil:
				s.Send(replyWith(dispatchv1.Reply_ACTION_ACCEPT, "", false))
			case req.GetStart() != nil && call < 3:
				s.Send(logged(fmt.Sprintf("attempt %d\n", call)))
				return status.Error(codes.Unavailable, "it is killed")
			case req.GetStart() != nil:
				s.Send(logged("attempt 4\n"))
				return s.Send(finished(dispatchv1.BuildStatus_BUILD_STATUS_BUILT, "ssh://mac", ""))
			}
		}
	}}
	d.start(t)
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	n.try(testSystem, true)
	n.begin()
	if got := n.wait(); got != 0 {
		t.Errorf("exit status = %d, said %q", got, n.said(9))
	}
	if got := string(n.log); got != "attempt 1\nattempt 2\nattempt 4\n" {
		t.Errorf("log = %q", got)
	}
	var taken []bool
	starts := 0
	for _, req := range asked {
		if try := req.GetTry(); try != nil {
			taken = append(taken, try.GetTaken())
			if try.GetTaken() && try.GetAmWilling() {
				t.Error("the daemon was told that Nix could build it itself")
			}
		}
		if start := req.GetStart(); start != nil {
			starts++
			if diff := cmp.Diff([]string{"out", "doc"}, start.GetWantedOutputs()); diff != "" {
				t.Errorf("start %d: %s", starts, diff)
			}
		}
	}
	if diff := cmp.Diff([]bool{false, true, true, true}, taken); diff != "" || starts != 3 {
		t.Errorf("%d starts; taken (-want +got):\n%s", starts, diff)
	}
}

func TestHookFailsWhenTheNextDaemonDoesNotTakeTheBuild(t *testing.T) {
	var calls atomic.Int32
	d := &fakeDaemon{hook: func(s hookStream) error {
		first := calls.Add(1) == 1
		for {
			req, err := s.Recv()
			switch {
			case err != nil:
				return nil
			case req.GetTry() != nil && first:
				s.Send(replyWith(dispatchv1.Reply_ACTION_ACCEPT, "", false))
			case req.GetTry() != nil:
				s.Send(replyWith(dispatchv1.Reply_ACTION_DECLINE, "no machine can build it", false))
			case req.GetStart() != nil:
				return status.Error(codes.Unavailable, "it is killed")
			}
		}
	}}
	d.start(t)
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	n.try(testSystem, true)
	n.begin()
	if got := n.wait(); got != 1 {
		t.Errorf("exit status = %d, want 1", got)
	}
	if got := n.said(0); !strings.Contains(got, "the next one does not take it: no machine can build it") {
		t.Errorf("said %q", got)
	}
}
