package integration

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// A systemdHost is a host whose process 1 is systemd and whose nix-daemon is
// Debian's service.
type systemdHost struct {
	*fleet.Host
	t *testing.T
}

func newFleet(t *testing.T) *fleet.Fleet {
	t.Helper()
	fleet.Require(t)
	f, err := fleet.New(t.Context(), fleet.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("close the fleet: %v", err)
		}
	})
	return f
}

func bootSystemd(t *testing.T, f *fleet.Fleet, suite string) *systemdHost {
	t.Helper()
	h, err := f.Host(t.Context(), fleet.HostConfig{Name: "client-" + suite, Suite: suite, Systemd: true, NixConf: "max-jobs = 0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := h.Run(context.Background(), "journalctl", "--no-pager", "-n", "200", "-u", "nix-dispatchd", "-u", "nix-daemon")
			t.Logf("journal of %s:\n%s", h.Name(), out.Stdout)
		}
	})
	return &systemdHost{h, t}
}

func (h *systemdHost) eventually(what string, ok func() bool) {
	h.t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			h.t.Fatalf("after a minute it is not so that %s", what)
		}
	}
}

// run runs a command there, and returns all it prints.
func (h *systemdHost) run(argv ...string) (string, error) {
	out, err := h.Run(h.t.Context(), argv...)
	return out.Stdout + out.Stderr, err
}

func (h *systemdHost) mustRun(argv ...string) string {
	h.t.Helper()
	out, err := h.run(argv...)
	if err != nil {
		h.t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// script runs a shell script there.
func (h *systemdHost) script(text string) string {
	h.t.Helper()
	return h.mustRun("sh", "-ec", text)
}

// install has make install and the daemon's list done.
func (h *systemdHost) install() {
	h.t.Helper()
	bin, err := binaries()
	if err != nil {
		h.t.Fatal(err)
	}
	cmd := exec.Command("../install.sh", "install", bin, "/usr/local", h.Root())
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("install.sh: %v\n%s", err, out)
	}
	h.mustRun("systemd-sysusers")
	h.machines("ssh://mac x86_64-linux - 2")
	h.mustRun("systemctl", "daemon-reload")
}

// uninstall does what make uninstall does.
func (h *systemdHost) uninstall() {
	h.t.Helper()
	script, err := os.ReadFile("../install.sh")
	if err != nil {
		h.t.Fatal(err)
	}
	h.write("/root/src/deploy/install.sh", string(script))
	h.mustRun("sh", "/root/src/deploy/install.sh", "uninstall", "bin", "/usr/local", "")
	h.mustRun("rm", "-r", "/root/src")
}

func (h *systemdHost) write(name, text string) {
	h.t.Helper()
	h.mustRun("mkdir", "-p", filepath.Dir(name))
	if err := h.WriteFile(name, []byte(text), 0o644); err != nil {
		h.t.Fatal(err)
	}
}

func (h *systemdHost) machines(lines string) { h.write("/etc/nix/machines", lines+"\n") }

// listed tells whether the daemon answers and has the machine.
func (h *systemdHost) listed(uri string) bool {
	out, err := h.run("nix-dispatch", "status")
	return err == nil && strings.Contains(out, uri)
}

// property is one of the service's.
func (h *systemdHost) property(name string) string {
	h.t.Helper()
	return strings.TrimSpace(h.mustRun("systemctl", "show", "--value", "-p", name, "nix-dispatchd"))
}
