package integration

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"nixdispatch/deploy/fleet"
)

// A ledger is what a site has before a test, and must have again when the test
// is over: nothing leaks, whatever went wrong in between.
type ledger struct {
	s          *site
	goroutines int
	fds        int
}

// openLedger notes what nix-dispatchd has with nothing to do, most of the time: of
// some twenty scrapes one shows a goroutine less or more, for as many as the scrape
// itself takes (prometheus.Registry.Gather).
func (s *site) openLedger() ledger {
	s.t.Helper()
	s.idle(time.Minute)
	var goroutines, fds []int
	for range 11 {
		goroutines, fds = append(goroutines, s.goroutines()), append(fds, s.fds())
		time.Sleep(100 * time.Millisecond)
	}
	slices.Sort(goroutines)
	slices.Sort(fds)
	return ledger{s: s, goroutines: goroutines[len(goroutines)/2], fds: fds[len(fds)/2]}
}

func (s *site) goroutines() int {
	s.t.Helper()
	_, got := s.scrape()
	return int(got["go_goroutines{}"])
}

// fds counts nix-dispatchd's file descriptors.
func (s *site) fds() int {
	s.t.Helper()
	n := 0
	for _, pid := range pids(s.client, isDispatchd) {
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			s.t.Fatal(err)
		}
		n += len(open)
	}
	return n
}

func isDispatchd(cmdline string) bool { return strings.HasPrefix(cmdline, programs+"/nix-dispatchd ") }

// settle waits, with all machines well again, until the site is as it was when
// the ledger was opened. What a caller or a dead connection left must be gone
// within.
func (l ledger) settle(within time.Duration) {
	s := l.s
	s.t.Helper()
	start := time.Now()
	said := ""
	for end := start.Add(within); ; time.Sleep(time.Second) {
		open := l.open()
		if len(open) == 0 {
			s.t.Logf("the ledger is closed after %.1f s", time.Since(start).Seconds())
			return
		}
		if text := strings.Join(open, "\n"); text != said {
			said = text
		}
		if time.Now().After(end) {
			s.stopDaemon(syscall.SIGQUIT) // its log gets what every goroutine does
			s.t.Errorf("%s after all is over there is still:\n%s", within, said)
			return
		}
	}
}

// open are the entries that are not as they were.
func (l ledger) open() []string {
	s := l.s
	s.t.Helper()
	var open []string
	st := s.status()
	for _, m := range st.Machines {
		if m.State != "up" {
			open = append(open, fmt.Sprintf("machine %s: %s, %s", m.URI, m.State, m.Reason))
		}
		if m.Running != 0 {
			open = append(open, fmt.Sprintf("machine %s: %d slots held", m.URI, m.Running))
		}
	}
	for _, b := range st.Builds {
		open = append(open, fmt.Sprintf("build %s of %s: %s on %s", b.ID, b.DrvPath, b.Phase, b.Machine))
	}
	for _, name := range slices.Sorted(maps.Keys(s.hosts())) {
		for _, line := range s.leftovers(s.hosts()[name]) {
			open = append(open, fmt.Sprintf("process on %s: %s", name, line))
		}
	}
	// They are made and ended by what was just looked at, so they come last and
	// count only when all else is well.
	if n := s.goroutines(); n > l.goroutines {
		open = append(open, fmt.Sprintf("goroutines: %d, %d before", n, l.goroutines))
	}
	if n := s.fds(); n > l.fds {
		open = append(open, fmt.Sprintf("file descriptors: %d, %d before", n, l.fds))
	}
	return open
}

// leftovers are the processes of a host that are there because of builds.
func (s *site) leftovers(h *fleet.Host) []string {
	s.t.Helper()
	all, err := h.Processes()
	if err != nil {
		return []string{err.Error()}
	}
	daemons := 0
	return slices.DeleteFunc(all, func(line string) bool {
		switch program, _, _ := strings.Cut(line, " "); {
		case strings.HasPrefix(line, "sshd"), program == "/usr/sbin/sshd":
			return true
		case isDispatchd(line):
			return true
		case line == "nix-daemon", strings.HasSuffix(program, "/nix-daemon"):
			daemons++
			return daemons == 1
		}
		return false
	})
}
