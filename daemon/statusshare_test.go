package daemon

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// TestSecurityManyStatusCalls has a member's callers ask for the status all at once: they
// share a few snapshots, and each is as new as the question.
func TestSecurityManyStatusCalls(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.build = untilGone
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{m},
		prepare:  func(s *site) { s.guest(usage.Amounts{}) },
	})
	h := s.hook()
	h.accepted(s.drv("one", drvConfig{}))
	s.eventually("it is being built", func() bool { return m.building() == 1 })
	want := s.d.status(0)
	got := s.status()
	if len(got.GetBuilds()) != 1 {
		t.Errorf("the status has no build that was accepted before: %v", got)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform(), protocmp.IgnoreFields(&dispatchv1.MachineStatus{}, "load", "load_unknown")); diff != "" {
		t.Errorf("a shared status (-own +shared):\n%s", diff)
	}
	share := s.d.statusShare
	counts := func() (asked, taken int) {
		share.mu.Lock()
		defer share.mu.Unlock()
		return share.asked, share.taken
	}
	askedBefore, takenBefore := counts()
	const callers = 80 // a connection has 100 calls at most
	answers := make(chan error, callers)
	s.d.dispatcher.mu.Lock()
	for range callers {
		go func() {
			r, err := s.client.Status(t.Context(), &dispatchv1.StatusRequest{})
			if err == nil && len(r.GetBuilds()) != 1 {
				t.Errorf("a status has %d builds, want 1", len(r.GetBuilds()))
			}
			answers <- err
		}()
	}
	s.eventually("all have asked", func() bool { asked, _ := counts(); return asked == askedBefore+callers })
	s.d.dispatcher.mu.Unlock()
	for range callers {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	_, taken := counts()
	if n := taken - takenBefore; n < 1 || n > 2 {
		t.Errorf("%d snapshots were made for %d callers at once, want 2 at most", n, callers)
	}
	h.leave()
	s.idle()
}
