package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// makeTemp makes the directory that the commands have as TMPDIR. Its name is short,
// for sockets are made in it, and it is for all users, as /tmp is.
func makeTemp() (string, error) {
	for {
		dir := filepath.Join(os.TempDir(), fmt.Sprintf("t%05d", rand.IntN(100_000)))
		err := os.Mkdir(dir, 0o700)
		if os.IsExist(err) {
			continue
		}
		if err == nil {
			err = os.Chmod(dir, os.ModeSticky|0o777)
		}
		return dir, err
	}
}

// A family knows which children of this process are commands, and not orphans.
type family struct {
	mu   sync.Mutex
	pids map[int]bool
}

var commands = family{pids: make(map[int]bool)}

func (f *family) start(cmd *exec.Cmd) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := cmd.Start()
	if err == nil {
		f.pids[cmd.Process.Pid] = true
	}
	return err
}

// waitForOrphans waits for orphans that have ended, until stop is called, so that they
// are not there as zombies for tests that look.
func (f *family) waitForOrphans() (stop func()) {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGCHLD)
	var waiting sync.WaitGroup
	waiting.Go(func() {
		for range ended {
			f.mu.Lock()
			for _, pid := range children() {
				if !f.pids[pid] {
					_, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil) // it may still run
				}
			}
			f.mu.Unlock()
		}
	})
	return func() {
		signal.Stop(ended)
		close(ended)
		waiting.Wait()
	}
}

// killOrphans kills what the commands have left running, and says what that was. All
// commands have been waited for, so whatever is a child of this process is an orphan.
func killOrphans(out io.Writer) {
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		orphans := children()
		if len(orphans) == 0 {
			return
		}
		for _, pid := range orphans {
			// A zombie, which only has to be waited for, has no command line.
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if text := strings.TrimSpace(strings.ReplaceAll(string(line), "\x00", " ")); text != "" {
				fmt.Fprintf(out, "killed, because it was left running: %s\n", text)
			}
			_ = syscall.Kill(pid, syscall.SIGKILL)               // it may have ended
			_, _ = syscall.Wait4(pid, nil, syscall.WNOHANG, nil) // else in the next round
		}
		if time.Now().After(end) {
			fmt.Fprintf(out, "left running, because a kill does not end them: processes %v\n", orphans)
			return
		}
	}
}

// children are the processes whose parent this one is.
func children() (pids []int) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, stat := range stats {
		text, _ := os.ReadFile(stat) // it may have ended
		// The name, in parentheses, may hold anything; the state and the parent follow.
		fields := strings.Fields(string(text[strings.LastIndex(string(text), ")")+1:]))
		if len(fields) < 2 || fields[1] != strconv.Itoa(os.Getpid()) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(stat))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
