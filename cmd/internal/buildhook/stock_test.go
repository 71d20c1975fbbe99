package buildhook

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"nixdispatch/cmd/internal/daemonsocket"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix/wire"
)

// stockScript writes a stand-in for Nix's own build hook.
func stockScript(t testing.TB, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "build-remote")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestStockHookTakesOver(t *testing.T) {
	dir := t.TempDir()
	script := stockScript(t, fmt.Sprintf(`
echo "$@" >%[1]s/args
echo '@nix {"action":"msg","level":1,"msg":"stock here"}' >&2
echo '# accept' >&2
echo 'stock://machine' >&2
echo 'log of stock' >&4
[ -e /proc/$$/fd/5 ] && echo 'log end is open' >&4
cat >%[1]s/stdin
exit 100`, dir))
	d := answering(t, replyWith(dispatchv1.Reply_ACTION_STOCK, "not for us", false))
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket, stockHookEnv+"="+script)
	want := new(bytes.Buffer)
	n.w = wire.NewWriter(&teeWriter{n.stdin, want})
	reply, machine := n.try(testSystem, true)
	if reply != "accept" || machine != "stock://machine" {
		t.Fatalf("reply = %q %q", reply, machine)
	}
	n.begin("/nix/store/2d1qmlv2ixdxvsazmkg3aj2jh4ajx4m7-input")
	if status := n.wait(); status != 100 {
		t.Errorf("exit status = %d, want the stock hook's 100", status)
	}
	if got := string(n.log); got != "log of stock\nlog end is open\n" {
		t.Errorf("log = %q", got)
	}
	if got := n.said(1); got != "stock here" {
		t.Errorf("said %q", got)
	}
	if got, _ := os.ReadFile(dir + "/args"); string(got) != "3\n" {
		t.Errorf("arguments = %q, want the verbosity", got)
	}
	if got, _ := os.ReadFile(dir + "/stdin"); !bytes.Equal(got, want.Bytes()) {
		t.Errorf("the stock hook read %d bytes, Nix wrote %d, or others", len(got), want.Len())
	}
}

type teeWriter struct {
	f    *os.File
	copy *bytes.Buffer
}

func (w *teeWriter) Write(p []byte) (int, error) {
	w.copy.Write(p)
	return w.f.Write(p)
}

func TestStockHookIsNotToldOfEarlierQuestions(t *testing.T) {
	dir := t.TempDir()
	script := stockScript(t, fmt.Sprintf("echo '# postpone' >&2\ncat >%s/stdin", dir))
	replies := []dispatchv1.Reply_Action{
		dispatchv1.Reply_ACTION_DECLINE, dispatchv1.Reply_ACTION_POSTPONE, dispatchv1.Reply_ACTION_STOCK,
	}
	d := (&fakeDaemon{hook: func(s hookStream) error {
		s.Recv() // Hello
		for _, action := range replies {
			s.Recv()
			s.Send(replyWith(action, "", false))
		}
		return nil
	}}).start(t)
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket, stockHookEnv+"="+script)
	settings := n.settings
	for i, want := range []string{"decline", "postpone", "postpone"} {
		if got, _ := n.try(fmt.Sprintf("system%d", i), true); got != want {
			t.Errorf("reply %d = %q, want %q", i, got, want)
		}
	}
	n.stdin.Close()
	if status := n.wait(); status != 0 {
		t.Errorf("exit status = %d", status)
	}
	got, _ := os.ReadFile(dir + "/stdin")
	for text, want := range map[string]int{"system0": 0, "system1": 0, "system2": 1, "github.com=secret": 1} {
		if c := bytes.Count(got, []byte(text)); c != want {
			t.Errorf("the stock hook was told %q %d times, want %d", text, c, want)
		}
	}
	if len(settings) == 0 {
		t.Fatal("no settings were sent")
	}
}

func TestStockHookDiesWithNixsKill(t *testing.T) {
	dir := t.TempDir()
	script := stockScript(t, fmt.Sprintf("echo $$ >%s/pid\necho '# decline' >&2\nexec sleep 600", dir))
	d := answering(t, replyWith(dispatchv1.Reply_ACTION_STOCK, "", false))
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket, stockHookEnv+"="+script)
	n.try(testSystem, true)
	text, err := os.ReadFile(dir + "/pid")
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	fmt.Sscan(string(text), &pid)
	n.kill()
	n.wait()
	for end := time.Now().Add(patience); syscall.Kill(pid, 0) == nil && !zombie(pid); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the stock hook lives on")
		}
	}
}

// zombie tells whether a process has ended and nobody has asked for its status.
func zombie(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && bytes.Contains(stat, []byte(") Z "))
}

func TestStockHookKilledBySignalIsAFailure(t *testing.T) {
	script := stockScript(t, "echo '# decline' >&2\nkill -9 $$")
	d := answering(t, replyWith(dispatchv1.Reply_ACTION_STOCK, "", false))
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket, stockHookEnv+"="+script)
	n.try(testSystem, true)
	if status := n.wait(); status != 1 {
		t.Errorf("exit status = %d, want 1", status)
	}
}

func TestStockHookAfterALongOutage(t *testing.T) {
	script := stockScript(t, "echo '# accept' >&2\necho stock >&2\ncat >/dev/null")
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"=/nonexistent/socket", stockHookEnv+"="+script, hookPatienceEnv+"=0s")
	if reply, _ := n.try(testSystem, true); reply != "decline" {
		t.Errorf("local build: reply = %q, want decline", reply)
	}
	if reply, machine := n.try("riscv64-linux", true); reply != "accept" || machine != "stock" {
		t.Errorf("remote build: reply = %q %q, want the stock hook's", reply, machine)
	}
	n.begin()
	if status := n.wait(); status != 0 {
		t.Errorf("exit status = %d", status)
	}
}

func TestStockHookForWhomTheDaemonRefuses(t *testing.T) {
	script := stockScript(t, "echo '# decline' >&2\ncat >/dev/null")
	for _, code := range []codes.Code{codes.PermissionDenied, codes.Unimplemented, codes.Internal} {
		t.Run(code.String(), func(t *testing.T) {
			d := (&fakeDaemon{hook: func(hookStream) error {
				return status.Error(code, "not in group nix-dispatch")
			}}).start(t)
			n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket, stockHookEnv+"="+script)
			if reply, _ := n.try("riscv64-linux", true); reply != "decline" {
				t.Errorf("reply = %q, want the stock hook's", reply)
			}
			if said := n.said(1); !strings.Contains(said, "not in group nix-dispatch") {
				t.Errorf("said %q, want the cause", said)
			}
		})
	}
}

func TestStockHookThatIsMissing(t *testing.T) {
	d := answering(t, replyWith(dispatchv1.Reply_ACTION_STOCK, "it is content-addressed", false))
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket, stockHookEnv+"=/nonexistent/build-remote")
	if reply, _ := n.try("riscv64-linux", true); reply != "decline" {
		t.Errorf("reply = %q, want decline", reply)
	}
	if said := n.said(1); !strings.Contains(said, "it is content-addressed") || !strings.Contains(said, "/nonexistent/build-remote") {
		t.Errorf("said %q, want both causes", said)
	}
}

func TestFindsTheStockHookOfThisSystem(t *testing.T) {
	if !executable(debianHook) {
		t.Skip("no Nix of Debian's here")
	}
	t.Setenv(stockHookEnv, "")
	got, err := findStockHook()
	if err != nil || !strings.Contains(got, "build-remote") {
		t.Errorf("findStockHook() = %q, %v", got, err)
	}
}

// The doctor looks with another process's environment and program.
func TestFindsTheStockHookAsAnotherProcessWould(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"one/bin/nix", "one/libexec/nix/build-remote", "two/bin/nix-daemon", "two/libexec/nix/build-remote", "three/bin/nix"} {
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct{ name, env, path, startedBy, want string }{
		{"named", root + "/one/bin/nix", "", "", root + "/one/bin/nix"},
		{"beside the one in PATH", "", "relative:" + root + ":" + root + "/one/bin", "", root + "/one/libexec/nix/build-remote"},
		{"beside the one that starts it", "", root + "/one/bin", root + "/two/bin/nix-daemon", root + "/two/libexec/nix/build-remote"},
		{"not Nix", "", root + "/one/bin", "/usr/bin/env", root + "/one/libexec/nix/build-remote"},
	} {
		env := map[string]string{stockHookEnv: tt.env, "PATH": tt.path}
		if got, err := FindStock(func(name string) string { return env[name] }, tt.startedBy); err != nil || got != tt.want {
			t.Errorf("%s: %q, %v, want %q", tt.name, got, err, tt.want)
		}
	}
}
