package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// programs is where the hosts see the programs under test.
const programs = "/opt/nix-dispatch"

var binaries = sync.OnceValues(buildBinaries)

// TestMain removes what buildBinaries made.
func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := binaries(); err == nil && dir != "" {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

// buildBinaries builds the programs as the Makefile does.
func buildBinaries() (string, error) {
	if fleet.Available() != nil {
		return "", nil
	}
	dir, err := os.MkdirTemp("", "nix-dispatch-bin-")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	cmd := exec.Command("make", "-s", "-C", "../..", "build", "BIN="+dir)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the programs: %w\n%s", err, out)
	}
	cmd = exec.Command("go", "build", "-o", dir, "./mallory", "./hostile")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build mallory and hostile: %w\n%s", err, out)
	}
	return dir, nil
}

// A machineConfig is one remote machine of a site.
type machineConfig struct {
	name    string
	suite   string // "" for trixie
	scheme  string // "" for ssh
	user    string // "" for root
	columns string // of its machines line; "" for x86_64-linux with 4 slots
	host    fleet.HostConfig
}

// line is the machine's line in the machines file.
func (m machineConfig) line() string {
	scheme, user, columns := m.scheme, m.user, m.columns
	if scheme == "" {
		scheme = "ssh"
	}
	if user == "" {
		user = "root"
	}
	if columns == "" {
		columns = "x86_64-linux - 4"
	}
	return fmt.Sprintf("%s://%s@%s %s\n", scheme, user, m.name, columns)
}

// A siteConfig says what a test needs.
type siteConfig struct {
	client   string // suite; "" for trixie
	jobs     int    // max-jobs of the client's own Nix
	nixConf  string // more of the client's nix.conf
	machines []machineConfig
	daemon   []string // nix-dispatchd's arguments
	// files are put on the client before its daemon starts: path -> text.
	files map[string]string
}

// A site is a client host with a running nix-dispatchd, whose Nix builds through
// it, and machines.
type site struct {
	t        *testing.T
	fleet    *fleet.Fleet
	client   *fleet.Host
	machines map[string]*fleet.Host
	args     []string
	env      []string // more of nix-dispatchd's environment
	prefix   []string // a command that runs nix-dispatchd, such as prlimit; nil for none
	daemon   *daemonProcess
}

// newSite brings up a site, which goes away with the test.
func newSite(t *testing.T, cfg siteConfig) *site {
	t.Helper()
	fleet.Require(t)
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	f, err := fleet.New(t.Context(), fleet.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("close the fleet: %v", err)
		}
	})
	s := &site{t: t, fleet: f, machines: make(map[string]*fleet.Host), args: cfg.daemon}
	var lines strings.Builder
	var hosts sync.WaitGroup
	var mu sync.Mutex
	for _, m := range cfg.machines {
		lines.WriteString(m.line())
		hosts.Go(func() {
			m.host.Name, m.host.Suite = m.name, m.suite
			h := s.host(m.host)
			mu.Lock()
			s.machines[m.name] = h
			mu.Unlock()
		})
	}
	hosts.Go(func() { s.client = s.host(clientConfig(cfg, dir)) })
	hosts.Wait()
	if t.Failed() {
		t.FailNow()
	}
	s.write("/etc/nix/machines", lines.String())
	s.write("/root/.config/nix/nix.conf", "build-hook = "+hookSetting(cfg.client)+"\n")
	for name, text := range cfg.files {
		s.write(name, text)
	}
	s.startDaemon()
	t.Cleanup(s.report)
	return s
}

func (s *site) host(cfg fleet.HostConfig) *fleet.Host {
	h, err := s.fleet.Host(s.t.Context(), cfg)
	if err != nil {
		s.t.Errorf("host %s: %v", cfg.Name, err)
	}
	return h
}

// hookSetting is the value of build-hook: Nix 2.8 takes one path and no
// arguments.
func hookSetting(suite string) string {
	if suite == fleet.Bookworm {
		return programs + "/nix-dispatch-hook"
	}
	return programs + "/nix-dispatch hook"
}

// clientConfig sets the hook in the way that works for the client's Nix: 2.25 to
// 2.33 ignore it in nix.conf.
func clientConfig(cfg siteConfig, dir string) fleet.HostConfig {
	c := fleet.HostConfig{
		Name: "client", Suite: cfg.client,
		NixConf: fmt.Sprintf("max-jobs = %d\n%s\n", cfg.jobs, cfg.nixConf),
		Binds:   map[string]string{programs: dir},
	}
	if cfg.client == "" || cfg.client == fleet.Trixie {
		c.NixDaemon.Env = []string{"NIX_CONFIG=build-hook = " + hookSetting(cfg.client)}
	} else {
		c.NixConf += "build-hook = " + hookSetting(cfg.client) + "\n"
	}
	return c
}

// write puts a file on the client, readable by all.
func (s *site) write(name, text string) {
	s.t.Helper()
	if err := s.client.WriteFile(name, []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// A daemonProcess is a nix-dispatchd on the client.
type daemonProcess struct {
	cmd  *exec.Cmd
	log  syncBuffer
	gone chan struct{}
	err  error // valid after gone is closed
}

// startDaemon starts nix-dispatchd and waits until it is ready and has tried to
// reach every machine once.
func (s *site) startDaemon() {
	s.t.Helper()
	d := &daemonProcess{gone: make(chan struct{})}
	d.cmd = s.client.Command(context.WithoutCancel(s.t.Context()), "root",
		slices.Concat(s.prefix, []string{programs + "/nix-dispatchd", "--log-level", "debug", "--drain-timeout", "0s"}, s.args)...)
	d.cmd.Env = append(d.cmd.Env, s.env...)
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
	s.eventually(time.Minute, "nix-dispatchd is ready", func() bool {
		select {
		case <-d.gone:
			s.t.Fatalf("nix-dispatchd ended: %v\n%s", d.err, d.log.String())
		default:
		}
		return strings.Contains(d.log.String(), "msg=ready")
	})
	s.eventually(time.Minute, "no machine is connecting", func() bool {
		for _, m := range s.status().Machines {
			if m.State == "connecting" {
				return false
			}
		}
		return true
	})
}

// stopDaemon signals nix-dispatchd and waits for its end. It does nothing if it
// has ended.
func (s *site) stopDaemon(sig syscall.Signal) {
	s.t.Helper()
	select {
	case <-s.daemon.gone:
		return
	default:
	}
	if err := s.client.Signal(s.daemon.cmd, sig); err != nil {
		s.t.Errorf("signal nix-dispatchd: %v", err)
	}
	select {
	case <-s.daemon.gone:
	case <-time.After(time.Minute):
		s.t.Errorf("nix-dispatchd does not end after %v", sig)
	}
}

// report shows the daemon's log of a failed test.
func (s *site) report() {
	if s.t.Failed() {
		s.t.Logf("nix-dispatchd's log:\n%s", s.daemon.log.String())
	}
}

// nixBuild evaluates and builds an expression with nix-build as user, through
// nix-daemon unless the user is root.
func (s *site) nixBuild(user, expr string, args ...string) (fleet.Output, error) {
	s.t.Helper()
	cmd, out := s.nixBuildCommand(s.t.Context(), user, expr, args...)
	err := cmd.Run()
	return out(), err
}

// nixBuildCommand is nixBuild for the caller to start; out gives what it printed
// so far.
func (s *site) nixBuildCommand(ctx context.Context, user, expr string, args ...string) (cmd *exec.Cmd, out func() fleet.Output) {
	s.t.Helper()
	return s.capture(ctx, user, append([]string{"nix-build", "--no-out-link", "--expr", expr}, args...)...)
}

// capture prepares a command on the client; out gives what it printed so far.
func (s *site) capture(ctx context.Context, user string, argv ...string) (cmd *exec.Cmd, out func() fleet.Output) {
	var stdout, stderr syncBuffer
	cmd = s.client.Command(ctx, user, argv...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	return cmd, func() fleet.Output { return fleet.Output{Stdout: stdout.String(), Stderr: stderr.String()} }
}

// mustBuild is nixBuild for builds that must succeed; it returns the output
// paths.
func (s *site) mustBuild(user, expr string, args ...string) []string {
	s.t.Helper()
	out, err := s.nixBuild(user, expr, args...)
	if err != nil {
		s.t.Fatalf("nix-build as %s: %v\n%s", user, err, out.Stderr)
	}
	return strings.Fields(out.Stdout)
}

// dispatch runs nix-dispatch on the client as root.
func (s *site) dispatch(args ...string) (fleet.Output, error) {
	return s.client.Run(s.t.Context(), append([]string{programs + "/nix-dispatch"}, args...)...)
}

// A statusReport is what nix-dispatch status --json prints.
type statusReport struct {
	Machines []struct {
		URI            string
		State          string
		Slots, Running int
		Reason         string
		Parked         string
		LoadUnknown    string
		Load           *struct {
			StoreFreeBytes, StoreSizeBytes, BuildDirFreeBytes *uint64
			MemorySizeBytes, MemoryAvailableBytes             *uint64
			Load1                                             *float64
			Cores                                             *int
		}
	}
	Builds []struct {
		ID      json.Number
		DrvPath string
		Phase   string
		Machine string
		Seconds float64
		User    string
	}
	Detached []detachedReport
}

func (s *site) status() statusReport {
	s.t.Helper()
	out, err := s.dispatch("status", "--json")
	if err != nil {
		s.t.Fatalf("nix-dispatch status: %v", err)
	}
	var r statusReport
	if err := json.Unmarshal([]byte(out.Stdout), &r); err != nil {
		s.t.Fatalf("nix-dispatch status --json printed %q: %v", out.Stdout, err)
	}
	return r
}

// eventually waits until ok, or fails the test. To look is often to start a
// process, so what takes longer is looked at less often.
func (s *site) eventually(within time.Duration, what string, ok func() bool) {
	s.t.Helper()
	pause := 30 * time.Millisecond
	for end := time.Now().Add(within); !ok(); time.Sleep(pause) {
		if time.Now().After(end) {
			s.t.Fatalf("not so after %s: %s", within, what)
		}
		pause = min(pause*5/4, 300*time.Millisecond)
	}
}

// idle waits until no build is in progress and no slot in use.
func (s *site) idle(within time.Duration) {
	s.t.Helper()
	s.eventually(within, "no build in progress, no slot in use", func() bool {
		r := s.status()
		for _, m := range r.Machines {
			if m.Running != 0 {
				return false
			}
		}
		return len(r.Builds) == 0
	})
}

// verify checks the contents of paths on the client against their hashes.
func (s *site) verify(paths ...string) {
	s.t.Helper()
	if out, err := s.client.Run(s.t.Context(), append([]string{"nix-store", "--verify-path"}, paths...)...); err != nil {
		s.t.Errorf("verify outputs: %v\n%s", err, out.Stderr)
	}
}

// builtOn counts, by machine name, which machine a nix-build said it built on.
func builtOn(stderr string) map[string]int {
	n := make(map[string]int)
	for line := range strings.Lines(stderr) {
		_, machine, ok := strings.Cut(line, ".drv' on '")
		if !ok || !strings.HasPrefix(line, "building '") {
			continue
		}
		machine, _, _ = strings.Cut(machine, "'")
		n[machine]++
	}
	return n
}

// storeFile is a file of a host's store, read from outside.
func storeFile(h *fleet.Host, path string) (string, error) {
	data, err := h.ReadFile(filepath.Clean(path))
	return string(data), err
}

// A syncBuffer is a bytes.Buffer that may be read while it is written.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
