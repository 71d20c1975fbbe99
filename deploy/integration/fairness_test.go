package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestSingleBuildBesideMany has one user of nix-daemon queue many builds, and another
// ask for a single one: it does not wait for them.
func TestSingleBuildBesideMany(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		const many = 40
		s := newSite(t, siteConfig{client: suite, machines: protocolMachines(1, 1)[:1]})
		var list strings.Builder
		for n := range many {
			list.WriteString("(" + recipe{name: fmt.Sprintf("many-%d", n), feature: "ssh", script: "sleep 0.5; echo > $out"}.expr() + ") ")
		}
		queue := s.launch("alice", "[ "+list.String()+"]")
		s.eventually(time.Minute, "many are queued and one is built", func() bool {
			st := s.status()
			return len(st.Builds) > many/2 && st.Machines[0].Running == 1
		})
		s.mustBuild("bob", recipe{name: "single", feature: "ssh", script: "echo > $out"}.expr())
		if left := len(s.status().Builds); left < many/4 {
			t.Errorf("when the single build of another user is done, only %d of %d are left", left, many)
		}
		queue.signal(syscall.SIGINT)
		queue.wait(patience)
		s.idle(time.Minute)
	})
}
