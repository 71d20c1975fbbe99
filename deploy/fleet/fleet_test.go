package fleet_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

func newFleet(t *testing.T) *fleet.Fleet {
	t.Helper()
	fleet.Require(t)
	f, err := fleet.New(t.Context(), fleet.Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// hosts makes hosts at once.
func hosts(t *testing.T, f *fleet.Fleet, configs ...fleet.HostConfig) []*fleet.Host {
	t.Helper()
	out := make([]*fleet.Host, len(configs))
	errs := make([]error, len(configs))
	var wg sync.WaitGroup
	for i, config := range configs {
		wg.Go(func() { out[i], errs[i] = f.Host(t.Context(), config) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return out
}

func run(t *testing.T, h *fleet.Host, user string, argv ...string) fleet.Output {
	t.Helper()
	out, err := h.RunAs(t.Context(), user, argv...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func derivation(name, script string) string {
	return fmt.Sprintf(`derivation { name = "%s"; system = "x86_64-linux"; builder = "/bin/sh";
		PATH = "/usr/bin:/bin"; args = [ "-c" "%s" ]; }`, name, script)
}

func TestEverySuiteBuildsLocallyForRootAndUsers(t *testing.T) {
	f := newFleet(t)
	configs := []fleet.HostConfig{}
	for _, suite := range fleet.Suites() {
		configs = append(configs, fleet.HostConfig{Name: suite, Suite: suite})
	}
	for _, h := range hosts(t, f, configs...) {
		if v := run(t, h, "root", "nix", "--version").Stdout; !strings.HasSuffix(v, " "+h.NixVersion()+"\n") {
			t.Errorf("%s: nix --version says %q, want %s", h.Name(), v, h.NixVersion())
		}
		t.Logf("%s: Nix %s", h.Name(), h.NixVersion())
		for _, user := range []string{"root", "alice"} {
			path := strings.TrimSpace(run(t, h, user, "nix-build", "--no-out-link", "-E",
				derivation(user, "id -un; echo $(cat /proc/sys/kernel/hostname) > $out")).Stdout)
			text, err := h.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got, want := string(text), h.Name()+"\n"; got != want {
				t.Errorf("%s: built %q, want %q", h.Name(), got, want)
			}
		}
		// Builds went to a build user by way of nix-daemon, and user namespaces work.
		run(t, h, "alice", "unshare", "--user", "--map-root-user", "true")
		if log := run(t, h, "alice", "sh", "-c", "nix-store --read-log $(nix-instantiate -E '"+
			derivation("alice", "id -un; echo $(cat /proc/sys/kernel/hostname) > $out")+"')").Stdout; !strings.HasPrefix(log, "nixbld") {
			t.Errorf("%s: alice's build ran as %q, want a nixbld user", h.Name(), log)
		}
	}
}

func TestStockRemoteBuildOverBothProtocols(t *testing.T) {
	f := newFleet(t)
	var machines []fleet.HostConfig
	for _, suite := range fleet.Suites() {
		machines = append(machines, fleet.HostConfig{Name: "m-" + suite, Suite: suite, NixTrusted: true})
	}
	all := hosts(t, f, append(machines, fleet.HostConfig{Name: "client", NixConf: "max-jobs = 0"})...)
	client := all[len(all)-1]
	for _, m := range all[:len(all)-1] {
		for _, uri := range []string{"ssh://" + m.Name(), "ssh-ng://nix@" + m.Name()} {
			if err := client.WriteFile("/etc/nix/machines", []byte(uri+" x86_64-linux\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			before, err := m.SSHConnections()
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			name := strings.NewReplacer(":", "", "/", "", "@", "").Replace(uri)
			path := strings.TrimSpace(run(t, client, "alice", "nix-build", "--no-out-link", "-E",
				derivation(name, "cat /proc/sys/kernel/hostname > $out")).Stdout)
			text, err := client.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.TrimSpace(string(text)); got != m.Name() {
				t.Errorf("%s: built on %q", uri, got)
			}
			if after, err := m.SSHConnections(); err != nil || after <= before {
				t.Errorf("%s: %d SSH connections, then %d (%v): want more", uri, before, after, err)
			}
		}
	}
}

func TestCutOffHostIsSilentAndComesBack(t *testing.T) {
	f := newFleet(t)
	hs := hosts(t, f, fleet.HostConfig{Name: "a"}, fleet.HostConfig{Name: "b"})
	a, b := hs[0], hs[1]
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	open := a.Command(ctx, "root", "ssh", "b", "echo open; read line; echo $line")
	stdin, err := open.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := open.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := open.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stdout)
	if line, err := lines.ReadString('\n'); err != nil || line != "open\n" {
		t.Fatalf("read %q, %v", line, err)
	}
	if err := b.CutOff(ctx); err != nil {
		t.Fatal(err)
	}
	// A host that joins later must not let the packets through again.
	hosts(t, f, fleet.HostConfig{Name: "c"})
	out, err := a.Run(ctx, "ssh", "-o", "ConnectTimeout=1", "b", "true")
	if err == nil || !strings.Contains(out.Stderr, "timed out") {
		t.Errorf("ssh to a host that is cut off: %v, want a timeout", err)
	}
	if _, err := fmt.Fprintln(stdin, "still"); err != nil {
		t.Fatal(err)
	}
	if err := b.Restore(ctx); err != nil {
		t.Fatal(err)
	}
	if line, err := lines.ReadString('\n'); err != nil || line != "still\n" {
		t.Errorf("the connection did not survive: read %q, %v", line, err)
	}
	if err := open.Wait(); err != nil {
		t.Error(err)
	}
}

func TestFrozenHostAnswersAgainAfterThaw(t *testing.T) {
	f := newFleet(t)
	hs := hosts(t, f, fleet.HostConfig{Name: "a"}, fleet.HostConfig{Name: "b"})
	a, b := hs[0], hs[1]
	inside := b.Command(t.Context(), "alice", "sh", "-c", "sleep 0.1; exit 7")
	if err := inside.Start(); err != nil {
		t.Fatal(err)
	}
	if err := b.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if out, err := a.Run(ctx, "ssh", "b", "echo answered"); err == nil || out.Stdout != "" {
		t.Errorf("a frozen host said %q", out.Stdout)
	}
	if b.State() != "frozen" {
		t.Errorf("state is %q", b.State())
	}
	if err := b.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	run(t, a, "root", "ssh", "b", "true")
	var exit *exec.ExitError
	if err := inside.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("a command from before the freeze ended with %v, want status 7", err)
	}
}

// TestFreezeOfACommandThatStartsOthers freezes a shell that starts one program after
// the other, by vfork: now and then in the moment in which the shell waits for a
// child that is stopped before it executes the program.
func TestFreezeOfACommandThatStartsOthers(t *testing.T) {
	h := hosts(t, newFleet(t), fleet.HostConfig{Name: "a"})[0]
	ctx, cancel := context.WithCancel(t.Context())
	running := h.Command(ctx, "root", "sh", "-c", "while :; do /bin/true; done")
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	defer running.Wait() //nolint:errcheck // it is killed
	defer cancel()
	for range 30 {
		if err := h.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := h.Thaw(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	run(t, h, "root", "true")
}

func TestKilledHostKeepsItsDisk(t *testing.T) {
	f := newFleet(t)
	h := hosts(t, f, fleet.HostConfig{Name: "a", Suite: fleet.Bookworm})[0]
	path := strings.TrimSpace(run(t, h, "alice", "nix-build", "-E", derivation("kept", "echo kept > $out")).Stdout)
	if err := h.WriteFile("/var/lib/new/file", []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	running := h.Command(t.Context(), "root", "sleep", "1000")
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	if err := h.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := running.Wait(); err == nil {
		t.Error("a command survived its host")
	}
	if _, err := h.Run(t.Context(), "true"); !errors.Is(err, fleet.ErrOff) {
		t.Errorf("running a command in a host that is off: %v, want ErrOff", err)
	}
	if err := h.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	run(t, h, "alice", "nix-store", "--check-validity", path)
	if text, err := h.ReadFile("/var/lib/new/file"); err != nil || string(text) != "kept" {
		t.Errorf("read %q, %v", text, err)
	}
	// A second round: the overlay is mounted on the same directories again.
	if err := errors.Join(h.Kill(t.Context()), h.Boot(t.Context())); err != nil {
		t.Fatal(err)
	}
}

func TestCommandEndsWithItsContext(t *testing.T) {
	f := newFleet(t)
	h := hosts(t, f, fleet.HostConfig{Name: "a", NoDaemon: true})[0]
	ctx, cancel := context.WithCancel(t.Context())
	killed := h.Command(ctx, "alice", "sleep", "1001")
	signalled := h.Command(t.Context(), "alice", "sh", "-c", "trap 'exit 5' INT; while :; do sleep 0.05; done")
	for _, cmd := range []*exec.Cmd{killed, signalled} {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, h, "sleep 1001", true)
	cancel()
	killed.Wait()
	waitFor(t, h, "sleep 1001", false)
	waitFor(t, h, "sleep 0.05", true)
	if err := h.Signal(signalled, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := signalled.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 5 {
		t.Errorf("after SIGINT: %v, want status 5 from the program's handler", err)
	}
}

func waitFor(t *testing.T, h *fleet.Host, cmdline string, want bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		all, err := h.Processes()
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, p := range all {
			found = found || p == cmdline
		}
		if found == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%q running: %v, want %v; processes: %q", cmdline, found, want, all)
		}
	}
}

func TestHostConfigReachesItsServices(t *testing.T) {
	f := newFleet(t)
	bin := filepath.Join(t.TempDir(), "hello")
	if err := os.WriteFile(bin, []byte("#!/bin/sh\necho hello\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var configs []fleet.HostConfig
	for _, suite := range fleet.Suites() {
		configs = append(configs, fleet.HostConfig{
			Name: suite, Suite: suite, NixConf: "max-jobs = 17", NixTrusted: true,
			SystemFeatures: []string{"kvm", "benchmark"},
			SSHDConfig:     "MaxSessions 3\nMatch User bob\nMaxSessions 4",
			NixDaemon:      fleet.NixDaemon{Env: []string{"MARK=it's here"}},
			Binds:          map[string]string{"/opt/bin/hello": bin},
		})
	}
	for _, h := range hosts(t, f, configs...) {
		suite := h.Suite()
		config := run(t, h, "alice", "nix", "show-config").Stdout
		for _, want := range []string{"max-jobs = 17\n", "trusted-users = nix root\n", "system-features = benchmark kvm\n"} {
			if !strings.Contains(config, want) {
				if strings.HasPrefix(want, "trusted") && strings.Contains(config, "trusted-users = root nix\n") {
					continue
				}
				t.Errorf("%s: nix show-config lacks %q", suite, want)
			}
		}
		if got := run(t, h, "root", "/usr/sbin/sshd", "-T").Stdout; !strings.Contains(strings.ToLower(got), "maxsessions 3\n") {
			t.Errorf("%s: sshd has not taken MaxSessions", suite)
		}
		if got := run(t, h, "alice", "/opt/bin/hello").Stdout; got != "hello\n" {
			t.Errorf("%s: bound program says %q", suite, got)
		}
		mark := func() string {
			return run(t, h, "root", "sh", "-c", `tr '\0' '\n' </proc/$(cat /run/nix-daemon.pid)/environ | grep MARK || true`).Stdout
		}
		if got := mark(); got != "MARK=it's here\n" {
			t.Errorf("%s: nix-daemon's environment has %q", suite, got)
		}
		if err := h.RestartNixDaemon(t.Context(), fleet.NixDaemon{}); err != nil {
			t.Fatal(err)
		}
		if got := mark(); got != "" {
			t.Errorf("%s: nix-daemon's environment still has %q", suite, got)
		}
		run(t, h, "alice", "nix-build", "--no-out-link", "-E", derivation("x", "echo > $out"))
		if err := h.StopNixDaemon(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := h.RunAs(t.Context(), "alice", "nix-build", "--no-out-link", "-E", derivation("y", "echo > $out")); err == nil {
			t.Errorf("%s: alice built without nix-daemon", suite)
		}
	}
}

func TestFarNameIsFarAway(t *testing.T) {
	f := newFleet(t)
	hs := hosts(t, f, fleet.HostConfig{Name: "a"}, fleet.HostConfig{Name: "b"})
	const delay = 50 * time.Millisecond
	if _, err := f.Far(t.Context(), "far-b", hs[1], fleet.ProxyConfig{Delay: delay}); err != nil {
		t.Fatal(err)
	}
	started := time.Now()
	if got := run(t, hs[0], "root", "ssh", "far-b", "hostname").Stdout; got != "b\n" {
		t.Errorf("ssh far-b says it is %q", got)
	}
	// SSH needs more than three round trips until the command's output.
	if took := time.Since(started); took < 6*delay {
		t.Errorf("ssh took %v, less than three round trips of %v", took, 2*delay)
	}
}
