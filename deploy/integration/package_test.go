package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"nixdispatch/deploy/fleet"
)

// TestPackage lives through what a host does with the Debian package: installed,
// switched on by one line, restarted and upgraded while builds run, removed while they
// run, and purged; at the end Nix builds as it did before. In "make test" it does so on
// one suite, with few builds, and is not restarted and installed again as well.
func TestPackage(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	old, next := makeDeb(t, "v1.0"), makeDeb(t, "v1.1")
	mac, err := f.Host(t.Context(), fleet.HostConfig{Name: "mac", NixConf: "max-jobs = 20"})
	if err != nil {
		t.Fatal(err)
	}
	t.Run("suites", func(t *testing.T) {
		for _, suite := range shortOr([]string{fleet.Trixie}, suites) {
			t.Run(suite, func(t *testing.T) {
				t.Parallel()
				restarted := 10
				if suite == fleet.Trixie {
					restarted = 50
				}
				h := &packagedHost{systemdHost: bootSystemd(t, f, suite), mac: mac, restarted: restarted}
				h.machines("ssh://root@mac x86_64-linux - 20")
				h.live(old, next)
			})
		}
	})
}

// makeDeb makes the package of that version.
func makeDeb(t *testing.T, version string) (path string) {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("make", "-s", "-C", "../..", "deb", "BIN="+dir, "VERSION="+version, "COMPRESSION=none")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make deb: %v\n%s", err, out)
	}
	debs, _ := filepath.Glob(dir + "/nix-dispatch_" + strings.TrimPrefix(version, "v") + "_*.deb")
	if len(debs) != 1 {
		t.Fatalf("make deb made %q", debs)
	}
	return debs[0]
}

// A packagedHost is one that the package is installed on.
type packagedHost struct {
	*systemdHost
	mac       *fleet.Host // builds for it
	restarted int         // how many builds are in progress at a restart
}

func (h *packagedHost) live(old, next string) {
	t := h.t
	h.apt("install", h.bring(old))
	for _, unit := range []string{"nix-dispatchd.socket", "nix-dispatchd.service"} {
		if state := strings.TrimSpace(h.mustRun("systemctl", "is-enabled", unit)) + strings.TrimSpace(h.mustRun("systemctl", "is-active", unit)); state != "enabledactive" {
			t.Errorf("%s is %s once installed", unit, state)
		}
	}
	if out := h.mustRun("getent", "group", "nix-dispatch"); !strings.HasPrefix(out, "nix-dispatch:") {
		t.Errorf("group: %q", out)
	}
	h.buildsWithout("installed", "alice")

	h.mustRun("nix-dispatch", "enable") // the documented line
	h.buildsThrough("enabled", "alice")
	h.buildsThrough("enabled-root", "root")

	if nightly { // an upgrade restarts it, too
		builds := h.startBuilds("restarted", h.restarted)
		h.mustRun("systemctl", "--no-block", "restart", "nix-dispatchd")
		h.stops()
		builds.end(h)
	}

	// Builds outlive an upgrade.
	pid := h.property("MainPID")
	builds := h.startBuilds("upgraded", shortOr(4, 10))
	h.apt("install", h.bring(next))
	h.stops()
	builds.end(h)
	h.eventually("the new version runs", func() bool {
		out, err := h.run("nix-dispatch", "doctor", "--json")
		_ = err // it finds problems, as mac may not be what the list says
		return h.property("MainPID") != pid && strings.Contains(out, "version v1.1 answers")
	})
	h.buildsThrough("after-upgrade", "alice")

	// And a removal, after which Nix's own hook builds.
	builds = h.startBuilds("removed", shortOr(4, 10))
	removed := make(chan error, 1)
	go func() { removed <- h.tryApt("remove", "nix-dispatch") }()
	h.eventually("the removal waits for builds", func() bool {
		_, err := h.run("pgrep", "-f", "^nix-dispatch disable")
		return err == nil
	})
	builds.end(h)
	if err := <-removed; err != nil {
		t.Fatal(err)
	}
	h.buildsWithout("removed-after", "alice")
	h.buildsWithout("removed-after-root", "root")
	if out, err := h.run("grep", "-r", "nix-dispatch", "/etc/nix", "/root/.config"); err == nil {
		t.Errorf("left in the configuration: %s", out)
	}

	if nightly {
		h.apt("install", h.bring(next))
		h.mustRun("nix-dispatch", "enable")
		h.buildsThrough("again", "alice")
	}
	h.apt("purge", "nix-dispatch")
	h.buildsWithout("purged", "alice")
	h.leavesNothing()
}

// leavesNothing looks for what is left of a purged package.
func (h *packagedHost) leavesNothing() {
	h.t.Helper()
	left := strings.Fields(h.script(`find /usr /etc /var/lib /root /run -xdev -name '*nix-dispatch*' -not -path '/run/systemd/*' -not -path '/var/lib/systemd/*' -not -path '/usr/share/doc/*'`))
	left = slices.DeleteFunc(left, func(path string) bool { return path == "/run/nix-dispatch" }) // until the next boot
	if len(left) > 0 {
		h.t.Errorf("left behind: %q", left)
	}
	if out, _ := h.run("systemctl", "--failed", "--no-legend", "--plain"); strings.Contains(out, "nix") {
		h.t.Errorf("failed units: %s", out)
	}
}

// bring puts a package there.
func (h *packagedHost) bring(deb string) string {
	h.t.Helper()
	path := "/var/tmp/" + filepath.Base(deb)
	data, err := os.ReadFile(deb)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := h.WriteFile(path, data, 0o644); err != nil {
		h.t.Fatal(err)
	}
	return path
}

func (h *packagedHost) apt(args ...string) {
	h.t.Helper()
	if err := h.tryApt(args...); err != nil {
		h.t.Fatal(err)
	}
}

func (h *packagedHost) tryApt(args ...string) error {
	out, err := h.run(append([]string{"env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-y", "-o", "Dpkg::Use-Pty=0"}, args...)...)
	if err != nil {
		return fmt.Errorf("apt-get %q: %w\n%s", args, err, out)
	}
	return nil
}

// stops waits until the service is told to stop, and waits for its builds.
func (h *packagedHost) stops() {
	h.t.Helper()
	h.eventually("the service is stopping", func() bool { return h.property("ActiveState") == "deactivating" })
}

// through are the builds that have gone through nix-dispatchd, the newest first, each
// as the name of its caller.
func (h *packagedHost) through() (callers []string) {
	h.t.Helper()
	for line := range strings.Lines(h.mustRun("nix-dispatch", "history", "--json")) {
		var build struct{ Caller string }
		if err := json.Unmarshal([]byte(line), &build); err != nil {
			h.t.Fatalf("%q: %v", line, err)
		}
		callers = append(callers, build.Caller)
	}
	return callers
}

func (h *packagedHost) buildsThrough(name, user string) {
	h.t.Helper()
	before := len(h.through())
	h.buildsOnMac(name, user)
	// It is written down after it was told of.
	var callers []string
	h.eventually("a build went through nix-dispatchd: "+name, func() bool {
		callers = h.through()
		return len(callers) == before+1
	})
	// Though it is nix-daemon that asks, it is known for whom.
	if callers[0] != user {
		h.t.Errorf("%s: the build is said to be %s's, want %s's", name, callers[0], user)
	}
}

// buildsWithout checks that Nix builds with its own hook.
func (h *packagedHost) buildsWithout(name, user string) {
	h.t.Helper()
	_, err := h.run("test", "-e", "/usr/bin/nix-dispatch")
	installed, before := err == nil, 0
	if installed {
		before = len(h.through())
	}
	h.buildsOnMac(name, user)
	if installed && len(h.through()) != before {
		h.t.Errorf("%s: a build went through nix-dispatchd, which is not switched on", name)
	}
}

func (h *packagedHost) buildsOnMac(name, user string) {
	h.t.Helper()
	expr := shell(h.Name()+"-"+name, "echo > $out", "")
	out, err := h.RunAs(h.t.Context(), user, "nix-build", "--no-out-link", "--expr", expr)
	if err != nil || builtOn(out.Stderr)["ssh://root@mac"] != 1 {
		h.t.Fatalf("%s: nix-build as %s: %v\n%s", name, user, err, out.Stderr)
	}
}

// runningBuilds are those of one nix-build.
type runningBuilds struct {
	name string
	want int
	out  func() fleet.Output
	done chan error
}

// startBuilds starts that many builds, and returns when some are in progress, which
// they stay until end.
func (h *packagedHost) startBuilds(name string, n int) *runningBuilds {
	h.t.Helper()
	b := &runningBuilds{name: name, want: n, done: make(chan error, 1)}
	expr := "["
	for i := range n {
		expr += shell(fmt.Sprintf("%s-%s-%d", h.Name(), name, i),
			"until test -e "+h.gate(name)+"; do sleep 1; done; echo > $out", "")
	}
	expr += "]"
	cmd := h.Command(h.t.Context(), "alice", "nix-build", "--no-out-link", "--keep-going", "--expr", expr)
	var stdout, stderr syncBuffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	b.out = func() fleet.Output { return fleet.Output{Stdout: stdout.String(), Stderr: stderr.String()} }
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	go func() { b.done <- cmd.Wait() }()
	h.eventually("builds are in progress", func() bool {
		out, err := h.run("nix-dispatch", "status", "--json")
		return err == nil && strings.Contains(out, `"phase": "building"`)
	})
	return b
}

// gate is the file on mac that the builds of that name wait for.
func (h *packagedHost) gate(name string) string { return "/var/tmp/gate-" + h.Name() + "-" + name }

// end has all of them end.
func (b *runningBuilds) end(h *packagedHost) {
	h.t.Helper()
	if err := h.mac.WriteFile(h.gate(b.name), nil, 0o644); err != nil {
		h.t.Fatal(err)
	}
	err := <-b.done
	out := b.out()
	paths := strings.Fields(out.Stdout)
	if err != nil || len(paths) != b.want {
		h.t.Fatalf("%s: %d of %d builds, %v\n%s", b.name, len(paths), b.want, err, out.Stderr)
	}
	h.mustRun(append([]string{"nix-store", "--verify-path"}, paths...)...)
}
