package buildhook

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
)

const (
	testSystem = "x86_64-linux"
	drvBase    = "s66mzxpvicwk07gjbjfw9izjfa797vsw-hello.drv"
	outBase    = "0c0qmlv2ixdxvsazmkg3aj2jh4ajx4m7-hello"
	docBase    = "1d1qmlv2ixdxvsazmkg3aj2jh4ajx4m7-hello-doc"
)

// testSettings are what a Nix would send that may use its machines file.
func testSettings() map[string]string {
	return map[string]string{
		"access-tokens":   "github.com=secret",
		"builders":        "@/etc/nix/machines",
		"extra-platforms": "i686-linux",
		"keep-failed":     "false",
		"max-jobs":        "4",
		"max-silent-time": "7",
		"store":           "auto",
		"system":          testSystem,
		"system-features": "benchmark kvm",
		"timeout":         "60",
	}
}

// A fakeNix starts a hook process and talks to it over descriptors 0, 2, 4 and
// 5 as Nix does. Like Nix it holds the output locks.
type fakeNix struct {
	t        testing.TB
	cmd      *exec.Cmd
	w        *wire.Writer
	stdin    *os.File
	started  time.Time
	storeDir string
	drv      nix.StorePath
	settings map[string]string

	lines chan string // of fd 2

	mu       sync.Mutex
	log      []byte // of fd 4
	messages []nixMessage
	stray    []string // lines that are neither reply nor message
	logDone  chan struct{}
}

type nixMessage struct {
	Action string
	ID     uint64
	Level  *int
	Msg    string
	Type   int
	Text   string
	Parent uint64
	Fields []any
}

// newFakeNix writes a derivation and starts a hook; env is added to its
// environment. It waits for the daemon as long as it may take on a busy host,
// unless env has it wait less.
func newFakeNix(t testing.TB, settings map[string]string, env ...string) *fakeNix {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	env = append([]string{asHookEnv + "=1", hookAnswerEnv + "=" + patience.String()}, env...)
	return startFakeNix(t, exec.Command(self, "3"), settings, env...)
}

// startFakeNix is newFakeNix with a program of the caller's.
func startFakeNix(t testing.TB, cmd *exec.Cmd, settings map[string]string, env ...string) *fakeNix {
	t.Helper()
	n := &fakeNix{t: t, cmd: cmd, settings: settings, storeDir: t.TempDir(), lines: make(chan string, 1024), logDone: make(chan struct{})}
	n.drv = nix.StorePath(filepath.Join(n.storeDir, drvBase))
	text := fmt.Sprintf(`Derive([("doc",%q,"",""),("out",%q,"","")],[],[],%q,"/bin/sh",[],[("name","hello")])`,
		n.output(docBase), n.output(outBase), testSystem)
	if err := os.WriteFile(string(n.drv), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	n.startHook(env)
	return n
}

func (n *fakeNix) output(base string) string { return filepath.Join(n.storeDir, base) }

func (n *fakeNix) startHook(env []string) {
	t := n.t
	t.Helper()
	stdinR, stdinW := pipe(t)
	errR, errW := pipe(t)
	logR, logW := pipe(t)
	n.cmd.Env = append(os.Environ(), hookStateEnv+"="+filepath.Join(n.storeDir, "hook-state"))
	n.cmd.Env = append(n.cmd.Env, "NIX_STORE_DIR="+n.storeDir)
	n.cmd.Env = append(n.cmd.Env, env...)
	n.cmd.Dir = "/"
	n.cmd.Stdin, n.cmd.Stdout, n.cmd.Stderr = stdinR, errW, errW
	n.cmd.ExtraFiles = []*os.File{nil, logW, logR}
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	n.started = time.Now()
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stdinR.Close()
	errW.Close()
	logW.Close()
	n.stdin, n.w = stdinW, wire.NewWriter(stdinW)
	go n.readLines(errR)
	go n.readLog(logR)
	t.Cleanup(func() {
		n.kill()
		n.cmd.Wait()
		<-n.logDone
	})
}

// kill ends the hook's process group, as Nix does.
func (n *fakeNix) kill() { syscall.Kill(-n.cmd.Process.Pid, syscall.SIGKILL) }

func pipe(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func (n *fakeNix) readLines(r io.Reader) {
	defer close(n.lines)
	br := bufio.NewReader(r)
	for {
		line, err := br.ReadString('\n')
		if line != "" {
			n.lines <- strings.TrimSuffix(line, "\n")
		}
		if err != nil {
			return
		}
	}
}

func (n *fakeNix) readLog(r io.Reader) {
	defer close(n.logDone)
	buf := make([]byte, 4096)
	for {
		c, err := r.Read(buf)
		n.mu.Lock()
		n.log = append(n.log, buf[:c]...)
		n.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// sendSettings writes the settings; like Nix's they are flushed with the first
// question.
func (n *fakeNix) sendSettings() {
	for name, value := range n.settings {
		n.w.Bool(true)
		n.w.String(name)
		n.w.String(value)
	}
	n.w.Bool(false)
}

// try asks and returns the reply, with the machine name if it accepts.
func (n *fakeNix) try(system string, amWilling bool, features ...string) (reply, machine string) {
	n.t.Helper()
	if n.settings != nil {
		n.sendSettings()
		n.settings = nil
	}
	n.w.String("try")
	n.w.Bool(amWilling)
	n.w.String(system)
	n.w.StorePath(n.drv)
	n.w.Strings(features)
	if err := n.w.Flush(); err != nil {
		n.t.Fatalf("ask: %v", err)
	}
	reply = n.reply()
	if reply == "accept" {
		line, ok := <-n.lines
		if !ok {
			n.t.Fatal("end of output instead of a machine name")
		}
		machine = line
	}
	return reply, machine
}

// reply reads up to a reply and keeps the messages before it.
func (n *fakeNix) reply() string {
	n.t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case line, ok := <-n.lines:
			if !ok {
				n.t.Fatalf("end of output instead of a reply; before it: %q", n.stray)
			}
			if reply, ok := strings.CutPrefix(line, "# "); ok {
				return reply
			}
			n.message(line)
		case <-timeout:
			n.t.Fatal("no reply")
		}
	}
}

func (n *fakeNix) message(line string) {
	text, ok := strings.CutPrefix(line, "@nix ")
	if !ok {
		n.stray = append(n.stray, line)
		return
	}
	var m nixMessage
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		n.t.Fatalf("bad message %q: %v", line, err)
	}
	n.messages = append(n.messages, m)
}

// begin sends what Nix sends after acceptance and closes standard input.
func (n *fakeNix) begin(inputs ...string) {
	n.t.Helper()
	n.w.Strings(inputs)
	n.w.Strings([]string{"out", "doc"})
	if err := n.w.Flush(); err != nil {
		n.t.Fatal(err)
	}
	n.stdin.Close()
}

// wait reads to the end and returns the hook's exit status, -1 for a signal.
func (n *fakeNix) wait() int {
	n.t.Helper()
	timer := time.AfterFunc(patience, n.kill)
	defer timer.Stop()
	for line := range n.lines {
		if strings.HasPrefix(line, "# ") {
			n.t.Errorf("a second reply %q", line)
			continue
		}
		n.message(line)
	}
	<-n.logDone
	err := n.cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	if err != nil {
		n.t.Fatal(err)
	}
	if len(n.stray) > 0 {
		n.t.Errorf("lines that are neither reply nor message: %q", n.stray)
	}
	return 0
}

// said returns the texts of messages at level or more important.
func (n *fakeNix) said(level int) string {
	var texts []string
	for _, m := range n.messages {
		if m.Action == "msg" && m.Level != nil && *m.Level <= level {
			texts = append(texts, m.Msg)
		}
	}
	return strings.Join(texts, "\n")
}

// lock holds flock on an output's lock file, as the asking Nix does.
func (n *fakeNix) lock(base string) *os.File {
	n.t.Helper()
	f, err := os.OpenFile(n.output(base)+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { f.Close() })
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		n.t.Fatal(err)
	}
	return f
}
