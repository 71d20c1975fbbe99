package main

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// rootsNix are the processes of Nix that run as root, by their directories in /proc
// and the times of their starts: those that have read root's configuration. The
// nix-daemon that only accepts connections is left out.
func (h *host) rootsNix() map[string]string {
	found := make(map[string]string)
	dirs, _ := filepath.Glob(h.proc + "/[0-9]*")
	for _, dir := range dirs {
		exe, err := os.Readlink(dir + "/exe")
		info, statErr := os.Stat(dir)
		if err != nil || statErr != nil {
			continue
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		exe = strings.TrimSuffix(path.Base(exe), " (deleted)")
		if !ok || int(st.Uid) != h.rootUID || exe != "nix" && !strings.HasPrefix(exe, "nix-") || strings.HasPrefix(exe, "nix-dispatch") {
			continue
		}
		if args, err := procStrings(dir + "/cmdline"); err != nil || acceptsConnections(args) {
			continue
		}
		found[dir] = started(dir)
	}
	return found
}

// acceptsConnections tells a nix-daemon that waits for clients from one that serves a
// client: that has the client's number in its arguments.
func acceptsConnections(args []string) bool {
	if len(args) == 0 || path.Base(args[0]) != "nix-daemon" || slices.Contains(args, "--stdio") {
		return false
	}
	return len(args) == 1 || args[1] == "" || args[1][0] < '0' || args[1][0] > '9'
}

// started is when a process started, in clock ticks; "" if it is gone.
func started(dir string) string {
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return ""
	}
	// The second field, in parentheses, may hold anything; this is the 22nd.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

// waitFor waits until processes are gone, for at most so long.
func (s *hookSwitch) waitFor(processes map[string]string, wait time.Duration) error {
	end := time.Now().Add(wait)
	told := false
	for {
		var left []string
		for dir, start := range processes {
			if start != "" && started(dir) == start {
				left = append(left, path.Base(dir))
			}
		}
		slices.Sort(left)
		switch {
		case len(left) == 0:
			return nil
		case wait == 0 || time.Now().After(end):
			fmt.Fprintf(s.out, "these processes of Nix began before, and use nix-dispatch until they end: %s\n", strings.Join(left, " "))
			return nil
		case !told:
			told = true
			fmt.Fprintf(s.out, "waiting for these processes of Nix, which began before, to end, at most %v: %s\n", wait, strings.Join(left, " "))
		}
		select {
		case <-s.ctx.Done():
			return fmt.Errorf("interrupted; these use nix-dispatch until they end: %s", strings.Join(left, " "))
		case <-time.After(200 * time.Millisecond):
		}
	}
}
