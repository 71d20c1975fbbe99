package integration

import (
	"fmt"
	"strings"
	"syscall"
	"time"
)

// hookCallsAreOpen has a thousand hook calls held open, half of them on connections
// of their own, as hooks have, half on few connections of another user, who is admitted:
// all are answered, real clients get what they ask for, and nothing stays of it.
func (s *site) hookCallsAreOpen() {
	s.t.Helper()
	streams, clients := shortOr(200, 1000), shortOr(3, 20)
	asks := make([][]piece, clients)
	for n := range asks {
		asks[n] = s.make(work{name: fmt.Sprintf("among-%d", n), good: 4, size: 50_000, script: "sleep 0.5"})
	}
	// Nobody can build it, so a hook may ask for something else later.
	drv := s.drvOf(`derivation { name = "nobodys"; system = "m68k-linux"; builder = "/bin/sh"; }`)
	held := []*launched{
		s.holdStreams("root", drv, streams/2, 1),
		s.holdStreams("bob", drv, streams/100, 50),
	}
	for _, h := range held {
		s.eventually(time.Minute, "all hook calls have their reply", func() bool { return strings.Contains(h.out().Stdout, "held:") })
	}
	if files := s.fds(); files < streams/2 {
		s.t.Errorf("nix-dispatchd has %d files open, with %d connections", files, streams/2+streams/100)
	}
	var asked []*commission
	for n, pieces := range asks {
		asked = append(asked, s.ask(n%3, pieces))
	}
	s.allDone(asked)
	for _, h := range held {
		if said := h.out().Stdout; strings.Contains(said, "lost:") {
			s.t.Errorf("hook calls were ended:\n%s", clip(said))
		}
		h.signal(syscall.SIGKILL)
		h.wait(patience)
	}
}

// holdStreams makes hook calls as user and keeps them.
func (s *site) holdStreams(user, drv string, connections, calls int) *launched {
	s.t.Helper()
	cmd, out := s.capture(s.t.Context(), user, programs+"/mallory", "streams", "--drv", drv,
		"--connections", fmt.Sprint(connections), "--calls", fmt.Sprint(calls))
	return s.launchCommand("hook calls of "+user, cmd, out)
}

// admit has users be members of the group that may use the daemon, which is started
// anew, with the site's prefix.
func (s *site) admit(users ...string) {
	s.t.Helper()
	s.stopDaemon(syscall.SIGTERM)
	s.run("groupadd", "--system", "nix-dispatch")
	for _, user := range users {
		s.run("usermod", "--append", "--groups", "nix-dispatch", user)
	}
	s.startDaemon()
}
