package integration

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// An outage is a way for nix-dispatchd to be out of reach.
type outage struct {
	name  string
	begin func(s *site)
	end   func(s *site)
}

var outages = []outage{
	{"hung", (*site).hangDaemon, (*site).unhangDaemon},
	{"killed", func(s *site) { s.stopDaemon(syscall.SIGKILL) }, (*site).startDaemon},
	{"no-socket", func(s *site) { s.stopDaemon(syscall.SIGTERM) }, (*site).startDaemon},
}

func (s *site) hangDaemon() {
	s.t.Helper()
	if err := s.client.Signal(s.daemon.cmd, syscall.SIGSTOP); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) unhangDaemon() {
	s.t.Helper()
	// The entrance to the host stops with what it lets in.
	err := errors.Join(s.client.Signal(s.daemon.cmd, syscall.SIGCONT), s.daemon.cmd.Process.Signal(syscall.SIGCONT))
	if err != nil {
		s.t.Fatal(err)
	}
}

const (
	outageBuilds = 8
	// outageCost is what an outage may cost a run of outageBuilds builds: one
	// second, and what a busy machine adds. A second for each build is too much.
	outageCost = 5 * time.Second
)

// locals is a list of trivial derivations that any Nix can build, and their
// recipes.
func locals(name string) (string, []recipe) {
	var recipes []recipe
	var list strings.Builder
	for n := range outageBuilds {
		r := recipe{name: fmt.Sprintf("%s-%d", name, n), script: "echo > $out"}
		recipes = append(recipes, r)
		fmt.Fprintf(&list, "(%s) ", r.expr())
	}
	return "[ " + list.String() + "]", recipes
}

// builtLocally builds derivations that any Nix can build and checks that the
// client did it, and within the time that it takes without a hook and cost, one of
// three times: the host may be busy. It returns what the user was told the last time.
func (s *site) builtLocally(name string, cost time.Duration) (said string) {
	s.t.Helper()
	for n := range 3 {
		var more time.Duration
		if said, more = s.timeLocally(fmt.Sprintf("%s-%d", name, n)); more <= cost {
			return said
		}
	}
	s.t.Errorf("%s: %d builds took more than %v longer than without a hook, three times", name, outageBuilds, cost)
	return said
}

// timeLocally does it once, and returns how much longer than without a hook it took.
func (s *site) timeLocally(name string) (said string, more time.Duration) {
	s.t.Helper()
	plain, _ := locals(name + "-plain")
	start := time.Now()
	s.mustBuild("alice", plain, "--builders", "")
	without := time.Since(start)
	list, recipes := locals(name)
	start = time.Now()
	run := s.launch("alice", list)
	if paths := run.succeed(time.Minute); len(paths) != outageBuilds {
		s.t.Errorf("%s: %d outputs, want %d", name, len(paths), outageBuilds)
	}
	with := time.Since(start)
	s.t.Logf("%s: %v, without a hook %v", name, with.Round(time.Millisecond), without.Round(time.Millisecond))
	for _, r := range recipes {
		if n := s.runs(r, s.client); n != 1 {
			s.t.Errorf("%s: built %d times here, want once", r.name, n)
		}
	}
	return run.out().Stderr, with - without
}

// TestOutage takes nix-dispatchd away: what the client can build it builds, with
// hardly a delay; what it cannot waits, and goes the stock way in the end.
func TestOutage(t *testing.T) {
	t.Parallel()
	for _, suite := range clients(t) {
		t.Run("client="+suite, func(t *testing.T) {
			t.Parallel()
			n := slices.Index(suites, suite)
			s := newSite(t, siteConfig{client: suite, jobs: 1, machines: protocolMachines(1, 2)})
			for i := range outages {
				o := outages[(n+i)%len(outages)] // every client has another one last
				o.begin(s)
				said := s.builtLocally(o.name, outageCost)
				if n := strings.Count(said, "is out of reach"); n != 1 {
					t.Errorf("%s: the user is told %d times that the daemon is out of reach, want once:\n%s", o.name, n, said)
				}
				if i == len(outages)-1 {
					s.stockInTheEnd(o)
				}
				s.backInTime(o)
				s.idle(time.Minute)
			}
		})
	}
}

// backInTime has a build that only a machine can do wait for the daemon. The
// outage has begun, and ends.
func (s *site) backInTime(o outage) {
	s.t.Helper()
	r := recipe{name: "patient-" + o.name, feature: "ssh", script: "uname -n > $out"}
	drvPath := s.drvOf(r.expr())
	run := s.launch("alice", r.expr())
	s.eventually(patience, "the user is told of the outage", func() bool {
		return strings.Contains(run.out().Stderr, "out of reach")
	})
	time.Sleep(time.Second)
	o.end(s)
	run.succeed(time.Minute)
	if said := run.out().Stderr; builtOn(said)["ssh://root@ssh-1"] != 1 || strings.Contains(said, "own build hook") ||
		!strings.Contains(s.daemon.log.String(), "msg=\"build accepted\" build_id=1 drv_path="+drvPath) &&
			!strings.Contains(s.daemon.log.String(), "drv_path="+drvPath+" ") {
		s.t.Errorf("%s: not built through the daemon that came back:\n%s", r.name, said)
	}
	s.gets(s.outputOf(drvPath), "ssh-1")
}

// stockInTheEnd has builds that only a machine can do wait until the stock hook
// gets them.
func (s *site) stockInTheEnd(o outage) {
	s.t.Helper()
	var list strings.Builder
	for _, protocol := range protocols {
		r := recipe{name: "impatient-" + protocol, feature: protocol, script: "uname -n > $out"}
		fmt.Fprintf(&list, "(%s) ", r.expr())
	}
	start := time.Now()
	run := s.launch("alice", "[ "+list.String()+"]")
	paths := run.succeed(2 * time.Minute)
	said := run.out().Stderr
	if took := time.Since(start); took < 30*time.Second {
		s.t.Errorf("%s: the stock hook had it after %v already:\n%s", o.name, took, said)
	}
	for _, text := range []string{"is out of reach", "using Nix's own build hook"} {
		if n := strings.Count(said, text); n != 1 {
			s.t.Errorf("%s: the user is told %d times %q, want once:\n%s", o.name, n, text, said)
		}
	}
	if len(paths) != len(protocols) {
		s.t.Fatalf("%s: outputs %q, want %d", o.name, paths, len(protocols))
	}
	for n, protocol := range protocols {
		s.gets(paths[n], protocol+"-1")
	}
}

// TestMachinesOutOfReach starts nix-dispatchd while none of its machines can be
// reached: it is there at once, says why, and keeps nobody waiting.
func TestMachinesOutOfReach(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{jobs: 1, machines: protocolMachines(1, 2)})
	s.stopDaemon(syscall.SIGTERM)
	if err := s.machines["ssh-1"].CutOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.machines["ssh-ng-1"].Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	// It answers while it still tries to reach them, for longer than any start takes.
	s.write("/root/.ssh/config", "Host *\n\tConnectTimeout 30\n")
	s.startUnready()
	for _, m := range s.status().Machines {
		if m.State != "connecting" {
			t.Errorf("machine %s is %s, want connecting", m.URI, m.State)
		}
	}
	s.builtLocally("while-connecting", outageCost)
	s.eventually(patience, "both machines are down, with the reason", func() bool {
		for _, m := range s.status().Machines {
			if m.State != "down" || !strings.Contains(m.Reason, "connect") && !strings.Contains(m.Reason, "dial") {
				return false
			}
		}
		return true
	})
	for _, m := range s.status().Machines {
		t.Logf("%s is %s: %s", m.URI, m.State, m.Reason)
	}
	s.builtLocally("while-down", outageCost)
	if err := s.machines["ssh-1"].Restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := recipe{name: "restored", feature: "ssh", script: "uname -n > $out"}
	s.launch("alice", r.expr()).succeed(patience)
	s.gets(s.outputOf(s.drvOf(r.expr())), "ssh-1")
}

// startUnready starts nix-dispatchd and waits until its socket can be connected to.
func (s *site) startUnready() {
	s.t.Helper()
	d := &daemonProcess{gone: make(chan struct{})}
	d.cmd = s.client.Command(context.WithoutCancel(s.t.Context()), "root",
		programs+"/nix-dispatchd", "--log-level", "debug")
	d.cmd.Stdout, d.cmd.Stderr = &d.log, &d.log
	if err := d.cmd.Start(); err != nil {
		s.t.Fatalf("start nix-dispatchd: %v", err)
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.gone)
	}()
	s.daemon = d
	s.t.Cleanup(func() { s.stopDaemon(syscall.SIGKILL) })
	s.eventually(time.Minute, "nix-dispatchd's socket is there", func() bool {
		conn, err := net.Dial("unix", s.client.Root()+"/run/nix-dispatch/socket")
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}
