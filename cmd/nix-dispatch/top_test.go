package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"nixdispatch/proto/dispatch/dispatchtest"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A liveDaemon's status changes.
type liveDaemon struct {
	dispatchv1.UnimplementedDispatchServiceServer
	status atomic.Pointer[dispatchv1.StatusResponse]
}

func (d *liveDaemon) Status(context.Context, *dispatchv1.StatusRequest) (*dispatchv1.StatusResponse, error) {
	return d.status.Load(), nil
}

func (d *liveDaemon) History(_ *dispatchv1.HistoryRequest, s grpc.ServerStreamingServer[dispatchv1.FinishedBuild]) error {
	return s.Send(&dispatchv1.FinishedBuild{Id: 3, DrvPath: otherDrv, Machine: "ssh://mac", Status: "permanent failure", Failed: true,
		Ended: timestamppb.Now(), Building: durationpb.New(1500 * time.Millisecond)})
}

// busy is a status with one machine that is up, one that is down, and builds.
func busy(queued int) *dispatchv1.StatusResponse {
	r := &dispatchv1.StatusResponse{
		Queued: uint32(queued),
		Machines: []*dispatchv1.MachineStatus{
			{Uri: "ssh://mac", State: dispatchv1.MachineState_MACHINE_STATE_UP, Slots: 2, Running: 1},
			{Uri: "ssh://poochie", State: dispatchv1.MachineState_MACHINE_STATE_DOWN, Slots: 1, Reason: "no\nroute\x1b[2J"},
		},
		Builds: []*dispatchv1.BuildInfo{{Id: 7, DrvPath: helloDrv, Phase: dispatchv1.Phase_PHASE_BUILDING, Machine: "ssh://mac",
			Since: timestamppb.Now(), BuildingSince: timestamppb.New(time.Now().Add(-time.Minute)), User: "alice"}},
	}
	for n := range min(queued, 50) {
		r.Builds = append(r.Builds, &dispatchv1.BuildInfo{Id: uint64(8 + n), DrvPath: otherDrv, Phase: dispatchv1.Phase_PHASE_QUEUED, Since: timestamppb.Now(), Reason: "all are full"})
	}
	return r
}

func startLiveDaemon(t *testing.T) (d *liveDaemon, socket string) {
	t.Helper()
	d = new(liveDaemon)
	d.status.Store(busy(1))
	socket, _ = dispatchtest.Serve(t, d)
	return d, socket
}

func TestTopOnce(t *testing.T) {
	_, socket := startLiveDaemon(t)
	for _, args := range [][]string{{"top"}, {"top", "--once"}} {
		code, stdout, _ := runCommand(t.Context(), socket, args...)
		if code != exitOK || strings.ContainsRune(stdout, 0x1b) {
			t.Errorf("%v: status %d, %q", args, code, stdout)
		}
		for _, want := range []string{"1 of 2 up, 1 of 2 slots, 1 at work, 1 waiting", "ssh://mac      up", "down", "no route", "1m0s", "alice", "all are full", "permanent failure", "1.5s"} {
			if !strings.Contains(stdout, want) {
				t.Errorf("%v: want %q in\n%s", args, want, stdout)
			}
		}
	}
	if code, _, stderr := runCommand(t.Context(), socket+"none", "top"); code != exitUnreachable || stderr == "" {
		t.Errorf("without a daemon: status %d, %q", code, stderr)
	}
	if code, _, stderr := runCommand(t.Context(), socket, "top", "--interval", "0s"); code != exitUsage || stderr == "" {
		t.Errorf("--interval 0s: status %d, %q", code, stderr)
	}
}

// A topTerminal is "nix-dispatch top" in a terminal of its own.
type topTerminal struct {
	t      *testing.T
	master *os.File
	tty    *os.File
	cmd    *exec.Cmd
	before unix.Termios

	mu   sync.Mutex
	text string
}

func startTop(t *testing.T, socket string) *topTerminal {
	t.Helper()
	master, tty := terminal(t)
	top := &topTerminal{t: t, master: master, tty: tty}
	t.Cleanup(func() { tty.Close() })
	before, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	top.before = *before
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	top.cmd = exec.Command(exe, "top", "--socket", socket, "--interval", "100ms")
	top.cmd.Env = append(os.Environ(), asProgramEnv+"=1", "TERM=xterm")
	top.cmd.Stdin, top.cmd.Stdout, top.cmd.Stderr = tty, tty, tty
	top.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := top.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = top.cmd.Process.Kill() })
	go func() { // ends with the terminal
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			top.mu.Lock()
			top.text += string(buf[:n])
			top.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return top
}

// painted is what was painted last, whole.
func (top *topTerminal) painted() string {
	top.mu.Lock()
	defer top.mu.Unlock()
	frames := strings.Split(top.text, "\x1b[H")
	if len(frames) < 3 {
		return ""
	}
	return frames[len(frames)-2]
}

func (top *topTerminal) eventually(what string, ok func() bool) {
	top.t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			top.t.Fatalf("waited in vain: %s; on the terminal is %q", what, top.painted())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (top *topTerminal) shows(want string) {
	top.t.Helper()
	top.eventually("it shows "+want, func() bool { return strings.Contains(top.painted(), want) })
}

func (top *topTerminal) press(keys string) {
	top.t.Helper()
	if _, err := top.master.WriteString(keys); err != nil {
		top.t.Fatal(err)
	}
}

// ends waits for the program's end and looks at what it leaves.
func (top *topTerminal) ends(want int) {
	top.t.Helper()
	done := make(chan error, 1)
	go func() { done <- top.cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(2 * time.Minute):
		top.t.Fatal("it does not end")
	}
	if code := top.cmd.ProcessState.ExitCode(); code != want {
		top.t.Errorf("status %d, want %d", code, want)
	}
	top.eventually("the screen before is back", func() bool {
		top.mu.Lock()
		defer top.mu.Unlock()
		return strings.HasSuffix(top.text, "\x1b[?25h\x1b[?1049l")
	})
	after, err := unix.IoctlGetTermios(int(top.tty.Fd()), unix.TCGETS)
	if err != nil {
		top.t.Fatal(err)
	}
	if *after != top.before {
		top.t.Errorf("the terminal's settings are %+v, were %+v", *after, top.before)
	}
}

func TestTopInATerminal(t *testing.T) {
	d, socket := startLiveDaemon(t)
	top := startTop(t, socket)
	top.shows("1 waiting")
	top.shows("alice")
	if text := top.painted(); strings.Contains(text, "\x1b[2J") || !strings.Contains(text, "\x1b[31m") {
		t.Errorf("a machine's words reach the terminal, or what is down is not red: %q", text)
	}

	// It follows the daemon, and the terminal's size.
	d.status.Store(busy(200))
	top.shows("200 waiting")
	for _, size := range []unix.Winsize{{Row: 20, Col: 60}, {Row: 6, Col: 30}, {Row: 50, Col: 100}} {
		if err := unix.IoctlSetWinsize(int(top.master.Fd()), unix.TIOCSWINSZ, &size); err != nil {
			t.Fatal(err)
		}
		top.eventually(fmt.Sprintf("it fits into %d rows and %d columns, and fills them", size.Row, size.Col), func() bool {
			text := ansi.Replace(top.painted())
			lines := strings.Split(text, "\r\n")
			longest := 0
			for _, l := range lines {
				longest = max(longest, len([]rune(l)))
			}
			return len(lines) <= int(size.Row) && len(lines) >= int(size.Row)-4 && longest <= int(size.Col) && longest > int(size.Col)/2
		})
	}
	top.press("xy\x1a") // neither means anything here
	d.status.Store(busy(0))
	top.shows("0 waiting")
	top.press("q")
	top.ends(exitOK)
}

// ansi takes out the escape sequences that "top" writes itself.
var ansi = strings.NewReplacer("\x1b[0m", "", "\x1b[1m", "", "\x1b[2m", "", "\x1b[31m", "", "\x1b[33m", "", "\x1b[K", "", "\x1b[J", "")

func TestTopEndsWithCtrlC(t *testing.T) {
	_, socket := startLiveDaemon(t)
	top := startTop(t, socket)
	top.shows("1 waiting")
	top.press("\x03")
	top.ends(exitOK)
}

// TestTopOutlivesTheDaemon has the daemon go and come back.
func TestTopOutlivesTheDaemon(t *testing.T) {
	d := new(liveDaemon)
	d.status.Store(busy(1))
	socket, server := dispatchtest.Serve(t, d)
	top := startTop(t, socket)
	top.shows("1 waiting")
	server.Stop()
	top.shows("has not answered since")
	if !strings.Contains(top.painted(), "ssh://mac") {
		t.Error("what was known is not shown any more")
	}
	d.status.Store(busy(2))
	again, _ := dispatchtest.Serve(t, d)
	if err := os.Rename(again, socket); err != nil {
		t.Fatal(err)
	}
	top.shows("2 waiting")
	top.press("q")
	top.ends(exitOK)
}

func TestOverviewFits(t *testing.T) {
	status := busy(0)
	for n := range 40 {
		status.Machines = append(status.Machines, &dispatchv1.MachineStatus{Uri: fmt.Sprintf("ssh://m%d", n)})
		for _, phase := range []dispatchv1.Phase{dispatchv1.Phase_PHASE_QUEUED, dispatchv1.Phase_PHASE_BUILDING} {
			status.Builds = append(status.Builds, &dispatchv1.BuildInfo{Id: uint64(100 + n), DrvPath: helloDrv, Phase: phase})
		}
	}
	status.Queued = 5000
	o := &overview{status: status, at: time.Now()}
	for n := range 30 {
		o.ended = append(o.ended, &dispatchv1.FinishedBuild{Id: uint64(n)})
	}
	for rows := 1; rows < 250; rows++ {
		lines := o.lines(rows)
		if len(lines) > rows {
			t.Fatalf("%d lines in %d rows", len(lines), rows)
		}
		if rows > 20 && rows < 140 && len(lines) < rows-2 {
			t.Errorf("%d lines only in %d rows, with more to tell", len(lines), rows)
		}
		var all strings.Builder
		for _, l := range lines {
			all.WriteString(l.text + "\n")
		}
		if rows >= 14 {
			for _, want := range []string{"MACHINE", "BUILD", "WAITING"} {
				if !strings.Contains(all.String(), want) {
					t.Errorf("%d rows have no room for %s:\n%s", rows, want, all.String())
				}
			}
		}
	}
	if text := fmt.Sprint(o.lines(0)); strings.Count(text, "ssh://m") < 41 || !strings.Contains(text, "and 4960 more") {
		t.Errorf("not everything is there without a bound: %s", text)
	}
}
