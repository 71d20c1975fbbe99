package daemon

import (
	"context"
	"errors"
	"os"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

func TestOrigin(t *testing.T) {
	t.Parallel()
	const stranger = 4711
	root, other := caller{uid: 0}, caller{uid: stranger}
	for _, tt := range []struct {
		name   string
		by     caller
		client *dispatchv1.Client
		want   string
	}{
		{"the caller", other, nil, "uid 4711"},
		{"by name", root, nil, "root"},
		{"a Nix daemon's client", root, &dispatchv1.Client{Uid: proto.Uint32(stranger), Pid: 9}, "uid 4711"},
		{"a Nix daemon's client is root", root, &dispatchv1.Client{Uid: proto.Uint32(0), Pid: 9}, "root"},
		{"only the process is known", root, &dispatchv1.Client{Pid: 9}, "process 9"},
		{"nothing is known", root, &dispatchv1.Client{}, "root"},
		{"others are not believed", other, &dispatchv1.Client{Uid: proto.Uint32(0), Pid: 9}, "uid 4711"},
	} {
		if got := originOf(tt.by, tt.client).String(); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestWhoMaySayWhatPriority(t *testing.T) {
	t.Parallel()
	root, own, stranger := caller{uid: 0}, caller{uid: uint32(os.Geteuid())}, caller{uid: 4711}
	for _, tt := range []struct {
		name string
		by   caller
		p    int32
		want error
	}{
		{"root raises", root, 10, nil},
		{"the daemon's user raises", own, 1, nil},
		{"a stranger raises", stranger, 1, errMayNotRaise},
		{"a stranger lowers", stranger, -10, nil},
		{"a stranger says nothing", stranger, 0, nil},
		{"too high", root, 11, errBadRequest},
		{"too low", stranger, -11, errBadRequest},
	} {
		if _, err := tt.by.priority(tt.p); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
}

// TestPriorityIsFollowed has a build of a higher priority pass the queue, and so one
// that is queued already and is then wanted with a higher one.
func TestPriorityIsFollowed(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	open := make(chan struct{})
	order := make(chan string, 8)
	m.build = func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
		order <- req.DrvPath.Name()
		return m.gated(open)(ctx, req)
	}
	s := newSite(t, m)
	build := func(r *recipe, priority int32) {
		stream, err := s.client.Build(t.Context(), &dispatchv1.BuildRequest{Derivations: []string{string(r.path)}, Priority: priority})
		if err != nil {
			t.Fatal(err)
		}
		go readBuild(stream)
		s.eventually("it is in the queue", func() bool {
			for _, b := range s.status().GetBuilds() {
				if b.GetDrvPath() == string(r.path) && b.GetPriority() == priority {
					return true
				}
			}
			return false
		})
	}
	build(s.drv("first", drvConfig{}), 0)
	s.eventually("the slot is taken", func() bool { return m.building() == 1 })
	raised := s.drv("raised", drvConfig{})
	build(raised, -2)
	build(s.drv("low", drvConfig{}), -1)
	build(s.drv("high", drvConfig{}), 5)
	build(raised, 4)
	s.eventually("their inputs are there", func() bool {
		staged := 0
		for _, b := range s.status().GetBuilds() {
			if b.GetPriority() > 0 && b.GetPhase() == dispatchv1.Phase_PHASE_STAGED {
				staged++
			}
		}
		return staged == 2
	})
	close(open)
	for _, want := range []string{"first.drv", "high.drv", "raised.drv", "low.drv"} {
		if got := <-order; got != want {
			t.Errorf("%s is built, want %s", got, want)
		}
	}
	s.idle()
	r := s.realise(&dispatchv1.BuildRequest{Derivations: []string{string(raised.path)}, Priority: 11})
	if status.Code(r.err) != codes.InvalidArgument {
		t.Errorf("priority 11: %v, want it refused", r.err)
	}
}

// TestHooksTakeTurns has one client of a Nix daemon fill queue and machine before
// another asks for a single build.
func TestHooksTakeTurns(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	gate := make(chan struct{})
	order := make(chan string, 16)
	m.build = func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
		order <- req.DrvPath.Name()
		return m.gated(gate)(ctx, req)
	}
	s := newSite(t, m)
	ask := func(uid uint32, name string) {
		h := s.hook(func(h *dispatchv1.Hello) { h.Client = &dispatchv1.Client{Uid: proto.Uint32(uid), Pid: 1} })
		h.accepted(s.drv(name, drvConfig{}))
		go h.finish()
	}
	for range 8 {
		ask(4711, "many")
	}
	s.eventually("one is built and one waits on the machine", func() bool {
		status := s.machineStatus(m)
		return m.building() == 1 && status.GetStaging() == 1
	})
	ask(4712, "single")
	s.eventually("the single one waits on the machine, too", func() bool { return s.machineStatus(m).GetStaging() == 2 })
	users := make(map[string]int)
	for _, b := range s.status().GetBuilds() {
		users[b.GetUser()]++
	}
	if users["uid 4711"] != 8 || users["uid 4712"] != 1 {
		t.Errorf("builds by user: %v", users)
	}
	s.eventually("the inputs of the single one are there", func() bool {
		for _, b := range s.status().GetBuilds() {
			if b.GetUser() == "uid 4712" {
				return b.GetPhase() == dispatchv1.Phase_PHASE_STAGED
			}
		}
		return false
	})
	close(gate)
	<-order
	if got := <-order; got != "single.drv" {
		t.Errorf("after the first, %s is built, want the single one of another user", got)
	}
	s.idle()
}
