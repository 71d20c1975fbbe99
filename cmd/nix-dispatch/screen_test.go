package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// terminal opens a pseudo-terminal of 60 columns; what is written to tty comes
// out of master.
func terminal(t *testing.T) (master, tty *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	fd := int(master.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 20, Col: 60}); err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return master, tty
}

func TestProgressRepaintsOnATerminal(t *testing.T) {
	t.Setenv("TERM", "xterm")
	master, tty := terminal(t)
	shown := make(chan string)
	go func() {
		out, _ := io.ReadAll(master) // ends with an error once the other end is closed
		shown <- string(out)
	}()
	p := newProgress(tty, false)
	if p.screen == nil {
		t.Fatal("not taken for a terminal")
	}
	p.plan(&dispatchv1.Plan{WillBuild: []string{helloDrv}})
	start := placed("ssh://mac", "")
	start.DrvPath = helloDrv
	p.event(start)
	for { // until it is painted
		p.mu.Lock()
		painted := p.screen.painted
		p.mu.Unlock()
		if painted > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	end := finishedOf(dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE, "ssh://mac", "it failed")
	end.DrvPath = helloDrv
	p.event(end)
	p.close()
	tty.Close()
	got := <-shown
	painting := "[0 of 1 built, 1 running, 0 queued]\r\n  hello on ssh://mac: starting"
	if !strings.Contains(got, painting) {
		t.Errorf("not painted: %q", got)
	}
	if !strings.Contains(got, "\x1b[2A\x1b[Jerror: build of '"+helloDrv+"'") {
		t.Errorf("the error does not replace the painted lines: %q", got)
	}
	if !strings.HasSuffix(got, "failed: it failed\r\n") && !strings.HasSuffix(got, "\x1b[J") {
		t.Errorf("something is left behind: %q", got)
	}
}

func TestProgressPaintsNothingElsewhere(t *testing.T) {
	_, tty := terminal(t)
	defer tty.Close()
	t.Setenv("TERM", "dumb")
	if newScreen(tty) != nil || newScreen(new(strings.Builder)) != nil {
		t.Error("would paint where that is no use")
	}
}
