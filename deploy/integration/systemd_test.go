package integration

import (
	"os/exec"
	"strings"
	"testing"

	"nixdispatch/deploy/fleet"
)

// TestUnderSystemd runs the service as it is installed.
func TestUnderSystemd(t *testing.T) {
	t.Parallel()
	h := bootSystemd(t, newFleet(t), fleet.Bookworm)
	h.install()
	h.mustRun("systemctl", "enable", "--now", "nix-dispatchd.socket")
	if got := h.mustRun("stat", "-c", "%a %U %G", "/run/nix-dispatch/socket"); got != "660 root nix-dispatch\n" {
		t.Errorf("socket: %s", got)
	}
	if state := h.property("ActiveState"); state != "inactive" {
		t.Errorf("before anybody asks the daemon is %s", state)
	}
	h.mustRun("systemd-tmpfiles", "--create", "nix-dispatch.conf")
	if got := h.mustRun("stat", "-c", "%a %U %G", "/run/nix-dispatch", "/var/lib/nix-dispatch"); got != "755 root root\n700 root root\n" {
		t.Errorf("directories: %s", got)
	}
	// The first question starts it.
	if out := h.mustRun("nix-dispatch", "status"); !strings.Contains(out, "ssh://mac") {
		t.Errorf("status: %s", out)
	}
	h.eventually("systemd knows that it is ready", func() bool { return h.property("ActiveState") == "active" })

	h.machines("ssh://mac x86_64-linux - four")
	if out, err := h.run("systemctl", "reload", "nix-dispatchd"); err == nil {
		t.Errorf("a reload of a broken list succeeds: %s", out)
	}
	if log := h.mustRun("journalctl", "-u", "nix-dispatchd", "--no-pager"); !strings.Contains(log, `found "four"`) || !strings.Contains(log, "msg=ready") {
		t.Errorf("the journal does not say what is wrong:\n%s", log)
	}
	if log := h.mustRun("journalctl", "-u", "nix-dispatchd", "--no-pager", "-p", "warning"); !strings.Contains(log, "level=") || strings.Contains(log, "level=INFO") {
		t.Errorf("the journal does not know what is a warning:\n%s", log)
	}
	h.machines("ssh://kitty x86_64-linux - 2")
	h.mustRun("systemctl", "reload", "nix-dispatchd")
	if !h.listed("ssh://kitty") {
		t.Error("the new list is not in use after a reload")
	}

	// Whatever becomes of the daemon, whoever asks is answered.
	h.mustRun("kill", "-KILL", h.property("MainPID"))
	h.eventually("it answers after kill -9", func() bool { return h.listed("ssh://kitty") })
	h.mustRun("systemctl", "restart", "nix-dispatchd")
	if !h.listed("ssh://kitty") {
		t.Error("no answer right after a restart")
	}
	h.mustRun("systemctl", "stop", "nix-dispatchd.service")
	if !h.listed("ssh://kitty") {
		t.Error("a question does not start the stopped daemon")
	}
	h.buildsOnItself()
	h.runsUserUnits()
	h.isUninstalled()
}

// buildsOnItself has a machine build inside the unit, which for that must not be
// hardened.
func (h *systemdHost) buildsOnItself() {
	h.t.Helper()
	h.script(`printf 'sandbox-paths = /bin /usr /lib /lib64\nmax-jobs = 1\n' >>/etc/nix/nix.conf`)
	h.machines("ssh://localhost?remote-store=/srv/other x86_64-linux - 2")
	h.mustRun("systemctl", "reload", "nix-dispatchd")
	h.eventually("the hardened unit keeps it from writing", func() bool { return h.listed("Read-only file system") })
	h.script(`mkdir -p /etc/systemd/system/nix-dispatchd.service.d
		cp /usr/local/share/doc/nix-dispatch/examples/builds-on-this-host.conf /etc/systemd/system/nix-dispatchd.service.d/
		systemctl daemon-reload
		systemctl restart nix-dispatchd`)
	h.write("/tmp/here.nix", shell("here", "echo here > $out", ""))
	h.mustRun("sh", "-ec", "nix-dispatch build $(nix-instantiate /tmp/here.nix)")
	h.mustRun("rm", "-r", "/etc/systemd/system/nix-dispatchd.service.d")
	h.mustRun("systemctl", "daemon-reload")
}

// isUninstalled has all taken away again, while the hook is switched on.
func (h *systemdHost) isUninstalled() {
	h.t.Helper()
	h.mustRun("nix-dispatch", "enable")
	h.mustRun("grep", "-r", "nix-dispatch-hook", "/root/.config/nix")
	h.uninstall()
	if out, err := h.run("grep", "-r", "nix-dispatch", "/etc/nix", "/root/.config"); err == nil {
		h.t.Errorf("left in the configuration: %s", out)
	}
	if left := h.script("find /usr/local -name '*nix-dispatch*' -not -type d"); left != "" {
		h.t.Errorf("left behind: %s", left)
	}
	if out, err := h.run("pgrep", "-u", "root", "nix-dispatchd"); err == nil {
		h.t.Errorf("the daemon still runs: %s", out)
	}
	h.mustRun("nix-build", "--no-out-link", "--max-jobs", "1", "--builders", "", "--expr", shell("alone", "echo > $out", ""))
}

// runsUserUnits has a user's own systemd run a user's own daemon.
func (h *systemdHost) runsUserUnits() {
	h.t.Helper()
	h.mustRun("useradd", "--create-home", "--uid", "4711", "carol")
	h.mustRun("install", "-d", "-o", "carol", "-m", "700", "/run/user/4711")
	h.write("/home/carol/.config/nix/nix.conf", "builders = ssh://carols x86_64-linux - 2\n")
	h.mustRun("systemd-run", "--unit=carols", "-p", "User=carol", "-p", "Delegate=yes",
		"-p", "Environment=XDG_RUNTIME_DIR=/run/user/4711", "/lib/systemd/systemd", "--user")
	carol := func(argv ...string) (string, error) {
		return h.run(append([]string{"setpriv", "--reuid=carol", "--regid=carol", "--init-groups",
			"env", "HOME=/home/carol", "XDG_RUNTIME_DIR=/run/user/4711"}, argv...)...)
	}
	h.eventually("the user's units can be started", func() bool {
		_, err := carol("systemctl", "--user", "start", "nix-dispatchd.socket")
		return err == nil
	})
	if out, err := carol("nix-dispatch", "status"); err != nil || !strings.Contains(out, "ssh://carols") {
		h.t.Errorf("the user's own daemon: %v, %s", err, out)
	}
	if out, err := carol("systemctl", "--user", "reload", "nix-dispatchd"); err != nil {
		h.t.Errorf("reload: %v, %s", err, out)
	}
	if got := h.mustRun("stat", "-c", "%a %U", "/run/user/4711/nix-dispatch/socket"); got != "600 carol\n" {
		h.t.Errorf("the user's socket: %s", got)
	}
}

// TestWatchdogOfSystemd stops the daemon's process, which then tells nothing.
func TestWatchdogOfSystemd(t *testing.T) {
	t.Parallel()
	h := bootSystemd(t, newFleet(t), fleet.Bookworm)
	h.install()
	h.write("/etc/systemd/system/nix-dispatchd.service.d/quick.conf", "[Service]\nWatchdogSec=12\n")
	h.mustRun("systemctl", "daemon-reload")
	h.mustRun("systemctl", "start", "nix-dispatchd")
	// systemd notes when the daemon last told that it is well.
	first := h.property("WatchdogTimestampMonotonic")
	h.eventually("it tells that it is well", func() bool { return h.property("WatchdogTimestampMonotonic") != first })
	if n := h.property("NRestarts"); n != "0" {
		t.Fatalf("restarted %s times though nothing was wrong", n)
	}
	h.mustRun("kill", "-STOP", h.property("MainPID"))
	h.eventually("it is restarted", func() bool { return h.property("NRestarts") == "1" && h.listed("ssh://mac") })
}

// TestHardening holds systemd's verdict on the unit.
func TestHardening(t *testing.T) {
	t.Parallel()
	fleet.Require(t)
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--threshold=30", "--no-pager", "../systemd/nix-dispatchd.service").CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze security: %v\n%s", err, out)
	}
	if _, verdict, ok := strings.Cut(string(out), "Overall exposure level"); ok {
		t.Logf("exposure level%s", verdict)
	}
}
