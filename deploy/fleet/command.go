package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const hostPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Command prepares a command in the host: in all its namespaces, as user, in the
// user's home directory, with a clean environment (append to Env to add to it).
// The caller wires stdin and output and starts it. When ctx ends or its Process is
// killed, the program inside is killed; what that started lives on, as it would
// on a real machine. Signal sends it other signals.
//
// A host that is off, or a broken one, shows in Start's error.
func (h *Host) Command(ctx context.Context, user string, argv ...string) *exec.Cmd {
	words := []string{
		"/usr/bin/setpriv", "--reuid", user, "--regid", user, "--init-groups", "--pdeathsig", "KILL",
		"/usr/bin/env", "-C", home(user),
	}
	cmd, err := h.enter(ctx, append(words, argv...)...)
	if err != nil {
		return &exec.Cmd{Path: "nsenter", Err: fmt.Errorf("run %q on host %s: %w", argv, h.name, err)}
	}
	cmd.Env = []string{"PATH=" + hostPath, "HOME=" + home(user), "USER=" + user, "LOGNAME=" + user, "LANG=C.UTF-8", "TERM=dumb"}
	return cmd
}

// enter prepares a command in all namespaces of the host, as root.
func (h *Host) enter(ctx context.Context, argv ...string) (*exec.Cmd, error) {
	init := h.snapshot().Init
	if !init.alive() {
		return nil, ErrOff
	}
	nsenter, err := findTool("nsenter")
	if err != nil {
		return nil, err
	}
	args := append([]string{"-t", strconv.Itoa(init.PID), "-m", "-u", "-i", "-n", "-p", "--"}, argv...)
	cmd := exec.CommandContext(ctx, nsenter, args...)
	cmd.Cancel = func() error {
		for _, p := range children(cmd.Process.Pid) {
			p.signal(unix.SIGKILL) //nolint:errcheck // nsenter's end kills it as well
		}
		return cmd.Process.Kill()
	}
	cmd.WaitDelay = 5 * time.Second
	return cmd, nil
}

// Signal sends a signal to the program of a started Command. Signalling its
// Process would reach the entrance to the host instead.
func (h *Host) Signal(cmd *exec.Cmd, sig syscall.Signal) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := poll(ctx, "the program to start", func() (bool, error) {
		inside := children(cmd.Process.Pid)
		if len(inside) == 0 {
			if p, err := identify(cmd.Process.Pid); err != nil || !p.alive() {
				return false, errors.New("it has ended")
			}
			return false, nil
		}
		var errs []error
		for _, p := range inside {
			errs = append(errs, p.signal(sig))
		}
		return true, errors.Join(errs...)
	})
	if err != nil {
		return fmt.Errorf("send %v to a command on host %s: %w", sig, h.name, err)
	}
	return nil
}

func children(parent int) []process {
	var out []process
	for _, pid := range pids() {
		if stat, err := readStat(pid); err == nil && stat.parent == parent {
			out = append(out, process{PID: pid, Start: stat.start})
		}
	}
	return out
}

// Output is what a command printed.
type Output struct {
	Stdout, Stderr string
}

// Run runs a command in the host as root and returns what it printed. Without
// success the error holds the end of that as well, and wraps *exec.ExitError.
func (h *Host) Run(ctx context.Context, argv ...string) (Output, error) {
	return h.RunAs(ctx, "root", argv...)
}

// RunAs is Run as another user of the host.
func (h *Host) RunAs(ctx context.Context, user string, argv ...string) (Output, error) {
	cmd := h.Command(ctx, user, argv...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	out := Output{Stdout: stdout.String(), Stderr: stderr.String()}
	if err == nil {
		return out, nil
	}
	if ctx.Err() != nil {
		err = errors.Join(ctx.Err(), err)
	}
	return out, fmt.Errorf("%s on host %s: %w: %s", strings.Join(argv, " "), h.name, err,
		tail([]byte(out.Stdout+out.Stderr), 4000))
}

// Processes are the command lines of the host's processes, words joined by
// spaces, in order of process ids; the host's own init is left out.
func (h *Host) Processes() ([]string, error) {
	names, err := h.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var ids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid != 1 {
			ids = append(ids, pid)
		}
	}
	sort.Ints(ids)
	var out []string
	for _, pid := range ids {
		text, err := h.ReadFile(path.Join("/proc", strconv.Itoa(pid), "cmdline"))
		line := strings.TrimSpace(strings.ReplaceAll(string(text), "\x00", " "))
		if err == nil && line != "" && line != idle { // a zombie's is empty
			out = append(out, line)
		}
	}
	return out, nil
}
