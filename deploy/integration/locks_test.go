package integration

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// lockSite has one machine, which is some way off: between the handover of the
// locks and the first byte of an output there is time to interfere.
func lockSite(t *testing.T, suite, scheme string) *site {
	t.Helper()
	s := newSite(t, siteConfig{client: suite, jobs: 1, machines: []machineConfig{{name: "near", scheme: scheme}}})
	_, err := s.fleet.Far(t.Context(), "far", s.machines["near"], fleet.ProxyConfig{
		Delay: 300 * time.Millisecond, BytesPerSecond: 4 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.write("/etc/nix/machines", scheme+"://root@far x86_64-linux - 2\n")
	s.stopDaemon(syscall.SIGTERM)
	s.startDaemon()
	return s
}

// gated is a recipe that waits for its gate and writes where it was built.
func gated(name string) recipe {
	r := recipe{name: name}
	r.script = r.awaitGate() + "uname -n > $out"
	return r
}

// awaitRun waits until a recipe runs on the machine.
func (s *site) awaitRun(r recipe) {
	s.t.Helper()
	s.eventually(time.Minute, r.name+" runs on the machine", func() bool { return s.runs(r, s.allMachines()...) == 1 })
}

// open opens a gate on one host only.
func (s *site) open(r recipe, h *fleet.Host) {
	s.t.Helper()
	if err := h.WriteFile(r.gate(), nil, 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// lockFile is the lock of an output as this machine sees it.
func (s *site) lockFile(output string) string { return s.client.Root() + output + ".lock" }

func inode(file string) uint64 {
	var st syscall.Stat_t
	if syscall.Stat(file, &st) != nil {
		return 0
	}
	return st.Ino
}

func nixDaemons(h *fleet.Host) []int {
	return pids(h, func(cmdline string) bool { return strings.Contains(cmdline, "nix-daemon") })
}

// holdImport lets a build that runs on the machine end, and stops the nix-daemon
// that is about to import its output in the moment between the handover of the
// output's lock and taking it anew. It returns with the output locked by nobody.
func (s *site) holdImport(r recipe, output string) (release func()) {
	s.t.Helper()
	lock := s.lockFile(output)
	held, others := inode(lock), nixDaemons(s.client)
	if held == 0 {
		s.t.Fatalf("%s: nobody holds the output's lock while it is built", r.name)
	}
	s.open(r, s.machines["near"])
	var importers []int
	for end := time.Now().Add(30 * time.Second); inode(lock) == held; {
		if time.Now().After(end) {
			s.t.Fatalf("%s: the lock was not handed over", r.name)
		}
		importers = slices.DeleteFunc(nixDaemons(s.client), func(pid int) bool { return slices.Contains(others, pid) })
	}
	for _, pid := range importers {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			s.t.Errorf("stop nix-daemon %d: %v", pid, err)
		}
	}
	release = func() {
		for _, pid := range importers {
			_ = syscall.Kill(pid, syscall.SIGCONT) // it may have ended
		}
	}
	if len(importers) == 0 || inode(lock) != 0 {
		release()
		s.t.Fatalf("%s: stopped nix-daemon too late: processes %v, lock there: %t", r.name, importers, inode(lock) != 0)
	}
	return release
}

// hookProcess is the command line of a hook, whose last argument is Nix's verbosity.
var hookProcess = regexp.MustCompile(`^\S*nix-dispatch[ -]hook \d$`)

// hooks are the hook processes on the client.
func (s *site) hooks() []int { return pids(s.client, hookProcess.MatchString) }

func (s *site) signalHooks(sig syscall.Signal) {
	s.t.Helper()
	all := s.hooks()
	if len(all) == 0 {
		s.t.Errorf("no hook runs")
	}
	for _, pid := range all {
		if err := syscall.Kill(pid, sig); err != nil {
			s.t.Errorf("signal hook %d: %v", pid, err)
		}
	}
}

// gets checks that a build's result is there and was built where it should.
func (s *site) gets(output, builtOn string) {
	s.t.Helper()
	text, err := storeFile(s.client, output)
	if err != nil || strings.TrimSpace(text) != builtOn {
		s.t.Errorf("%s holds %q, %v; want it built on %s", output, text, err, builtOn)
	}
	s.verify(output)
}

// TestLocks interferes between the handover of an output's lock and the import
// of the output.
func TestLocks(t *testing.T) {
	t.Parallel()
	for _, suite := range clients(t) {
		t.Run("client="+suite, func(t *testing.T) {
			t.Parallel()
			n := slices.Index(suites, suite)
			s := lockSite(t, suite, protocols[n%2])
			s.killedAtHandOver("client-of-daemon", "alice", func(run *launched) { run.signal(syscall.SIGKILL) })
			s.killedAtHandOver("direct-client", "root", func(run *launched) { run.signal(syscall.SIGKILL) })
			s.killedAtHandOver("hook", "alice", func(*launched) { s.signalHooks(syscall.SIGKILL) })
			s.killedInImport()
			// Once, longer than an import waits before it begins anew.
			s.localBuildSlipsIn([]time.Duration{2 * time.Second, 2 * time.Second, 24 * time.Second}[n])
			s.hookSlipsIn()
			s.idle(time.Minute)
			s.verifyStore()
		})
	}
}

// killedAtHandOver ends a caller when nobody holds the lock any more: what is
// left does nobody harm.
func (s *site) killedAtHandOver(name, user string, kill func(*launched)) {
	s.t.Helper()
	r := gated("killed-" + name)
	output := s.outputOf(s.drvOf(r.expr()))
	run := s.launch(user, r.expr())
	s.awaitRun(r)
	release := s.holdImport(r, output)
	kill(run)
	if code := run.wait(patience); code == 0 {
		s.t.Errorf("%s: exit 0, though it was killed", r.name)
	}
	s.idle(time.Minute)
	release()
	again := s.launch(user, r.expr())
	again.succeed(patience)
	s.gets(output, "near")
}

// killedInImport ends a caller while the output is halfway here.
func (s *site) killedInImport() {
	s.t.Helper()
	const size = 12 << 20 // three seconds
	r := recipe{name: "killed-in-import", script: fmt.Sprintf("head -c %d /dev/urandom > $out", size)}
	output := s.outputOf(s.drvOf(r.expr()))
	run := s.launch("alice", r.expr())
	s.eventually(patience, "a part of the output has arrived", func() bool {
		st, err := os.Stat(s.client.Root() + output)
		return err == nil && st.Size() > 1<<20
	})
	run.signal(syscall.SIGKILL)
	s.idle(time.Minute)
	if out, err := s.client.Run(s.t.Context(), "nix-store", "--check-validity", output); err == nil {
		s.t.Errorf("%s: half an output is valid %s", r.name, out.Stderr)
	}
	s.verifyStore()
	s.verify(s.launch("alice", r.expr()).succeed(time.Minute)...)
	if st, err := os.Stat(s.client.Root() + output); err != nil || st.Size() != size {
		s.t.Errorf("%s: the output after the second build: %v, %v", r.name, st, err)
	}
}

// localBuildSlipsIn has another user's Nix take the free lock and build locally.
// It was first: both get what it built.
func (s *site) localBuildSlipsIn(takes time.Duration) {
	s.t.Helper()
	r := gated("slips-in")
	output := s.outputOf(s.drvOf(r.expr()))
	remote := s.launch("alice", r.expr())
	s.awaitRun(r)
	release := s.holdImport(r, output)
	local := s.launch("bob", r.expr(), "--builders", "")
	s.eventually(patience, "the other Nix builds locally", func() bool { return s.runs(r, s.client) == 1 })
	release()
	time.Sleep(takes) // the import finds the lock taken
	s.open(r, s.client)
	local.succeed(patience)
	remote.succeed(60 * time.Second)
	s.gets(output, "client")
}

// hookSlipsIn has another user's Nix take the free lock and ask its own hook.
// That one joins the build and hands the lock over, too.
func (s *site) hookSlipsIn() {
	s.t.Helper()
	r := gated("joins")
	output := s.outputOf(s.drvOf(r.expr()))
	first := s.launch("alice", r.expr())
	s.awaitRun(r)
	release := s.holdImport(r, output)
	second := s.launch("bob", r.expr())
	s.eventually(patience, "the other Nix's hook joins", func() bool {
		b := s.status().Builds
		return len(b) == 1 && len(s.hooks()) == 2 && inode(s.lockFile(output)) == 0
	})
	release()
	first.succeed(patience)
	second.succeed(patience)
	if n := s.runs(r, append(s.allMachines(), s.client)...); n != 1 {
		s.t.Errorf("%s: built %d times, want once", r.name, n)
	}
	s.gets(output, "near")
}

// TestSameDerivation has several callers ask for one derivation at once.
func TestSameDerivation(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: protocolMachines(1, 2)})
		for _, protocol := range protocols {
			r := recipe{name: "wanted-" + protocol, feature: protocol}
			r.script = r.awaitGate() + "uname -n > $out"
			drvPath := s.drvOf(r.expr())
			var callers []*launched
			for _, user := range []string{"alice", "bob", "root"} {
				callers = append(callers, s.launch(user, r.expr(), "--option", "build-poll-interval", "1"))
			}
			callers = append(callers, s.launchDispatch("build", drvPath), s.launchDispatch("build", drvPath))
			s.awaitRun(r)
			time.Sleep(time.Second) // the others find it locked
			s.openGate(r)
			for _, c := range callers {
				if paths := c.succeed(time.Minute); !slices.Equal(paths, []string{s.outputOf(drvPath)}) {
					t.Errorf("%s: %s got %q", protocol, c.what, paths)
				}
			}
			if n := s.runs(r, s.allMachines()...); n != 1 {
				t.Errorf("%s: built %d times, want once", protocol, n)
			}
			s.gets(s.outputOf(drvPath), protocol+"-1")
		}
		s.idle(time.Minute)
		s.verifyStore()
	})
}

// TestStoppedHook has a hook that shares a build stop while its Nix holds the
// output's lock. The others wait as for any Nix that holds it, and no longer.
func TestStoppedHook(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: protocolMachines(1, 2)})
	for _, sig := range []syscall.Signal{syscall.SIGCONT, syscall.SIGKILL} {
		for _, protocol := range protocols {
			r := recipe{name: fmt.Sprintf("stopped-%s-%d", protocol, sig), feature: protocol}
			r.script = "echo started; " + r.awaitGate() + "uname -n > $out"
			drvPath := s.drvOf(r.expr())
			dispatch := s.launchDispatch("build", drvPath)
			s.awaitRun(r)
			hook := s.launch("alice", r.expr())
			s.eventually(patience, "the hook shares the build", func() bool {
				return strings.Contains(hook.out().Stderr, "started\n")
			})
			s.signalHooks(syscall.SIGSTOP)
			s.openGate(r)
			s.eventually(patience, "the build is fetched, its slot free", func() bool {
				st := s.status()
				for _, m := range st.Machines {
					if m.Running != 0 {
						return false
					}
				}
				return len(st.Builds) == 1 && st.Builds[0].Phase == "fetching"
			})
			s.signalHooks(sig)
			dispatch.succeed(patience)
			if code := hook.wait(patience); (code == 0) != (sig == syscall.SIGCONT) {
				t.Errorf("%s: the Nix whose hook was stopped and then got %v: exit %d", r.name, sig, code)
			}
			s.gets(s.outputOf(drvPath), protocol+"-1")
			s.idle(time.Minute)
		}
	}
	s.verifyStore()
}
