package fleet

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed host.sh
var hostScript string

// Boot starts a host that is off, with all that was on its disk. It does nothing
// if the host is on.
func (h *Host) Boot(ctx context.Context) error {
	h.powerMu.Lock()
	defer h.powerMu.Unlock()
	if h.On() {
		return nil
	}
	err := h.boot(ctx)
	if err != nil {
		console, _ := os.ReadFile(h.console())
		err = fmt.Errorf("boot host %s: %w; its console: %s", h.name, err, tail(console, 2000))
	}
	return errors.Join(err, h.fleet.save())
}

func (h *Host) console() string { return filepath.Join(h.dir, "console.log") }

func (h *Host) boot(ctx context.Context) error {
	config := h.snapshot().Config
	console, err := os.Create(h.console())
	if err != nil {
		return err
	}
	defer console.Close()
	// The host waits for its files on this pipe, so they also say that its
	// network is there.
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer w.Close()
	lower := h.base
	if h.layer != "" {
		lower = h.layer + ":" + h.base
	}
	args := []string{"-c", hostScript, "host.sh", lower, h.dir, h.name, h.initScript()}
	for to, from := range config.Binds {
		args = append(args, from, to)
	}
	cmd := exec.Command("/bin/sh", args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = r, console, console
	cmd.Env = []string{}
	h.fleet.disconnect(ctx, h) // what the last boot may have left
	init, err := h.fleet.starter.start(cmd, hostNamespaces)
	r.Close()
	if err != nil {
		return err
	}
	h.change(func() { h.init, h.cut, h.frozen = init, false, false })
	if err := h.fleet.connect(ctx, h, init); err != nil {
		return errors.Join(err, h.kill(context.WithoutCancel(ctx)))
	}
	files, err := tarOf(h.bootFiles())
	if err == nil {
		_, err = w.Write(files)
	}
	if err == nil {
		err = w.Close()
	}
	if err == nil {
		err = h.waitSSHD(ctx, init)
	}
	if err == nil && !config.NoDaemon {
		err = h.waitNixDaemon(ctx, init)
	}
	if err != nil {
		return errors.Join(err, h.kill(context.WithoutCancel(ctx)))
	}
	return nil
}

// idle is what a host's first process waits for.
const idle = "sleep 99999d"

// initScript is what runs in the finished root, as process 1: it takes its files
// from stdin, starts the services, and then only collects orphans.
func (h *Host) initScript() string {
	c := h.snapshot().Config
	script := "set -e\ntar -xpf - -C /\nexec </dev/null\nmkdir -p /run/sshd /var/log\n" +
		"/usr/sbin/sshd -E " + sshdLog + "\n"
	if c.Systemd {
		return script + h.runSystemd()
	}
	if !c.NoDaemon {
		script += nixDaemonScript(c.NixDaemon)
	}
	return script + "set +e\nwhile :; do " + idle + " & wait $!; done\n"
}

// Kill turns the host off at once, as by pulling its plug: nobody it talked to
// hears of it. What is on its disk stays. It does nothing if the host is off.
func (h *Host) Kill(ctx context.Context) error {
	h.powerMu.Lock()
	defer h.powerMu.Unlock()
	if h.snapshot().Init == (process{}) {
		return nil
	}
	err := h.kill(ctx)
	if err != nil {
		err = fmt.Errorf("kill host %s: %w", h.name, err)
	}
	return errors.Join(err, h.fleet.save())
}

func (h *Host) kill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	init, mounts := h.snapshot().Init, ""
	if init.alive() {
		// Held open: the kernel gives the number of a namespace that is gone to the
		// next one made.
		if held, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", init.PID)); err == nil {
			defer held.Close()
			mounts = namespace(init.PID, "mnt")
		}
	}
	// The cable first: dying processes would close their connections properly.
	h.fleet.disconnect(ctx, h)
	if err := killHost(ctx, init); err != nil {
		return err
	}
	h.change(func() { h.init, h.cut, h.frozen = process{}, false, false })
	if h.snapshot().Config.Systemd {
		if err := removeCgroups(h.cgroup()); err != nil {
			return err
		}
	}
	if mounts == "" {
		return nil
	}
	// Commands that were entering the host hold its mounts a moment longer.
	return poll(ctx, "the mounts of host "+h.name+" to go", func() (bool, error) {
		for _, pid := range pids() {
			if namespace(pid, "mnt") == mounts {
				return false, nil
			}
		}
		return true, nil
	})
}

// killHost kills a host's first process, and with it all of its processes, and
// waits until they are gone.
func killHost(ctx context.Context, init process) error {
	if !init.alive() {
		return nil
	}
	inside := namespace(init.PID, "pid")
	if err := init.signal(unix.SIGKILL); err != nil {
		return err
	}
	return poll(ctx, "the host's processes to end", func() (bool, error) {
		if !init.alive() {
			return true, nil
		}
		return false, wake(entrances(inside))
	})
}

// CutOff drops all packets from and to the host, silently: nobody gets a reset, and
// the host's interface stays up.
func (h *Host) CutOff(ctx context.Context) error { return h.setCut(ctx, true) }

// Restore ends CutOff.
func (h *Host) Restore(ctx context.Context) error { return h.setCut(ctx, false) }

func (h *Host) setCut(ctx context.Context, cut bool) error {
	h.powerMu.Lock()
	defer h.powerMu.Unlock()
	if !h.On() {
		return fmt.Errorf("cut off or restore host %s: %w", h.name, ErrOff)
	}
	if err := h.fleet.setPort(ctx, h, !cut); err != nil {
		return fmt.Errorf("cut off or restore host %s: %w", h.name, err)
	}
	h.change(func() { h.cut = cut })
	return h.fleet.save()
}

// Freeze stops every process of the host (SIGSTOP): it answers nothing any more,
// though its kernel still accepts connections.
func (h *Host) Freeze(ctx context.Context) error { return h.setFrozen(ctx, true) }

// Thaw ends Freeze. Processes that a test stopped itself go on as well.
func (h *Host) Thaw(ctx context.Context) error { return h.setFrozen(ctx, false) }

func (h *Host) setFrozen(ctx context.Context, freeze bool) error {
	h.powerMu.Lock()
	defer h.powerMu.Unlock()
	err := h.stopOrContinue(ctx, freeze)
	if err != nil {
		return fmt.Errorf("freeze or thaw host %s: %w", h.name, err)
	}
	h.change(func() { h.frozen = freeze })
	return h.fleet.save()
}

func (h *Host) stopOrContinue(ctx context.Context, stop bool) error {
	init := h.snapshot().Init
	inside := namespace(init.PID, "pid")
	if !stop {
		return errors.Join(h.signalAll(ctx, "-CONT"), init.signal(unix.SIGCONT), wake(entrances(inside)))
	}
	if err := errors.Join(h.signalAll(ctx, "-STOP"), init.signal(unix.SIGSTOP)); err != nil {
		return err
	}
	// A command that was just entering the host came too late to be stopped.
	for range 10 {
		if waitStopped(ctx, inside) == nil {
			return nil
		}
		if err := h.signalAll(ctx, "-STOP"); err != nil {
			return err
		}
	}
	return waitStopped(ctx, inside)
}

// signalAll signals every process of the host but its first.
func (h *Host) signalAll(ctx context.Context, option string) error {
	// -1 inside the pid namespace reaches all at once, so none can start another
	// meanwhile.
	cmd, err := h.enter(ctx, "/bin/sh", "-c", "kill "+option+" -1")
	if err != nil {
		return err
	}
	// With no other process there, kill has nobody to signal.
	if out, err := cmd.CombinedOutput(); err != nil && !bytes.Contains(out, []byte("No such process")) {
		return fmt.Errorf("%w: %s", err, tail(out, 300))
	}
	return nil
}

// entrances are the nsenter processes of Command into a pid namespace. They are
// outside it, stop themselves when what they started is stopped, and have to
// collect what they started before the namespace can end.
func entrances(inside string) []process {
	var out []process
	for _, pid := range pids() {
		if namespace(pid, "pid_for_children") != inside || namespace(pid, "pid") == inside {
			continue
		}
		if p, err := identify(pid); err == nil { // else it ended meanwhile
			out = append(out, p)
		}
	}
	return out
}

func wake(all []process) error {
	var errs []error
	for _, p := range all {
		errs = append(errs, p.signal(unix.SIGCONT))
	}
	return errors.Join(errs...)
}

// waitStopped waits until all entrances have stopped, so that a later wake reaches
// every one of them.
func waitStopped(ctx context.Context, inside string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return poll(ctx, "commands to stop", func() (bool, error) {
		for _, p := range entrances(inside) {
			stat, err := readStat(p.PID)
			if err != nil || stat.state == 'T' {
				continue
			}
			if started := children(p.PID); len(started) > 0 && !slices.ContainsFunc(started, inVfork) {
				return false, nil
			}
		}
		return true, nil
	})
}

// inVfork tells whether a process waits for a child of its vfork that was stopped
// before it executed its program. It takes no signal before that, and so neither
// stops nor has its entrance stop, but can do nothing either until its host thaws.
func inVfork(p process) bool {
	stat, err := readStat(p.PID)
	return err == nil && stat.state == 'D' && slices.ContainsFunc(children(p.PID), func(c process) bool {
		stat, err := readStat(c.PID)
		return err == nil && stat.state == 'T'
	})
}
