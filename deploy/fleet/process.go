package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A process names one process for good: the pid alone may come back as another.
// The zero process never runs.
type process struct {
	PID   int
	Start string // field 22 of /proc/PID/stat: when it started, in clock ticks
}

// identify returns the process that has pid now.
func identify(pid int) (process, error) {
	stat, err := readStat(pid)
	if err != nil {
		return process{}, err
	}
	return process{PID: pid, Start: stat.start}, nil
}

// alive reports whether the process runs (or is stopped); a zombie does not.
func (p process) alive() bool {
	if p.PID == 0 {
		return false
	}
	stat, err := readStat(p.PID)
	return err == nil && stat.start == p.Start && stat.state != 'Z' && stat.state != 'X'
}

// signal sends sig to the process. It is no error if the process is gone.
func (p process) signal(sig unix.Signal) error {
	if p.PID == 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	// The descriptor pins whoever has the pid: look who that is only now.
	if !p.alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("send %v to process %d: %w", sig, p.PID, err)
	}
	return nil
}

// waitGone waits until the process has ended.
func (p process) waitGone(ctx context.Context) error {
	return poll(ctx, fmt.Sprintf("process %d to end", p.PID), func() (bool, error) { return !p.alive(), nil })
}

// patience bounds each wait for something that takes no time on an idle machine: it
// only has to be longer than that takes on any busy one.
const patience = 2 * time.Minute

// poll calls done until it returns true or an error, or ctx ends: soon at first,
// then less and less often, for many look through all of /proc. what says what is
// waited for.
func poll(ctx context.Context, what string, done func() (bool, error)) error {
	pause := 2 * time.Millisecond
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		timer.Reset(pause)
		select {
		case <-timer.C:
			pause = min(pause*3/2, 50*time.Millisecond)
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, ctx.Err())
		}
	}
}

type procStat struct {
	state  byte
	parent int
	start  string
}

func readStat(pid int) (procStat, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return procStat{}, err
	}
	// The command name, in parentheses, may hold anything.
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return procStat{}, fmt.Errorf("/proc/%d/stat is too short: %q", pid, text)
	}
	parent, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return procStat{}, fmt.Errorf("/proc/%d/stat: parent %q: %w", pid, fields[1], err)
	}
	return procStat{state: fields[0][0], parent: parent, start: string(fields[19])}, nil
}

// pids returns every process this process sees.
func pids() []int {
	names, _ := filepath.Glob("/proc/[0-9]*")
	out := make([]int, 0, len(names))
	for _, name := range names {
		if pid, err := strconv.Atoi(filepath.Base(name)); err == nil {
			out = append(out, pid)
		}
	}
	return out
}

// namespace returns the identity of a process's namespace of a kind (a file name
// in /proc/PID/ns), "" if the process is gone.
func namespace(pid int, kind string) string {
	id, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	return id
}

// A starter starts processes from one thread that lives as long as it does:
// Pdeathsig kills a child when the thread that made it ends, which need not be
// when the process ends.
type starter struct {
	detached bool
	calls    chan func()
	closed   chan struct{}
	once     sync.Once
}

func newStarter(detached bool) *starter {
	s := &starter{detached: detached, calls: make(chan func()), closed: make(chan struct{})}
	go s.run()
	return s
}

// start starts cmd in new namespaces (CLONE_NEW... flags) and returns it as a
// process. Someone waits for it, so that it never stays a zombie.
func (s *starter) start(cmd *exec.Cmd, namespaces uintptr) (process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Setsid: true}
	if !s.detached {
		cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	}
	started := make(chan error, 1)
	select {
	case s.calls <- func() { started <- cmd.Start() }:
	case <-s.closed:
		return process{}, errors.New("the fleet is closed")
	}
	if err := <-started; err != nil {
		return process{}, err
	}
	p, err := identify(cmd.Process.Pid)
	go cmd.Wait() // ends with the process
	return p, err
}

func (s *starter) run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for {
		select {
		case call := <-s.calls:
			call()
		case <-s.closed:
			return
		}
	}
}

// close ends the thread. Everything it started must have ended: nothing may be
// started from here on.
func (s *starter) close() { s.once.Do(func() { close(s.closed) }) }
