package integration

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// A heavyLog is what a builder prints: each line numbered, so that none can be missing
// unnoticed.
type heavyLog struct{ lines int }

const heavyLine = "line %010.0f of a log that is long and that somebody may be slow to read, or may not read at all"

func (l heavyLog) script() string { return fmt.Sprintf("seq -f '%s' 1 %d", heavyLine, l.lines) }

func (l heavyLog) String() string {
	var b strings.Builder
	for n := range l.lines {
		fmt.Fprintf(&b, heavyLine+"\n", float64(n+1))
	}
	return b.String()
}

// A slowWriter takes its time for every write, as somebody does who reads slowly.
type slowWriter struct {
	syncBuffer
	pause time.Duration // for each 32 KiB, which is what one write has
}

func (w *slowWriter) Write(p []byte) (int, error) {
	time.Sleep(w.pause)
	return w.syncBuffer.Write(p)
}

// A logReader is somebody who does not read while the test says so.
type logReader struct {
	name    string
	feature string
	user    string // of nix-build; "" for nix-dispatch build as root
	stopped bool   // with SIGSTOP, else it reads slowly
	r       recipe
	drvPath string
	run     *launched
}

// TestCallersThatDoNotRead has callers stopped, or read slowly, while their builds print
// tens of MB and end. Others build meanwhile, the daemon keeps none of it in memory, and
// nothing is missing when the callers go on.
func TestCallersThatDoNotRead(t *testing.T) {
	t.Parallel()
	log, stopped := heavyLog{lines: shortOr(150_000, 500_000)}, shortOr(5*time.Second, time.Minute)
	s := newSite(t, siteConfig{machines: protocolMachines(1, 3)})
	readers := []*logReader{
		{name: "stopped-root", feature: "ssh", user: "root", stopped: true},
		{name: "stopped-alice", feature: "ssh-ng", user: "alice", stopped: true},
		{name: "stopped-dispatch", feature: "ssh-ng", stopped: true},
		{name: "slow", feature: "ssh", user: "alice"},
	}
	before := s.peakMemory()
	for _, l := range readers {
		l.begin(s, log)
	}
	s.eventually(time.Minute, "all builds run", func() bool { return s.status().phases("building") == len(readers) })
	callers := s.stopCallers(readers)
	for _, l := range readers {
		s.openGate(l.r)
	}
	since := time.Now()
	s.eventually(3*time.Minute, "the builders have ended", func() bool { return s.status().phases("building") == 0 })
	for n := 0; n == 0 || time.Since(since) < stopped; n++ {
		s.mustBuild("bob", recipe{name: fmt.Sprintf("other-%d", n), feature: protocols[n%2], script: "echo > $out"}.expr())
		time.Sleep(time.Second)
	}
	t.Logf("stopped for %v", time.Since(since).Round(time.Second))
	for _, l := range readers {
		select {
		case <-l.run.done:
			if l.stopped {
				t.Errorf("%s ended while it was stopped: %s", l.name, clip(l.run.out().Stderr))
			}
		default:
		}
	}
	signalAll(callers, syscall.SIGCONT)
	for _, l := range readers {
		if l.stopped { // nsenter stops itself with its child
			_ = l.run.cmd.Process.Signal(syscall.SIGCONT)
		}
	}
	want := log.String()
	for _, l := range readers {
		l.run.succeed(3 * time.Minute)
		l.check(want)
	}
	s.idle(time.Minute)
	s.eventually(patience, "no log is left in the state directory", func() bool { return !s.spools() })
	// Kept in memory, the logs would take all of their size; buffers for each reader, and
	// what the collector has not got to, are no more than a few tens of MiB.
	grown, logs := (s.peakMemory()-before)<<10, len(want)*len(readers)
	if t.Logf("the daemon's memory grew by %d MiB, with logs of %d MiB", grown>>20, logs>>20); grown > logs*3/4 {
		t.Error("it keeps logs in memory")
	}
}

// begin starts a caller whose build waits before it prints.
func (l *logReader) begin(s *site, log heavyLog) {
	s.t.Helper()
	l.r = recipe{name: l.name, feature: l.feature, script: ""}
	l.r.script = l.r.awaitGate() + log.script() + "; echo > $out"
	l.drvPath = s.drvOf(l.r.expr())
	if l.user == "" {
		l.run = s.launchDispatch("build", "-L", l.drvPath)
		return
	}
	if l.stopped {
		l.run = s.launch(l.user, l.r.expr())
		return
	}
	var stdout syncBuffer
	stderr := slowWriter{pause: 20 * time.Millisecond}
	cmd := s.client.Command(context.WithoutCancel(s.t.Context()), l.user, "nix-build", "--no-out-link", "--expr", l.r.expr())
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	l.run = s.launchCommand("slow nix-build as "+l.user, cmd, func() fleet.Output {
		return fleet.Output{Stdout: stdout.String(), Stderr: stderr.String()}
	})
}

// check compares what was shown, and what Nix keeps, with what the builder printed.
func (l *logReader) check(want string) {
	t := l.run.s.t
	t.Helper()
	printed := l.run.out()
	shown := ownMessage.ReplaceAllString(printed.Stderr, "")
	if l.user == "" { // its lines begin with the derivation's name
		shown = strings.ReplaceAll(shown, l.name+"> ", "")
	}
	if !strings.Contains(shown, want) {
		_, from, _ := strings.Cut(shown, want[:40])
		t.Errorf("%s: the log was not shown in whole, %d bytes of %d: %s", l.name, len(shown), len(want), firstDifference(want[:40]+from, want))
	}
	if l.user != "" {
		if kept := l.run.s.readLog(l.drvPath); kept != want {
			t.Errorf("%s: the log that Nix keeps has %d bytes of %d: %s", l.name, len(kept), len(want), firstDifference(kept, want))
		}
	}
}

// stopCallers stops those that are to be, and the hook of the one whose Nix runs it
// itself; it returns their process ids.
func (s *site) stopCallers(readers []*logReader) []int {
	s.t.Helper()
	var callers []int
	for _, l := range readers {
		if !l.stopped {
			continue
		}
		name, what := l.name, "nix-dispatch build "
		if l.user != "" {
			what = "nix-build "
		}
		callers = append(callers, pids(s.client, func(cmdline string) bool {
			return strings.Contains(cmdline, what) && (strings.Contains(cmdline, name) || strings.Contains(cmdline, l.drvPath))
		})...)
	}
	hooks := 0
	for _, pid := range s.hooks() {
		if parent, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil && hasParent(string(parent), callers) {
			callers = append(callers, pid)
			hooks++
		}
	}
	if hooks == 0 {
		s.t.Error("no hook of a caller was found to be stopped")
	}
	s.t.Cleanup(func() { signalAll(callers, syscall.SIGCONT) })
	signalAll(callers, syscall.SIGSTOP)
	return callers
}

// hasParent tells whether a process's status names one of pids as its parent.
func hasParent(status string, pids []int) bool {
	for _, pid := range pids {
		if strings.Contains(status, fmt.Sprintf("\nPPid:\t%d\n", pid)) {
			return true
		}
	}
	return false
}

// signalAll signals processes; one may have ended.
func signalAll(pids []int, sig syscall.Signal) {
	for _, pid := range pids {
		_ = syscall.Kill(pid, sig)
	}
}

// phases counts the builds in a phase.
func (r statusReport) phases(phase string) int {
	n := 0
	for _, b := range r.Builds {
		if b.Phase == phase {
			n++
		}
	}
	return n
}

// spools tells whether the daemon has files of logs open.
func (s *site) spools() bool {
	s.t.Helper()
	pid := s.run("pgrep", "-x", "nix-dispatchd")
	out, err := s.client.Run(s.t.Context(), "sh", "-c", "ls -l /proc/"+pid+"/fd")
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.Contains(out.Stdout, "(deleted)")
}
