package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// fakes is where a host sees the fake machine's programs, one for each fault.
const fakes = "/opt/fake"

// A fault is a way in which a machine is broken.
type fault struct {
	name   string
	scheme string // "" for ssh
	user   string // "" for root and a fake program; others have their own fault
	// down is set if the machine does not even come up.
	down bool
	// final is set if the fault looks like the derivation's own failure.
	final bool
	// apart is set if it needs options of its own: see endlessStderr.
	apart bool
	// attrs are more attributes of the derivations.
	attrs string
	// want is what a person must be told.
	want []string
}

func (f fault) feature() string { return f.name + "-" + f.machine().scheme }

// machine takes what asks for the fault's feature, before any good machine, and
// alone what asks for the feature with "only-" before it.
func (f fault) machine() machineConfig {
	m := machineConfig{name: "bad", scheme: f.scheme, user: f.user}
	if m.scheme == "" {
		m.scheme = "ssh"
	}
	if m.user == "" {
		m.user = "root"
		m.name += "?remote-program=" + fakes + "/" + f.name
	}
	feature := f.name + "-" + m.scheme
	m.columns = fmt.Sprintf("x86_64-linux - 1 10 %s,only-%[1]s", feature)
	return m
}

// fixedAttrs make the output fixed, to what the good machine makes.
const fixedAttrs = `outputHashMode = "flat"; outputHashAlgo = "sha256"; outputHash = "106675dc1490d5cdd6d1f0410731316ce93fc964c6cf6726e2b0d53e19688feb";`

var faults = []fault{
	{name: "bashrc-prints", user: "alice", down: true, want: []string{"hi from the bashrc", "start-up file"}},
	{name: "command-prints", user: "bob", scheme: "ssh-ng", down: true, want: []string{"Welcome", "start-up file"}},
	{name: "no-nix", user: "nix", down: true, want: []string{"nix-store", "not found", "PATH", "remote-program"}},
	{name: "no-nix", user: "nix", scheme: "ssh-ng", down: true, want: []string{"nix-daemon", "not found", "PATH"}},
	{name: "no-such-program", down: true, want: []string{fakes + "/no-such-program", "not found"}},
	{name: "ends-early", down: true, want: []string{"before the"}},
	{name: "too-old", down: true, want: []string{"2.1", "Nix 2.8 or later"}},
	{name: "too-old", scheme: "ssh-ng", down: true, want: []string{"1.2", "Nix 2.8 or later"}},
	{name: "too-new", down: true, want: []string{"version 9.0"}},
	{name: "too-new", scheme: "ssh-ng", down: true, want: []string{"version 9.0"}},
	{name: "ends-mid-build", want: []string{"No space left on device"}},
	{name: "ends-mid-build", scheme: "ssh-ng", want: []string{"No space left on device"}},
	{name: "endless-text", want: []string{"text of length", "longer than permitted"}},
	{name: "endless-text", scheme: "ssh-ng", want: []string{"text of length", "longer than permitted"}},
	{name: "endless-list", want: []string{"list of length", "longer than permitted"}},
	{name: "wrong-hash", want: []string{"hash mismatch"}},
	{name: "wrong-hash", scheme: "ssh-ng", want: []string{"hash mismatch"}},
	{name: "wrong-size", want: []string{"copy outputs", "wrong NAR size"}},
	{name: "more-than-said", want: []string{"copy outputs", "wrong NAR size"}},
	{name: "more-than-said", scheme: "ssh-ng", want: []string{"copy outputs", "wrong NAR size"}},
	{name: "false-reference", want: []string{"query outputs", "00000000000000000000000000000000-nowhere", "not an input"}},
	{name: "false-reference", scheme: "ssh-ng", want: []string{"query outputs", "00000000000000000000000000000000-nowhere", "not an input"}},
	{name: "false-signature", want: []string{"copy outputs", "hash mismatch"}},
	{name: "false-signature", scheme: "ssh-ng", want: []string{"copy outputs", "hash mismatch"}},
	{name: "climbs", want: []string{"copy outputs", "bad NAR"}},
	{name: "climbs", scheme: "ssh-ng", want: []string{"copy outputs", "bad NAR"}},
	{name: "wrong-fixed", attrs: fixedAttrs, want: []string{"copy outputs", "hash mismatch"}},
	{name: "wrong-fixed", scheme: "ssh-ng", attrs: fixedAttrs, want: []string{"copy outputs", "hash mismatch"}},
	{name: "endless-stderr", apart: true},
	{name: "endless-stderr", scheme: "ssh-ng", apart: true},
	{name: "more-paths", want: []string{"00000000000000000000000000000000-only-more-paths-ssh", "not asked for"}},
	{name: "no-nar", want: []string{"copy outputs", "bad NAR"}},
	{name: "no-nar", scheme: "ssh-ng", want: []string{"copy outputs", "bad NAR"}},
	{name: "endless-file", want: []string{"copy outputs", "wrong NAR size"}},
	{name: "endless-file", scheme: "ssh-ng", want: []string{"copy outputs", "wrong NAR size"}},
	{name: "cut-nar", want: []string{"copy outputs", "EOF"}},
	{name: "cut-nar", scheme: "ssh-ng", want: []string{"copy outputs", "EOF"}},
	{name: "no-output", want: []string{"-only-no-output-ssh is not valid there"}},
	{name: "no-output", scheme: "ssh-ng", want: []string{"-only-no-output-ssh-ng is not valid there"}},
	{name: "other-path", want: []string{"00000000000000000000000000000000-only-other-path-ssh", "not asked for"}},
	{name: "escapes", final: true, want: []string{"clearedback red"}},
	{name: "escapes", scheme: "ssh-ng", final: true, want: []string{"clearedback red"}},
}

// fakePrograms builds the fake machine, under the name of each fault.
func fakePrograms(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	program := filepath.Join(t.TempDir(), "fakemachine")
	cmd := exec.Command("go", "build", "-o", program, "./fakemachine")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the fake machine: %v\n%s", err, out)
	}
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range faults {
		if f.user != "" || f.name == "no-such-program" {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, f.name), text, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// badSite is a site of a good machine and one that is bad in every way there is.
func badSite(t *testing.T) *site {
	fleet.Require(t)
	var lines strings.Builder
	good := machineConfig{name: "good"}
	for _, f := range faults {
		good.host.SystemFeatures = append(good.host.SystemFeatures, f.feature())
		lines.WriteString(f.machine().line())
	}
	good.columns = "x86_64-linux - 4 1 " + strings.Join(good.host.SystemFeatures, ",")
	s := newSite(t, siteConfig{
		daemon: []string{"--machine-wait", "4s"},
		machines: []machineConfig{good, {name: "bad", host: fleet.HostConfig{
			Binds:      map[string]string{fakes: fakePrograms(t)},
			SSHDConfig: "Match User bob\nForceCommand echo Welcome to this machine; eval \"$SSH_ORIGINAL_COMMAND\"",
		}}},
	})
	bad := s.machines["bad"]
	key, err := bad.ReadFile("/home/alice/.ssh/authorized_keys")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"/home/bob/.ssh/authorized_keys": string(key),
		"/home/alice/.bashrc":            "echo hi from the bashrc\n",
		"/home/nix/.bashrc":              "PATH=/usr/games\n",
	} {
		if err := bad.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s.stopDaemon(syscall.SIGTERM)
	s.write("/etc/nix/machines", lines.String()+good.line())
	s.startDaemon()
	return s
}

// told checks that a text holds what a fault must be explained with.
func (f fault) told(t *testing.T, where, text string) {
	t.Helper()
	for _, want := range f.want {
		if !strings.Contains(text, want) {
			t.Errorf("%s says %q, want %q in it", where, text, want)
		}
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' }) {
		t.Errorf("%s has control characters: %q", where, text)
	}
}

func TestBadMachines(t *testing.T) {
	t.Parallel()
	s := badSite(t)
	t.Run("status tells what is wrong", func(t *testing.T) {
		reasons := make(map[string]string)
		for _, m := range s.within(t).status().Machines {
			reasons[m.URI] = m.State + ": " + m.Reason
		}
		for _, f := range faults {
			reason := reasons[f.machine().uri()]
			if !f.down {
				if reason != "up: " {
					t.Errorf("%s: %q, want it up", f.feature(), reason)
				}
				continue
			}
			if !strings.HasPrefix(reason, "down: ") {
				t.Errorf("%s: %q, want it down", f.feature(), reason)
			}
			f.told(t, "status of "+f.feature(), reason)
		}
	})
	t.Run("a good machine builds instead", func(t *testing.T) { s.within(t).buildsDespiteFaults() })
	t.Run("without a good machine the build fails and says why", func(t *testing.T) { s.within(t).failsOfFaults() })
	t.Run("what never stops printing", func(t *testing.T) { s.within(t).endlessStderr() })
	t.Run("what would steer a terminal", func(t *testing.T) { s.within(t).escapesAreRemoved() })
	t.Run("what cannot be asked for", func(t *testing.T) { s.within(t).refusesRequests() })
	s.idle(time.Minute)
}

func (s *site) buildsDespiteFaults() {
	t := s.t
	var drvs []string
	for _, f := range faults {
		if !f.final && !f.apart {
			drvs = append(drvs, shell("good-"+f.feature(), "echo good > $out", features(f.feature())+f.attrs))
		}
	}
	out, err := s.keepGoing(drvs)
	if err != nil {
		t.Errorf("nix-build: %v\n%s", err, out.Stderr)
	}
	paths := strings.Fields(out.Stdout)
	if err == nil && len(paths) != len(drvs) {
		t.Errorf("%d outputs of %d derivations", len(paths), len(drvs))
	}
	s.verify(paths...)
	for _, p := range paths {
		s.contents(p, "good\n")
	}
}

// keepGoing builds all that can be built, and names what is stuck after some
// minutes.
func (s *site) keepGoing(drvs []string) (fleet.Output, error) {
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel()
	cmd, out := s.nixBuildCommand(ctx, "alice", "["+strings.Join(drvs, "\n")+"]", "--keep-going")
	ended := make(chan error, 1)
	go func() { ended <- cmd.Run() }()
	select {
	case err := <-ended:
		return out(), err
	case <-time.After(3 * time.Minute):
		for _, b := range s.status().Builds {
			s.t.Errorf("still %s on %q after %.0f s: %s", b.Phase, b.Machine, b.Seconds, b.DrvPath)
		}
		cancel()
		return out(), <-ended
	}
}

func (s *site) failsOfFaults() {
	t := s.t
	var drvs []string
	for _, f := range faults {
		if !f.apart {
			drvs = append(drvs, shell("only-"+f.feature(), "echo never > $out", features("only-"+f.feature())+f.attrs))
		}
	}
	out, err := s.keepGoing(drvs)
	if err == nil || strings.TrimSpace(out.Stdout) != "" {
		t.Errorf("nix-build built %q (%v)", out.Stdout, err)
	}
	defer func() {
		if t.Failed() {
			t.Logf("nix-build printed:\n%s", out.Stderr)
		}
	}()
	for _, f := range faults {
		if f.apart {
			continue
		}
		f.told(t, "nix-build about "+f.feature(), failureOf(out.Stderr, "only-"+f.feature()))
	}
}

// endlessStderr has machines print without end: limits end it, and neither memory
// nor disk is used up by it.
func (s *site) endlessStderr() {
	for scheme, option := range map[string][]string{
		"ssh":    {"max-build-log-size", "1000000"},
		"ssh-ng": {"timeout", "5"},
	} {
		name := "only-endless-stderr-" + scheme
		// root, whose max-build-log-size counts
		out, err := s.nixBuild("root", shell(name, "echo never > $out", features(name)), "--option", option[0], option[1])
		if err == nil || len(out.Stderr) > 16<<20 {
			s.t.Errorf("%s: %v with %d bytes of log", scheme, err, len(out.Stderr))
		}
		want := "timed out after 5 seconds"
		if scheme == "ssh" {
			want = "killed after writing more than 1000000 bytes of log output"
		}
		if !strings.Contains(out.Stderr, want) {
			s.t.Errorf("%s: nix-build ended with %q, want %q", scheme, out.Stderr[max(0, len(out.Stderr)-500):], want)
		}
	}
	s.idle(time.Minute)
	if used := s.peakMemory(); used > memoryLimit {
		s.t.Errorf("nix-dispatchd has used %d KiB, want %d at most", used, memoryLimit)
	}
}

// escapesAreRemoved looks at all that is printed of a machine's words.
func (s *site) escapesAreRemoved() {
	name := "only-escapes-ssh-ng"
	drv := s.derivations(shell(name, "echo never > $out", features(name)))[0]
	for _, args := range [][]string{{"build", "-L", drv}, {"history"}, {"history", "--failed"}, {"status"}, {"log", drv}, {"explain", drv}} {
		argv := append([]string{programs + "/nix-dispatch"}, args...)
		if args[0] == "log" { // which is as it was printed, except on a terminal
			argv = []string{"script", "-qec", strings.Join(argv, " "), "/dev/null"}
		}
		out, _ := s.client.Run(s.t.Context(), argv...)
		text := strings.ReplaceAll(out.Stdout+out.Stderr, "\r\n", "\n") // a terminal's
		if i := strings.IndexFunc(text, func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' || 0x7f <= r && r < 0xa0 }); i >= 0 {
			s.t.Errorf("nix-dispatch %s prints a control character: %q", args[0], text[max(0, i-40):min(len(text), i+40)])
		}
		if args[0] != "status" && args[0] != "explain" && !strings.Contains(out.Stdout+out.Stderr, "red") {
			s.t.Errorf("nix-dispatch %s does not tell of the failure:\n%s", args, out.Stdout+out.Stderr)
		}
	}
	for line := range strings.Lines(s.daemon.log.String()) {
		if strings.ContainsFunc(strings.TrimSuffix(line, "\n"), func(r rune) bool { return r < ' ' || r == 0x7f }) {
			s.t.Errorf("a line of the daemon's log has a control character: %q", line)
		}
		if !strings.HasPrefix(line, "time=") {
			s.t.Errorf("somebody has forged a line of the daemon's log: %q", line)
		}
	}
}

// failureOf is what the hook said of the failure of the derivation with a name,
// "" if nothing: a line and those that are indented below it.
func failureOf(stderr, name string) string {
	var said strings.Builder
	for line := range strings.Lines(stderr) {
		switch {
		case said.Len() > 0 && !strings.HasPrefix(line, "  "):
			return said.String()
		case said.Len() > 0, strings.Contains(line, "error: build of '") && strings.Contains(line, "-"+name+".drv'"):
			said.WriteString(line)
		}
	}
	return said.String()
}

func (s *site) refusesRequests() {
	t := s.t
	inst, err := s.client.Run(t.Context(), "nix-instantiate", "--expr", shell("some", "echo > $out; echo > $doc", `outputs = [ "out" "doc" ];`))
	if err != nil {
		t.Fatal(err)
	}
	drv := strings.TrimSpace(inst.Stdout)
	tests := []struct {
		name, arg string
		exit      int
		want      []string
	}{
		{"a derivation that is not in the store", "/nix/store/00000000000000000000000000000000-x.drv", 1, []string{"-x.drv is not in the local store"}},
		{"an output that is unknown", drv + "!nope", 2, []string{`"nope"`, "doc, out"}},
		{"no derivation", strings.TrimSuffix(drv, ".drv"), 2, []string{"derivation"}},
		{"no store path", "/etc/passwd", 2, []string{`"/etc/passwd"`}},
	}
	for _, tt := range tests {
		out, err := s.dispatch("build", tt.arg)
		if code := exitCode(err); code != tt.exit || out.Stdout != "" {
			t.Errorf("%s: exit %d, stdout %q, want exit %d", tt.name, code, out.Stdout, tt.exit)
		}
		for _, want := range tt.want {
			if !strings.Contains(out.Stderr, want) {
				t.Errorf("%s: stderr %q, want %q in it", tt.name, out.Stderr, want)
			}
		}
	}
}

// exitCode is the exit status that an error of a command tells of; 0 without one.
func exitCode(err error) int {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}
