package integration

import (
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestChaosClockJump has nix-dispatchd sleep while a machine goes away: when it wakes
// it does not wait for keepalives to find out.
func TestChaosClockJump(t *testing.T) {
	t.Parallel()
	// By keepalives it would take five minutes to find out.
	s := chaosSite(t, "ssh", "", map[string]string{"/root/.ssh/config": "Host *\n\tServerAliveInterval 100\n\tServerAliveCountMax 3\n"})
	l := s.openLedger()
	v := victim{s, s.machines["mac"]}
	asked := s.askBoth(work{name: "sleeper", good: 6, bad: 1, script: "sleep 2"})
	v.await(whileBuilt, "sleeper")
	v.must(s.client.Signal(s.daemon.cmd, syscall.SIGSTOP))
	v.kill()
	time.Sleep(17 * time.Second)
	v.must(s.client.Signal(s.daemon.cmd, syscall.SIGCONT))
	v.must(s.daemon.cmd.Process.Signal(syscall.SIGCONT)) // nsenter has stopped with it
	woken := time.Now()
	s.eventually(2*time.Minute, "the connection is found dead", func() bool {
		return strings.Contains(s.daemon.log.String(), `msg="ssh connection lost" machine=ssh://root@mac`)
	})
	t.Logf("found after %.1f s", time.Since(woken).Seconds())
	if !strings.Contains(s.daemon.log.String(), "the clock has jumped") {
		t.Error("it was not noticed that the clock has jumped")
	}
	s.allDone(asked)
	v.heal()
	l.settle(ledgerWait)
}
