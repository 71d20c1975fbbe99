package integration

import (
	"bytes"
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

// A systemdHost is a copy of this host with a systemd of its own as process 1.
type systemdHost struct {
	t   *testing.T
	pid string // of its process 1
}

// bootSystemd starts one, for the test's time. Its network leads nowhere.
func bootSystemd(t *testing.T) *systemdHost {
	t.Helper()
	fleet.Require(t)
	for _, program := range []string{"systemctl", "unshare", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatal(err)
		}
	}
	script, err := filepath.Abs("testdata/boot-systemd.sh")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--net", "--cgroup",
		"sh", script, t.TempDir())
	var console syncBuffer
	cmd.Stdout, cmd.Stderr = &console, &console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // process 1 and all its namespace go with it
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("console:\n%s", console.String())
		}
	})
	h := &systemdHost{t: t}
	h.eventually("systemd is up", func() bool {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
		h.pid = strings.TrimSpace(string(children))
		if err != nil || h.pid == "" {
			return false
		}
		state, _ := h.run("systemctl", "is-system-running")
		return strings.HasPrefix(state, "running") || strings.HasPrefix(state, "degraded")
	})
	return h
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
	cmd := exec.Command("nsenter", append([]string{"-t", h.pid, "-m", "-p", "-u", "-i", "-n", "--"}, argv...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

func (h *systemdHost) mustRun(argv ...string) string {
	h.t.Helper()
	out, err := h.run(argv...)
	if err != nil {
		h.t.Fatalf("%q: %v\n%s", argv, err, out)
	}
	return out
}

// install puts the programs and units where an administrator would.
func (h *systemdHost) install() {
	h.t.Helper()
	bin, err := binaries()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, program := range []string{"nix-dispatchd", "nix-dispatch"} {
		h.put("/usr/local/bin/"+program, filepath.Join(bin, program), "755")
	}
	for _, unit := range []string{"nix-dispatchd.service", "nix-dispatchd.socket"} {
		h.put("/etc/systemd/system/"+unit, "../systemd/"+unit, "644")
	}
	h.put("/etc/sysusers.d/nix-dispatch.conf", "../systemd/nix-dispatch.sysusers", "644")
	h.mustRun("systemd-sysusers")
	h.machines("ssh://mac x86_64-linux - 2")
	h.mustRun("systemctl", "daemon-reload")
}

// put copies a file of this host there.
func (h *systemdHost) put(name, from, mode string) {
	h.t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		h.t.Fatal(err)
	}
	h.write(name, data)
	h.mustRun("chmod", mode, name)
}

func (h *systemdHost) write(name string, data []byte) {
	h.t.Helper()
	h.mustRun("mkdir", "-p", filepath.Dir(name))
	cmd := exec.Command("nsenter", "-t", h.pid, "-m", "--", "sh", "-c", `cat >"$0"`, name)
	cmd.Stdin = bytes.NewReader(data)
	if out, err := cmd.CombinedOutput(); err != nil {
		h.t.Fatalf("write %s: %v\n%s", name, err, out)
	}
}

func (h *systemdHost) machines(lines string) { h.write("/etc/nix/machines", []byte(lines+"\n")) }

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

// TestUnderSystemd runs the service as it is installed.
func TestUnderSystemd(t *testing.T) {
	t.Parallel()
	h := bootSystemd(t)
	h.install()
	h.mustRun("systemctl", "enable", "--now", "nix-dispatchd.socket")
	if got := h.mustRun("stat", "-c", "%a %U %G", "/run/nix-dispatch/socket"); got != "660 root nix-dispatch\n" {
		t.Errorf("socket: %s", got)
	}
	if state := h.property("ActiveState"); state != "inactive" {
		t.Errorf("before anybody asks the daemon is %s", state)
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
	if log := h.mustRun("journalctl", "-u", "nix-dispatchd", "--no-pager"); !strings.Contains(log, `found "four"`) {
		t.Errorf("the journal does not say what is wrong:\n%s", log)
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
	h.runsUserUnits()
}

// runsUserUnits has a user's own systemd run a user's own daemon.
func (h *systemdHost) runsUserUnits() {
	h.t.Helper()
	h.mustRun("useradd", "--create-home", "--uid", "4711", "carol")
	h.mustRun("install", "-d", "-o", "carol", "-m", "700", "/run/user/4711")
	for _, unit := range []string{"nix-dispatchd.service", "nix-dispatchd.socket"} {
		h.put("/etc/systemd/user/"+unit, "../systemd/user/"+unit, "644")
	}
	h.write("/home/carol/.config/nix/nix.conf", []byte("builders = ssh://carols x86_64-linux - 2\n"))
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
	h := bootSystemd(t)
	h.install()
	h.write("/etc/systemd/system/nix-dispatchd.service.d/quick.conf", []byte("[Service]\nWatchdogSec=3\n"))
	h.mustRun("systemctl", "daemon-reload")
	h.mustRun("systemctl", "start", "nix-dispatchd")
	time.Sleep(5 * time.Second) // longer than the watchdog's time: it tells, else this would restart it
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
