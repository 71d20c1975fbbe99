package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestGate(t *testing.T) {
	t.Parallel()
	const own, stranger = 4711, 4712
	me, err := user.Current()
	if err != nil {
		t.Skipf("this user has no name: %v", err)
	}
	group, err := user.LookupGroupId(me.Gid)
	if err != nil {
		t.Skipf("this user's group has no name: %v", err)
	}
	number := func(s string) uint32 {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(n)
	}
	tests := []struct {
		name   string
		group  string
		caller caller
		want   bool
	}{
		{"root", "no-such-group", caller{uid: 0}, true},
		{"the daemon's user", "no-such-group", caller{uid: own}, true},
		{"a stranger", group.Name, caller{uid: stranger, gid: stranger}, false},
		{"the group where there is none", "no-such-group", caller{uid: stranger, gid: number(me.Gid)}, false},
		{"whose group it is", group.Name, caller{uid: stranger, gid: number(me.Gid)}, true},
		{"who is a member", group.Name, caller{uid: stranger, gid: stranger, groups: []uint32{7, number(me.Gid)}}, true},
		{"a member of others", group.Name, caller{uid: stranger, gid: stranger, groups: []uint32{7, 8}}, false},
		// That the user is known, and a member by the files, gives the process nothing.
		{"a user's process without the group", group.Name, caller{uid: number(me.Uid), gid: stranger}, number(me.Uid) == 0},
		{"nobody's process without the group", group.Name, caller{uid: nobody(t), gid: stranger}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := gate{own: own, group: tt.group, groups: newGroupTable(slog.New(slog.DiscardHandler), tt.group)}
			if got := g.allows(tt.caller); got != tt.want {
				t.Errorf("allows(%+v) = %v, want %v", tt.caller, got, tt.want)
			}
			ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: peerInfo{caller: tt.caller}})
			want := codes.OK
			if !tt.want {
				want = codes.PermissionDenied
			}
			if err := g.check(ctx, dispatchv1.DispatchService_Status_FullMethodName); status.Code(err) != want {
				t.Errorf("check = %v, want %v", err, want)
			}
			if err := g.check(ctx, healthpb.Health_Check_FullMethodName); err != nil {
				t.Errorf("check of the health service = %v, want nil", err)
			}
		})
	}
	// Who is not known may nothing.
	if err := (gate{}).check(t.Context(), dispatchv1.DispatchService_Status_FullMethodName); status.Code(err) != codes.PermissionDenied {
		t.Errorf("check without credentials = %v, want PermissionDenied", err)
	}
}

// nobody is a user with an entry in /etc/passwd, and without rights.
func nobody(t *testing.T) uint32 {
	t.Helper()
	u, err := user.Lookup("nobody")
	if err != nil {
		t.Skipf("there is no user nobody: %v", err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(uid)
}

func TestPeerCredentialsAreTheKernels(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Skipf("no unix socket here: %v", err)
	}
	defer l.Close()
	go func() {
		if c, err := net.Dial("unix", l.Addr().String()); err == nil {
			defer c.Close()
		}
	}()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, info, err := peerCredentials{}.ServerHandshake(conn)
	if err != nil {
		t.Fatal(err)
	}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	want := caller{uid: uint32(os.Getuid()), gid: uint32(os.Getgid()), pid: int32(os.Getpid())}
	for _, gid := range groups {
		want.groups = append(want.groups, uint32(gid))
	}
	slices.Sort(want.groups)
	got := info.(peerInfo).caller
	if slices.Sort(got.groups); !cmp.Equal(got, want, cmp.AllowUnexported(caller{}), cmpopts.EquateEmpty()) {
		t.Errorf("caller = %+v, want %+v", got, want)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := (peerCredentials{}).ServerHandshake(a); err == nil {
		t.Error("a connection that is no socket has credentials")
	}
}

func TestStrangersAreTurnedAway(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	// The gate of a daemon that belongs to nobody here.
	server, _ := newGRPCServer(s.d, gate{own: 1 << 30, group: "no-such-group", groups: s.d.groups})
	if os.Geteuid() == 0 {
		t.Log("root is never turned away: only the gate's table is tested")
		server.Stop()
		return
	}
	defer server.Stop()
	socket := s.d.opts.Socket + "2"
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(l) }()
	client := dialTest(t, socket)
	if _, err := client.Status(t.Context(), &dispatchv1.StatusRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("Status = %v, want PermissionDenied", err)
	}
	stream, err := client.Hook(t.Context())
	if err == nil {
		_, err = stream.Recv()
	}
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("Hook = %v, want PermissionDenied", err)
	}
}

func TestListenUnix(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "dispatch")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "run", "socket")
	listen := func() (net.Listener, error) { return listenUnix(t.Context(), path, socketAccess{group: true}) }
	first, err := listen()
	if err != nil {
		t.Fatalf("in a directory that is not there yet: %v", err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Type() != fs.ModeSocket || info.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v, %v; want mode 0660", info, err)
	}
	if second, err := listen(); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("second daemon: %v, %v; want it refused", second, err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the refused daemon removed the socket: %v", err)
	}
	first.Close() // as a daemon that was killed: the file is still there
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	third, err := listen()
	if err != nil {
		t.Fatalf("after a dead daemon: %v", err)
	}
	defer third.Close()
	if conn, err := net.Dial("unix", path); err != nil {
		t.Errorf("the replaced socket does not answer: %v", err)
	} else {
		conn.Close()
	}
	if _, err := os.Stat(path + ".new"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket's first name is left: %v", err)
	}
}

func TestListenUnixOnWhatIsNoSocket(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := listenUnix(t.Context(), path, socketAccess{group: true})
	if err == nil {
		l.Close()
	}
	if data, _ := os.ReadFile(path); err == nil || string(data) != "precious" {
		t.Errorf("listen = %v and the file holds %q; want an error and the file as it was", err, data)
	}
}

func TestSecondDaemonLeavesTheFirstAlone(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	second, err := New(s.d.opts)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("another nix-dispatchd (process %d) uses it", os.Getpid())) {
		t.Errorf("Run of a second daemon = %v, want an error that names the process", err)
	}
	opts := s.d.opts
	opts.StateDir += "2"
	if second, err = New(opts); err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); err == nil || !strings.Contains(err.Error(), s.d.opts.Socket) {
		t.Errorf("Run of a second daemon with a directory of its own = %v, want an error that names the socket", err)
	}
	if got := s.status().GetVersion(); got == "" {
		t.Error("the first daemon does not answer any more")
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	r, err := healthpb.NewHealthClient(s.conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("Check = %v, %v; want SERVING", r, err)
	}
	watch, err := healthpb.NewHealthClient(s.conn).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := watch.Recv(); err != nil || r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("first word = %v, %v", r, err)
	}
	heard := make(chan healthpb.HealthCheckResponse_ServingStatus, 1)
	go func() {
		r, _ := watch.Recv()
		heard <- r.GetStatus()
		_ = s.conn.Close()
	}()
	s.stop()
	if got := <-heard; got != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("at shutdown the health service says %v", got)
	}
}

func TestStatusAndMachines(t *testing.T) {
	t.Parallel()
	m, m2 := oneMachine("ssh"), namedMachine("ssh-ng", "m2")
	m.slots, m.features, m.mandatory = 2, "kvm", "big"
	open := make(chan struct{})
	m2.build = m2.gated(open)
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{m, m2},
		builders: "unix:///elsewhere riscv64-linux - 5\nssh://bad x86_64-linux - many",
	})
	if got := s.status().GetErrors(); len(got) != 1 || got[0].GetLine() != 4 || !strings.Contains(got[0].GetMessage(), "many") {
		t.Errorf("errors = %v, want the bad entry", got)
	}
	list, err := s.client.Machines(t.Context(), &dispatchv1.MachinesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var found *dispatchv1.Machine
	for _, machine := range list.GetMachines() {
		if machine.GetStoreUri() == m.uri() {
			found = machine
		}
	}
	if found.GetMaxJobs() != 2 || found.GetSpeedFactor() != 1 || strings.Join(found.GetSupportedFeatures(), ",") != "kvm" ||
		strings.Join(found.GetMandatoryFeatures(), ",") != "big" || found.GetSshPublicHostKey() == "" || found.GetSshKey() == "" {
		t.Errorf("machine = %v, want what its line says", found)
	}
	for _, machine := range s.status().GetMachines() {
		switch machine.GetUri() {
		case "unix:///elsewhere":
			if machine.GetState() != dispatchv1.MachineState_MACHINE_STATE_UNSUPPORTED || machine.GetSlots() != 5 || machine.GetReason() == "" {
				t.Errorf("machine of another kind = %v", machine)
			}
		case m.uri():
			if machine.GetSlots() != 2 || machine.GetConnections() != 1 || machine.GetReason() != "" || machine.GetSince().AsTime().IsZero() {
				t.Errorf("machine = %v", machine)
			}
		}
	}
	close(open)
}

func TestStatusOfBuilds(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	open := make(chan struct{})
	m.build = m.gated(open)
	s := newSite(t, m)
	for _, name := range []string{"building", "staged", "queued"} {
		s.hook().accepted(s.drv(name, drvConfig{}))
		s.eventually("the first has the slot", func() bool { return m.building() == 1 })
	}
	want := map[string]dispatchv1.Phase{
		"building": dispatchv1.Phase_PHASE_BUILDING, "staged": dispatchv1.Phase_PHASE_STAGED, "queued": dispatchv1.Phase_PHASE_QUEUED,
	}
	s.eventually("each build is where it can be", func() bool {
		right := 0
		for _, b := range s.status().GetBuilds() {
			for name, phase := range want {
				if strings.HasSuffix(b.GetDrvPath(), "-"+name+".drv") && b.GetPhase() == phase {
					right++
				}
			}
		}
		return right == 3
	})
	for _, b := range s.status().GetBuilds() {
		waits := b.GetPhase() == dispatchv1.Phase_PHASE_QUEUED
		if (b.GetMachine() == "") != waits || (b.GetReason() == "") == waits || b.GetSystem() != nixSystem() ||
			b.GetCallers() != 1 || b.GetSince().AsTime().IsZero() || b.GetId() == 0 {
			t.Errorf("build = %v", b)
		}
	}
	if got := s.machineStatus(m); got.GetRunning() != 1 || got.GetStaging() != 1 {
		t.Errorf("machine = %v, want one running and one staging", got)
	}
	if got := s.metric("nix_dispatch_builds_queued", map[string]string{"system": nixSystem()}); got != 1 {
		t.Errorf("builds_queued = %v, want 1", got)
	}
	close(open)
}

func TestErrorsBecomeCodes(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]codes.Code{
		errBadRequest:                 codes.InvalidArgument,
		errNoSuchBuild:                codes.NotFound,
		errNotInStore:                 codes.NotFound,
		errNotYours:                   codes.PermissionDenied,
		errShutdown:                   codes.Unavailable,
		context.Canceled:              codes.Canceled,
		&localError{"x", errShutdown}: codes.Unavailable,
		&localError{"x", fs.ErrExist}: codes.FailedPrecondition,
		errors.New("anything else"):   codes.Internal,
	} {
		if got := status.Code(toStatus(err)); got != want {
			t.Errorf("toStatus(%v) = %v, want %v", err, got, want)
		}
	}
}

func TestSnapshotOfALongQueue(t *testing.T) {
	t.Parallel()
	d, _ := bareDaemon() // a slot and a staging place
	for n := range 6 {
		bareBuild(d, n)
	}
	for limit, want := range map[int][]uint64{0: {1, 2, 3, 4, 5, 6}, 1: {1, 2, 3}, 9: {1, 2, 3, 4, 5, 6}} {
		var got []uint64
		_, builds := d.dispatcher.snapshot(limit)
		for _, b := range builds {
			got = append(got, b.GetId())
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("with at most %d queued builds (-want +got):\n%s", limit, diff)
		}
	}
	d.end(nil)
}
