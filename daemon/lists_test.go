package daemon

import (
	"errors"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A listSite has one machine in the daemon's own list, and lines of others that
// requests may name.
type listSite struct {
	*site
	own   *fakeMachine
	lines map[string]string // by machine name
}

func newListSite(t *testing.T, own *fakeMachine, others ...*fakeMachine) *listSite {
	t.Helper()
	s := &listSite{own: own, lines: make(map[string]string)}
	for _, m := range others {
		m.late = true
	}
	s.site = newSiteWith(t, siteConfig{machines: append([]*fakeMachine{own}, others...), options: func(o *Options) {
		lines := strings.Split(o.Builders, "\n")
		s.lines[own.name] = lines[0]
		for i, m := range others {
			s.lines[m.name] = lines[i+1]
		}
		o.Builders = lines[0]
		o.ReloadPoll = time.Hour
	}})
	return s
}

// with is a hook's builders setting.
func (s *listSite) with(names ...string) func(*dispatchv1.Hello) {
	var lines []string
	for _, name := range names {
		lines = append(lines, s.lines[name])
	}
	return func(h *dispatchv1.Hello) { h.Builders = strings.Join(lines, " ; ") }
}

func TestMachinesNamedByARequest(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		own, other := oneMachine(scheme), namedMachine(scheme, "m2")
		s := newListSite(t, own, other)
		// It could be built locally, and a local slot is free: but the machine is named.
		h := s.hook(locally, s.with("m2"))
		thing := s.drv("thing", drvConfig{})
		// While the connection comes up it may be told to ask again, as Nix does.
		var reply *dispatchv1.Reply
		s.eventually("the build is taken or declined", func() bool {
			reply = h.try(thing, true)
			return reply.GetAction() != postpone
		})
		if reply.GetAction() != accept || reply.GetMachineName() != other.uri() {
			t.Fatalf("reply = %v, want %s", reply, other.uri())
		}
		h.start(thing)
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		s.mustBuild(s.drv("plain", drvConfig{}))
		again := s.hook(s.with("m2"))
		again.accepted(s.drv("again", drvConfig{}))
		again.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if len(own.built()) != 1 || len(other.built()) != 2 || other.ssh.Handshakes() != 1 {
			t.Errorf("built %d on the own machine, %d on the named one over %d connections; want 1, 2 over 1",
				len(own.built()), len(other.built()), other.ssh.Handshakes())
		}
		if got := s.machineStatus(other).GetReason(); got != "it is not in the daemon's list: a request named it" {
			t.Errorf("the status says %q of the machine that was named", got)
		}
		if n := s.metric("nix_dispatch_builds_total", map[string]string{"machine": "other", "result": "built"}); n != 2 {
			t.Errorf("builds_total{machine=other} = %v, want 2", n)
		}
		if n := s.metric("nix_dispatch_machine_slots", map[string]string{"machine": other.uri()}); n != 0 {
			t.Errorf("the machine that was named has metrics of its own")
		}
		s.eventually("the list is unused", func() bool {
			_, dropped := s.d.machines.dropUnused(time.Now())
			return !dropped && s.unused() == 1
		})
		s.d.retire()
		if s.machineStatus(other) == nil {
			t.Error("the machine that was named is gone at once")
		}
		s.ageLists()
		s.eventually("the machine is let go", func() bool {
			s.d.retire()
			return s.machineStatus(other) == nil && other.ssh.Sessions() == 0
		})
		if n := s.metric("nix_dispatch_ssh_connects_total", map[string]string{"machine": "other", "result": "ok"}); n != 1 {
			t.Errorf("ssh_connects_total{machine=other} = %v after the machine was let go, want 1", n)
		}
	})
}

// unused counts the lists that nobody uses.
func (s *listSite) unused() int {
	s.d.machines.mu.Lock()
	defer s.d.machines.mu.Unlock()
	n := 0
	for _, l := range s.d.machines.requested {
		if l.uses == 0 {
			n++
		}
	}
	return n
}

// ageLists makes unused lists old.
func (s *listSite) ageLists() {
	s.d.machines.mu.Lock()
	defer s.d.machines.mu.Unlock()
	for _, l := range s.d.machines.requested {
		l.unused = l.unused.Add(-namedIdle)
	}
}

// TestListsShareAMachinesSlots has a machine in two lists.
func TestListsShareAMachinesSlots(t *testing.T) {
	t.Parallel()
	own, other := oneMachine("ssh"), namedMachine("ssh", "m2")
	own.slots = 2
	open := make(chan struct{})
	own.build = own.gated(open)
	s := newListSite(t, own, other)
	var hooks []*hookClient
	for i, change := range []func(*dispatchv1.Hello){func(*dispatchv1.Hello) {}, s.with("m1", "m2"), func(*dispatchv1.Hello) {}, s.with("m1", "m2"), s.with("m1", "m2")} {
		h := s.hook(change)
		h.accepted(s.drv("thing"+strconv.Itoa(i), drvConfig{}))
		hooks = append(hooks, h)
	}
	s.eventually("both slots are used", func() bool { return own.building() == 2 })
	s.eventually("the other machine takes what may go there", func() bool { return len(other.built()) >= 1 })
	close(open)
	for _, h := range hooks {
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	}
	if own.mostBusy != 2 || own.ssh.Handshakes() != 1 {
		t.Errorf("%d builds at once over %d connections, want 2 over 1", own.mostBusy, own.ssh.Handshakes())
	}
}

func TestNamedMachineThatIsNotUp(t *testing.T) {
	t.Parallel()
	own, other := oneMachine("ssh"), namedMachine("ssh", "m2")
	s := newListSite(t, own, other)
	other.ssh.HangDials(true)
	h := s.hook(locally, s.with("m2"))
	thing := s.drv("thing", drvConfig{})
	wantReply(t, h.try(thing, true), postpone, "being connected to")
	other.ssh.FailDials(errors.New("no route"))
	other.ssh.HangDials(false)
	other.ssh.Cut()
	s.eventually("it is down", func() bool {
		return s.machineStatus(other).GetState() == dispatchv1.MachineState_MACHINE_STATE_DOWN
	})
	wantReply(t, h.try(thing, true), decline, "is down")
}

func TestWhoMayNameMachines(t *testing.T) {
	t.Parallel()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	group, err := user.LookupGroupId(me.Gid)
	if err != nil {
		t.Skipf("the group has no name: %v", err)
	}
	gid, err := strconv.ParseUint(me.Gid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	s := newListSite(t, oneMachine("ssh"), namedMachine("ssh", "m2"))
	stranger, member := caller{uid: 4242, gid: 4242}, caller{uid: 4242, gid: uint32(gid)}
	other := caller{uid: nobody(t), gid: 4242, groups: []uint32{4243}}
	also := caller{uid: 4242, gid: 4242, groups: []uint32{4243, uint32(gid)}}
	for _, tt := range []struct {
		name, group string
		caller      caller
		want        bool
	}{
		{"root", "", caller{uid: 0}, true},
		{"the daemon's user", "", caller{uid: uint32(os.Geteuid())}, true},
		{"a stranger", group.Name, stranger, false},
		{"a member where no group is set", "", member, false},
		{"a member of another group", "no-such-group", member, false},
		{"a member", group.Name, member, true},
		{"a member by a further group", group.Name, also, true},
		{"a known user who is no member", group.Name, other, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.d.opts.MachinesGroup = tt.group
			settings := s.hello()
			settings.Builders = s.lines["m2"]
			h := s.conversation(tt.caller, settings)
			got, f := h.decide(&dispatchv1.Try{DrvPath: string(s.drv("thing", drvConfig{}).path)})
			want := stock
			if tt.want {
				want = accept
				f.leave(errCancelled)
				h.lease.release()
			}
			if got.GetAction() != want {
				t.Errorf("reply = %v, want %v", got, want)
			}
			_, err := s.d.leaseFor(&dispatchv1.BuildRequest{Builders: &settings.Builders}, tt.caller)
			if (err == nil) != tt.want || !tt.want && status.Code(toStatus(err)) != codes.PermissionDenied {
				t.Errorf("leaseFor = %v", err)
			}
		})
	}
	// Whoever may not name machines has no file read.
	file := filepath.Join(t.TempDir(), "fifo")
	_, err = s.d.lease("@"+file, stranger)
	if !errors.Is(err, errMayNotName) {
		t.Errorf("lease = %v, want errMayNotName", err)
	}
}

func TestBuildOnNamedMachines(t *testing.T) {
	t.Parallel()
	own, other := oneMachine("ssh"), namedMachine("ssh-ng", "m2")
	s := newListSite(t, own, other)
	build := func(name, builders string) *realising {
		return s.realise(&dispatchv1.BuildRequest{Derivations: []string{string(s.drv(name, drvConfig{}).path)}, Builders: &builders})
	}
	file := filepath.Join(t.TempDir(), "machines")
	write(t, file, s.lines["m2"])
	for name, builders := range map[string]string{"text": s.lines["m2"], "file": "@" + file, "own": s.lines["m1"], "none": " "} {
		if r := build(name, builders); !r.summary.GetSuccess() {
			t.Errorf("%s: %v, %v", name, r.summary, r.err)
		}
	}
	if len(own.built()) != 1 || len(other.built()) != 2 || len(s.local.builtHere()) != 1 {
		t.Errorf("built %d on the own machine, %d on the named, %d locally; want 1, 2, 1",
			len(own.built()), len(other.built()), len(s.local.builtHere()))
	}
	if r := build("bad", "ssh://x - - many"); status.Code(r.err) != codes.InvalidArgument {
		t.Errorf("bad builders: %v, want INVALID_ARGUMENT", r.err)
	}
}

// TestListsAreBounded names many lists.
func TestListsAreBounded(t *testing.T) {
	t.Parallel()
	s := newListSite(t, oneMachine("ssh"))
	me := caller{uid: 0}
	var leases []*lease
	for i := range maxNamed {
		l, err := s.d.lease("ssh://x"+strconv.Itoa(i), me)
		if err != nil {
			t.Fatal(err)
		}
		leases = append(leases, l)
	}
	if _, err := s.d.lease("ssh://more", me); !errors.Is(err, errBadList) {
		t.Errorf("one list too many = %v", err)
	}
	same, err := s.d.lease("ssh://x7", me)
	if err != nil || same.key != leases[7].key {
		t.Errorf("a list in use = %v, %v", same, err)
	}
	leases[3].release()
	if _, err := s.d.lease("ssh://more", me); err != nil {
		t.Errorf("lease with one unused = %v", err)
	}
	if s.d.machines.use(leases[3].key) {
		t.Error("the list that nobody used did not make room")
	}
	if got := len(s.status().GetMachines()); got != maxNamed+1 {
		t.Errorf("%d machines, want %d and the own one", got, maxNamed)
	}
}
