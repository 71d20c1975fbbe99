package integration

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// TestSigtermEndsWaits asks the daemon to stop while nothing is being built, and much
// waits: for a machine that is frozen with a connection to it open, for ssh -G, for a
// ProxyCommand that says nothing, for hooks that say nothing more, and for a caller that
// is stopped and does not read what its build has printed.
func TestSigtermEndsWaits(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{
		machines: []machineConfig{{name: "mac"}, {name: "frozen", columns: "x86_64-linux - 4 1 frozen frozen"}},
		daemon:   []string{"--drain-timeout", "1h"},
		files: map[string]string{
			"/root/.ssh/config": "Match originalhost hung exec \"sleep 1000\"\nHost silent\n  ProxyCommand sleep 1000\n",
			"/etc/nix/more":     "ssh://hung x86_64-linux - 1 1 - hung\nssh://silent x86_64-linux - 1 1 - silent\n",
		},
	})
	s.eventually(time.Minute, "the machines are up", func() bool {
		return s.state("ssh://root@mac") == "up" && s.state("ssh://root@frozen") == "up"
	})
	s.write("/etc/nix/machines", s.run("cat", "/etc/nix/machines", "/etc/nix/more")+"\n")
	s.eventually(time.Minute, "ssh -G and the ProxyCommand run", func() bool {
		processes, err := s.client.Processes()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(strings.Join(processes, "\n"), "sleep 1000") >= 2
	})
	s.admit("alice")
	s.eventually(time.Minute, "the machines are up again", func() bool {
		return s.state("ssh://root@mac") == "up" && s.state("ssh://root@frozen") == "up"
	})
	// A caller that is stopped, whose build has printed much and ended.
	r := recipe{name: "chatty", script: ""}
	r.script = r.awaitGate() + heavyLog{lines: 50_000}.script() + "; echo > $out"
	caller := s.launchDispatch("build", "-L", s.drvOf(r.expr()))
	s.eventually(time.Minute, "its build runs", func() bool { return s.status().phases("building") == 1 })
	stopped := pids(s.client, func(command string) bool { return strings.Contains(command, "nix-dispatch build") })
	signalAll(stopped, syscall.SIGSTOP)
	s.openGate(r)
	s.eventually(time.Minute, "its build has ended", func() bool { return s.status().phases("building") == 0 && len(s.status().Builds) == 0 })
	held := s.holdStreams("alice", s.derivations("[" + shell("held", "echo > $out", features("nowhere")) + "]")[0], 2, 20)
	s.eventually(time.Minute, "the hooks have their reply", func() bool { return strings.Contains(held.out().Stdout, "held: 40") })
	// Something was asked of the machine when it was frozen, by the look at its disk.
	if err := s.machines["frozen"].Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.machines["frozen"].Thaw(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	begin := time.Now()
	s.stopDaemon(syscall.SIGTERM)
	t.Logf("nix-dispatchd took %v to stop", time.Since(begin).Round(time.Millisecond))
	s.eventually(time.Minute, "the hooks are let go", func() bool { return strings.Count(held.out().Stdout, "lost:") == 40 })
	if strings.Contains(s.daemon.log.String(), "panic") {
		t.Error("it panicked")
	}
	if n := len(pids(s.client, func(command string) bool { return strings.Contains(command, "sleep 1000") })); n != 0 {
		t.Errorf("%d children are left", n)
	}
	// Another may start at once.
	s.write("/etc/nix/machines", machineConfig{name: "mac"}.line())
	s.startDaemon()
	s.mustBuild("bob", shell("after", "echo after > $out", ""))
	signalAll(stopped, syscall.SIGCONT)
	_ = caller.cmd.Process.Signal(syscall.SIGCONT)
	caller.succeed(time.Minute)
}

// TestSuccessorWaits starts a daemon beside one that serves, which is refused, and
// beside one that lets a build end, which it waits for.
func TestSuccessorWaits(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{{name: "mac"}}, daemon: []string{"--drain-timeout", "10m"}})
	daemonArgs := []string{programs + "/nix-dispatchd"}
	out, err := s.client.Run(t.Context(), daemonArgs...)
	pid := s.run("pgrep", "-x", "nix-dispatchd")
	if err == nil || !strings.Contains(out.Stderr, "another nix-dispatchd (process "+pid+") uses it; stop that one first") {
		t.Fatalf("beside one that serves: %v, %q", err, out.Stderr)
	}
	r := recipe{name: "last", script: ""}
	r.script = r.awaitGate() + "echo > $out"
	build := s.launchDispatch("build", s.drvOf(r.expr()))
	s.eventually(time.Minute, "the build runs", func() bool { return s.status().phases("building") == 1 })
	first := s.daemon
	if err := s.client.Signal(first.cmd, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s.eventually(time.Minute, "it shuts down", func() bool { return strings.Contains(first.log.String(), "shutting down") })
	next := s.launchCommand("the next nix-dispatchd", s.client.Command(t.Context(), "root", daemonArgs...), func() fleet.Output { return fleet.Output{} })
	t.Cleanup(func() { _ = s.client.Signal(next.cmd, syscall.SIGTERM) })
	s.eventually(time.Minute, "both run", func() bool { return len(strings.Fields(s.run("pgrep", "-x", "nix-dispatchd"))) == 2 })
	s.openGate(r)
	build.succeed(time.Minute)
	select {
	case <-first.gone:
	case <-time.After(time.Minute):
		t.Fatal("the first daemon does not end")
	}
	s.eventually(time.Minute, "the next one serves", func() bool { _, err := s.dispatch("status"); return err == nil })
	if history, _, _ := s.as("root", "history"); !strings.Contains(history, "last") {
		t.Errorf("the next one does not know of the last build: %q", history)
	}
	s.mustBuild("alice", shell("after", "echo after > $out", ""))
}
