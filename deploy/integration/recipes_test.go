package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// protocols are the ways to a machine.
var protocols = []string{"ssh", "ssh-ng"}

// eachClient runs a test for clients of every Nix version, or in "make test" of one.
func eachClient(t *testing.T, test func(t *testing.T, suite string)) {
	t.Parallel()
	for _, suite := range clients(t) {
		t.Run("client="+suite, func(t *testing.T) {
			t.Parallel()
			test(t, suite)
		})
	}
}

// protocolMachines are n machines for each protocol, called ssh-1 and so on. A
// derivation chooses the protocol by requiring the feature of that name, which
// the client itself has not. The machines' Nix versions take turns.
func protocolMachines(n, slots int) []machineConfig {
	var machines []machineConfig
	for _, scheme := range protocols {
		for i := 1; i <= n; i++ {
			machines = append(machines, machineConfig{
				name: fmt.Sprintf("%s-%d", scheme, i), scheme: scheme,
				suite:   suites[(len(machines)+1)%len(suites)],
				columns: fmt.Sprintf("x86_64-linux - %d 1 %s", slots, scheme),
				host:    fleet.HostConfig{SystemFeatures: []string{scheme}},
			})
		}
	}
	return machines
}

// A recipe is a derivation that runs a shell script.
type recipe struct {
	name    string
	feature string // required; "" for none
	script  string
	attrs   string // more attributes, in Nix's language
}

// expr is the derivation in Nix's language. What runs it leaves a file behind,
// which runs counts.
func (r recipe) expr() string {
	feature := ""
	if r.feature != "" {
		feature = fmt.Sprintf("requiredSystemFeatures = [ %q ];", r.feature)
	}
	return fmt.Sprintf(`derivation {
		name = %q; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/usr/bin:/bin"; %s %s
		args = [ "-c" %s ];
	}`, r.name, feature, r.attrs, strconv.Quote(fmt.Sprintf(": > /var/tmp/ran-%s-$$\n%s\n", r.name, r.script)))
}

// gate is where a recipe's script can wait for the test; see awaitGate.
func (r recipe) gate() string { return "/var/tmp/gate-" + r.name }

// awaitGate is the part of a script that waits until the test opens the gate.
func (r recipe) awaitGate() string {
	return fmt.Sprintf("until test -e %s; do sleep 0.05; done\n", r.gate())
}

// openGate lets a waiting script go on, wherever it runs.
func (s *site) openGate(r recipe) {
	s.t.Helper()
	for _, h := range append(s.allMachines(), s.client) {
		if !h.On() {
			continue
		}
		if err := h.WriteFile(r.gate(), nil, 0o644); err != nil {
			s.t.Fatal(err)
		}
	}
}

// allMachines are the site's machines.
func (s *site) allMachines() []*fleet.Host {
	var hosts []*fleet.Host
	for _, h := range s.machines {
		hosts = append(hosts, h)
	}
	return hosts
}

// runs counts how often a recipe was run, on the hosts given.
func (s *site) runs(r recipe, hosts ...*fleet.Host) int {
	s.t.Helper()
	n := 0
	for _, h := range hosts {
		names, err := h.ReadDir("/var/tmp")
		if err != nil {
			s.t.Fatal(err)
		}
		for _, name := range names {
			if strings.HasPrefix(name, "ran-"+r.name+"-") {
				n++
			}
		}
	}
	return n
}

// drvOf puts a derivation into the client's store and returns its path.
func (s *site) drvOf(expr string) string {
	s.t.Helper()
	out, err := s.client.Run(s.t.Context(), "nix-instantiate", "--expr", expr)
	if err != nil {
		s.t.Fatalf("nix-instantiate: %v", err)
	}
	return strings.TrimSpace(out.Stdout)
}

// outputOf is the path of a derivation's output.
func (s *site) outputOf(drvPath string) string {
	s.t.Helper()
	out, err := s.client.Run(s.t.Context(), "nix-store", "--query", "--outputs", drvPath)
	if err != nil {
		s.t.Fatalf("nix-store --query: %v", err)
	}
	return strings.TrimSpace(out.Stdout)
}

// readLog is what "nix log" shows of a derivation.
func (s *site) readLog(drvPath string) string {
	s.t.Helper()
	out, err := s.client.Run(s.t.Context(), "nix-store", "--read-log", drvPath)
	if err != nil {
		s.t.Errorf("nix-store --read-log: %v", err)
	}
	return out.Stdout
}

// verifyStore checks everything in the client's store against its hashes.
func (s *site) verifyStore() {
	s.t.Helper()
	out, err := s.client.Run(s.t.Context(), "nix-store", "--verify", "--check-contents")
	if err != nil || strings.Contains(out.Stderr, "modified") || strings.Contains(out.Stderr, "disappeared") {
		s.t.Errorf("nix-store --verify --check-contents: %v\n%s", err, out.Stderr)
	}
}

// A launched is a nix-build or nix-dispatch build in progress.
type launched struct {
	s    *site
	what string
	cmd  *exec.Cmd
	out  func() fleet.Output // what it printed so far
	done chan struct{}
	err  error // valid after done is closed
}

// launch starts a nix-build of an expression.
func (s *site) launch(user, expr string, args ...string) *launched {
	s.t.Helper()
	cmd, out := s.nixBuildCommand(s.t.Context(), user, expr, args...)
	return s.launchCommand("nix-build as "+user, cmd, out)
}

// launchDispatch starts nix-dispatch as root.
func (s *site) launchDispatch(args ...string) *launched {
	s.t.Helper()
	cmd := s.client.Command(s.t.Context(), "root", append([]string{programs + "/nix-dispatch"}, args...)...)
	var stdout, stderr syncBuffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	return s.launchCommand("nix-dispatch "+args[0], cmd, func() fleet.Output {
		return fleet.Output{Stdout: stdout.String(), Stderr: stderr.String()}
	})
}

func (s *site) launchCommand(what string, cmd *exec.Cmd, out func() fleet.Output) *launched {
	s.t.Helper()
	r := &launched{s: s, what: what, cmd: cmd, out: out, done: make(chan struct{})}
	if err := cmd.Start(); err != nil {
		s.t.Fatalf("start %s: %v", what, err)
	}
	go func() {
		defer close(r.done)
		r.err = cmd.Wait()
	}()
	return r
}

// signal sends a signal to the program itself.
func (r *launched) signal(sig syscall.Signal) {
	r.s.t.Helper()
	if err := r.s.client.Signal(r.cmd, sig); err != nil {
		r.s.t.Errorf("%s: %v\n%s", r.what, err, r.out().Stderr)
	}
}

// wait waits for the end and returns the exit status, -1 for a signal.
func (r *launched) wait(within time.Duration) int {
	r.s.t.Helper()
	select {
	case <-r.done:
	case <-time.After(within):
		r.s.t.Fatalf("%s has not ended after %s; it printed:\n%s", r.what, within, clip(r.out().Stderr))
	}
	return r.cmd.ProcessState.ExitCode()
}

// succeed waits for success and returns the output paths.
func (r *launched) succeed(within time.Duration) []string {
	r.s.t.Helper()
	if code := r.wait(within); code != 0 {
		r.s.t.Errorf("%s: %v; it printed:\n%s", r.what, r.err, clip(r.out().Stderr))
		return nil
	}
	return strings.Fields(r.out().Stdout)
}

// clip bounds what is shown of a long output.
func clip(text string) string {
	const most = 4000
	if len(text) <= most {
		return text
	}
	return text[:most/2] + "\n[...]\n" + text[len(text)-most/2:]
}

// pids are the ids, on this machine, of a host's processes whose command line
// matches.
func pids(h *fleet.Host, match func(cmdline string) bool) []int {
	namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", h.PID()))
	if err != nil {
		return nil
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var found []int
	for _, dir := range dirs {
		if ns, err := os.Readlink(dir + "/ns/pid"); err != nil || ns != namespace {
			continue
		}
		text, err := os.ReadFile(dir + "/cmdline")
		if err != nil || !match(strings.TrimSpace(strings.ReplaceAll(string(text), "\x00", " "))) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(dir)); err == nil {
			found = append(found, pid)
		}
	}
	return found
}

// runsOn counts a host's processes whose command line holds text.
func runsOn(h *fleet.Host, text string) int {
	return len(pids(h, func(cmdline string) bool { return strings.Contains(cmdline, text) }))
}
