package fleet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	daemonSocket = "/nix/var/nix/daemon-socket/socket"
	daemonPID    = "/run/nix-daemon.pid"
	daemonLog    = "/var/log/nix-daemon.log"
)

func nixConf(c HostConfig) string {
	var b strings.Builder
	b.WriteString("build-users-group = nixbld\nsandbox = false\nsubstituters =\nexperimental-features = nix-command\n")
	trusted := "root"
	if c.NixTrusted {
		trusted += " nix"
	}
	fmt.Fprintf(&b, "trusted-users = %s\n", trusted)
	if c.SystemFeatures != nil {
		fmt.Fprintf(&b, "system-features = %s\n", strings.Join(c.SystemFeatures, " "))
	}
	return b.String() + c.NixConf + "\n"
}

// nixDaemonScript is shell text that starts nix-daemon in the background.
func nixDaemonScript(d NixDaemon) string {
	words := []string{"setsid", "env", "-i"}
	for _, v := range append([]string{"PATH=" + hostPath, "HOME=/root", "LANG=C.UTF-8"}, d.Env...) {
		words = append(words, shellQuote(v))
	}
	words = append(words, "nix-daemon")
	for _, v := range d.Args {
		words = append(words, shellQuote(v))
	}
	return fmt.Sprintf("rm -f %s\n%s </dev/null >>%s 2>&1 &\necho $! >%s\n",
		daemonSocket, strings.Join(words, " "), daemonLog, daemonPID)
}

// shellQuote makes one word of sh(1) out of s.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// StartNixDaemon starts nix-daemon as last configured and waits until it answers.
// It does nothing if it runs.
func (h *Host) StartNixDaemon(ctx context.Context) error {
	pid, err := h.nixDaemonPID()
	if err != nil {
		return err
	}
	if pid != 0 {
		return nil
	}
	if _, err := h.Run(ctx, "sh", "-c", nixDaemonScript(h.snapshot().Config.NixDaemon)); err != nil {
		return fmt.Errorf("start nix-daemon: %w", err)
	}
	return h.waitNixDaemon(ctx, h.snapshot().Init)
}

// StopNixDaemon ends nix-daemon; as with systemd's unit, the processes that serve
// open connections stay. It does nothing if none runs.
func (h *Host) StopNixDaemon(ctx context.Context) error {
	pid, err := h.nixDaemonPID()
	if err != nil || pid == 0 {
		return err
	}
	if _, err := h.Run(ctx, "kill", strconv.Itoa(pid)); err != nil {
		return fmt.Errorf("stop nix-daemon: %w", err)
	}
	return poll(ctx, "nix-daemon of "+h.name+" to end", func() (bool, error) {
		pid, err := h.nixDaemonPID()
		return pid == 0, err
	})
}

// RestartNixDaemon stops nix-daemon and starts it in another way, which also holds
// for later boots. nix.conf is read anew.
func (h *Host) RestartNixDaemon(ctx context.Context, d NixDaemon) error {
	if err := h.StopNixDaemon(ctx); err != nil {
		return err
	}
	h.change(func() { h.config.NixDaemon, h.config.NoDaemon = d, false })
	return errors.Join(h.StartNixDaemon(ctx), h.fleet.save())
}

// nixDaemonPID is the process id in the host, 0 if nix-daemon does not run.
func (h *Host) nixDaemonPID() (int, error) {
	text, err := h.ReadFile(daemonPID)
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("%s on host %s: %w", daemonPID, h.name, err)
	}
	cmdline, err := h.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !strings.Contains(string(cmdline), "nix-daemon") {
		return 0, nil // it has ended; a zombie's command line is empty
	}
	return pid, nil
}

func (h *Host) waitNixDaemon(ctx context.Context, init process) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := poll(ctx, "nix-daemon of "+h.name+" to answer", func() (bool, error) {
		if !init.alive() {
			return false, ErrOff
		}
		c, err := net.Dial("unix", fmt.Sprintf("/proc/%d/root%s", init.PID, daemonSocket))
		if err != nil {
			return false, nil
		}
		return true, c.Close()
	})
	if err != nil {
		log, _ := h.ReadFile(daemonLog)
		return fmt.Errorf("%w: %s", err, tail(log, 1000))
	}
	return nil
}
