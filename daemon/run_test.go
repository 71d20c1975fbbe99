package daemon

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// TestMain fails when a goroutine of a daemon outlives the tests, each of which
// has ended its own.
func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		if left := goroutinesOf("nixdispatch/daemon.(*Daemon)", "nixdispatch/daemon.(*dispatcher)", "nixdispatch/sshpool.",
			"nixdispatch/daemon.(*remote)", "nixdispatch/daemon.newStderrReader"); left != "" {
			fmt.Fprintf(os.Stderr, "goroutines outlived their daemons:\n%s\n", left)
			code = 1
		}
	}
	os.Exit(code)
}

// goroutinesOf returns the stacks that have one of these names in them, once they
// have had time to end.
func goroutinesOf(names ...string) string {
	buf := make([]byte, 4<<20)
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		var left []string
		for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			for _, name := range names {
				if strings.Contains(stack, name) && !strings.Contains(stack, "daemon.goroutinesOf") {
					left = append(left, stack)
					break
				}
			}
		}
		if len(left) == 0 || time.Now().After(deadline) {
			return strings.Join(left, "\n\n")
		}
	}
}

func TestShutdownEndsBuildsAndTellsTheirCallers(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		m.build = untilGone
		// It does not wait out what callers are given to hear the end.
		s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, prepare: func(s *site) { s.d.callersGrace = time.Hour }})
		building, staged := s.hook(), s.hook()
		r := s.drv("building", drvConfig{})
		building.accepted(r)
		s.eventually("it is being built", func() bool { return m.building() == 1 })
		staged.accepted(s.drv("waiting", drvConfig{}))
		unstarted := s.hook() // accepted, and never told what to build with
		wantReply(t, unstarted.try(s.drv("unstarted", drvConfig{}), false), accept, "")
		idle := s.hook() // between two questions
		silent, err := s.client.Hook(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		call, err := s.client.Build(t.Context(), asked(s.drv("called", drvConfig{inputs: []*recipe{r}})))
		if err != nil {
			t.Fatal(err)
		}
		s.eventually("the call's build waits for the other caller's", func() bool {
			builds := s.status().GetBuilds()
			return len(builds) == 3 && slices.ContainsFunc(builds, func(b *dispatchv1.BuildInfo) bool { return b.GetCallers() == 2 })
		})
		stopped := make(chan struct{})
		go func() { defer close(stopped); s.stop() }()
		for name, h := range map[string]*hookClient{"building": building, "staged": staged, "unstarted": unstarted} {
			st := h.finish()
			if st.err != nil && status.Code(st.err) == codes.Unavailable {
				continue // as well as:
			}
			if st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_CANCELLED); !strings.Contains(st.finished.GetError(), "shutting down") {
				t.Errorf("%s: error %q, want it to tell of the shutdown", name, st.finished.GetError())
			}
		}
		if _, err := idle.stream.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("idle hook: %v, want Unavailable", err)
		}
		if _, err := silent.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("hook that never said Hello: %v, want Unavailable", err)
		}
		if got := readBuild(call); status.Code(got.err) != codes.Unavailable && !(got.err == nil && !got.summary.GetSuccess()) {
			t.Errorf("Build = %v, %v; want Unavailable", got.err, got.summary)
		}
		if !closed(stopped) {
			t.Fatal("the daemon does not stop")
		}
		if _, running := m.processes(); running != 0 || m.building() != 0 {
			t.Errorf("%d remote processes and %d builds are left", running, m.building())
		}
		// The file stays, for it may be another daemon's by now.
		if conn, err := net.Dial("unix", s.d.opts.Socket); err == nil {
			conn.Close()
			t.Error("the socket still answers")
		}
	})
}

func TestShutdownDoesNotWaitForAClientThatDoesNotRead(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh-ng")
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, prepare: func(s *site) { s.d.callersGrace = 50 * time.Millisecond }})
	r := s.drv("chatty", drvConfig{})
	for range 750 {
		r.log = append(r.log, strings.Repeat("log ", 1024))
	}
	h := s.hook()
	h.keepLocks = true
	h.accepted(r)
	h.say(&dispatchv1.HookRequest{Message: &dispatchv1.HookRequest_HandedOver{HandedOver: &dispatchv1.HandedOver{}}})
	s.idle()
	s.stop()
}

func TestNoGoroutineOutlivesRun(t *testing.T) {
	// Not parallel: it looks at all goroutines there are.
	m, m2 := oneMachine("ssh"), namedMachine("ssh-ng", "m2")
	s := newSite(t, m, m2)
	for range 3 {
		s.mustBuild(s.drv("thing", drvConfig{srcs: []nix.StorePath{s.source("src")}}))
	}
	s.hook().accepted(s.drv("more", drvConfig{}))
	s.realise(asked(s.drv("local", drvConfig{system: "builtin"}))).mustSucceed(t)
	s.stop()
	s.conn.Close()
	if left := goroutinesOf("nixdispatch/daemon.(*", "nixdispatch/daemon.new", "nixdispatch/sshpool."); left != "" {
		t.Errorf("goroutines outlived the daemon:\n%s", left)
	}
}

func TestRunWithoutItsAddresses(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skipf("no loopback here: %v", err)
	}
	defer taken.Close()
	s := newSite(t)
	opts := s.d.opts
	opts.Socket += "2"
	opts.StateDir += "2"
	opts.MetricsListen = taken.Addr().String()
	d, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "metrics") {
		t.Errorf("Run = %v, want an error that tells of the metrics address", err)
	}
	if conn, err := net.Dial("unix", opts.Socket); err == nil {
		conn.Close()
		t.Error("the socket of the daemon that did not start answers")
	}
	opts.MetricsListen, opts.Socket = "", filepath.Join(opts.StateDir, "..", "nix", "socket")
	if d, err = New(opts); err != nil {
		t.Fatal(err)
	}
	if err := d.Run(t.Context()); err == nil {
		t.Error("Run with a socket below a file succeeded")
	}
	opts.StateDir = filepath.Join(s.d.opts.Socket, "below")
	if _, err := New(opts); err == nil || !strings.Contains(err.Error(), "state directory") {
		t.Errorf("New = %v, want an error that tells of the state directory", err)
	}
}
