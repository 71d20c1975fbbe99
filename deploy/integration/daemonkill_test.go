package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestBuildsOutliveTheDaemon kills nix-dispatchd under builds of every kind of
// caller, once while they build, and then stops another in its own way.
func TestBuildsOutliveTheDaemon(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: protocolMachines(1, 4)})
		var hooks, asked []recipe
		for _, protocol := range protocols {
			for n := range 3 { // more than can run at once, with those asked for
				hooks = append(hooks, recipe{name: fmt.Sprintf("hooked-%s-%d", protocol, n), feature: protocol})
				asked = append(asked, recipe{name: fmt.Sprintf("asked-%s-%d", protocol, n), feature: protocol})
			}
		}
		list := func(recipes []recipe) string {
			var b strings.Builder
			for i := range recipes {
				recipes[i].script = recipes[i].awaitGate() + "echo " + recipes[i].name + " > $out"
				fmt.Fprintf(&b, "(%s) ", recipes[i].expr())
			}
			return "[ " + b.String() + "]"
		}
		run := s.launch("alice", list(hooks))
		drvs := s.derivations(list(asked))
		dispatched := s.launchDispatch(append([]string{"build"}, drvs...)...)

		allSlots := func() bool {
			running := 0
			for _, m := range s.status().Machines {
				running += m.Running
			}
			return running == 8
		}
		s.eventually(time.Minute, "all slots are in use", allSlots)
		s.stopDaemon(syscall.SIGKILL)
		for _, h := range s.machines {
			s.eventually(time.Minute, h.Name()+" builds nothing any more", func() bool {
				processes, err := h.Processes()
				return err == nil && !strings.Contains(strings.Join(processes, "\n"), "/var/tmp/gate-")
			})
		}
		s.startDaemon()
		s.eventually(time.Minute, "they are built again", allSlots)
		s.stopDaemon(syscall.SIGTERM) // cancels, for its drain timeout is 0
		s.startDaemon()
		s.eventually(time.Minute, "and again", allSlots)
		for _, r := range append(hooks, asked...) {
			s.openGate(r)
		}
		s.verify(run.succeed(time.Minute)...)
		if said := run.out().Stderr; strings.Count(said, "waiting for the daemon to come back") < 2 {
			t.Errorf("nix-build said:\n%s", said)
		}
		s.verify(dispatched.succeed(time.Minute)...)
		if said := dispatched.out().Stderr; strings.Count(said, "waiting for it to come back") != 2 {
			t.Errorf("nix-dispatch build said:\n%s", said)
		}
		s.idle(time.Minute)
	})
}
