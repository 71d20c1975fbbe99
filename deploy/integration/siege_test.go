package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// besiege is a Perl program that connects to a socket as often as it can, says now
// and then the first bytes of a call and nothing more, and keeps what it has.
const besiege = `use Socket; $| = 1; $SIG{PIPE} = "IGNORE"; my @held; my $n = 0;
for (my $end = time + 600; time < $end;) {
	for (1 .. 200) {
		socket(my $s, AF_UNIX, SOCK_STREAM, 0) or last;
		connect($s, pack_sockaddr_un($ARGV[0])) or last;
		syswrite($s, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0") if $n++ % 2;
		push @held, $s; shift @held if @held > 500;
	}
	print "$n\n"; select(undef, undef, undef, 0.2);
}`

// TestDaemonUnderSiege has one user open thousands of connections that say nothing to
// a daemon with few file descriptors: all others are served, and nothing stays of it.
func TestDaemonUnderSiege(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{{name: "mac", suite: fleet.Sid, columns: "x86_64-linux - 4"}}})
	s.prefix = []string{"prlimit", "--nofile=200:200"}
	s.admit("alice", "bob")
	// As many builds as later, so that the connections they need are there before.
	s.verify(s.mustBuild("alice", several("before"))...)
	l := s.openLedger()
	cmd, out := s.capture(t.Context(), "alice", "perl", "-e", besiege, socket)
	siege := s.launchCommand("the siege", cmd, out)
	s.eventually(time.Minute, "thousands have connected", func() bool { return strings.Count(out().Stdout, "\n") > 15 })
	if files := s.fds(); files > 150 {
		t.Errorf("nix-dispatchd has %d file descriptors of 200 in use", files)
	}
	// Others look and build, several at a time.
	if _, stderr, exit := s.as("bob", "status"); exit != 0 {
		t.Errorf("another member's status: exit %d\n%s", exit, stderr)
	}
	s.verify(s.mustBuild("alice", several("besieged"))...) // through nix-daemon she is root to it
	if !strings.Contains(s.daemon.log.String(), "connections are refused") {
		t.Error("the log does not tell that connections are refused")
	}
	siege.signal(syscall.SIGKILL)
	siege.wait(patience)
	l.settle(time.Minute)
}

// several are a dozen derivations.
func several(name string) string {
	var list strings.Builder
	for n := range 12 {
		list.WriteString(shell(fmt.Sprintf("%s-%d", name, n), "sleep 0.5; seq 30000; echo > $out", ""))
	}
	return "[ " + list.String() + "]"
}
