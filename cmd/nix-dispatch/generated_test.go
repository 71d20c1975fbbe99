package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// With asProgramEnv in its environment the test binary is nix-dispatch.
const asProgramEnv = "NIX_DISPATCH_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgramEnv) != "" {
		// It has a deadline, so that it completes words on a busy host, too.
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		code := run(ctx, os.Args, stdio{os.Stdin, os.Stdout, os.Stderr})
		cancel()
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// needProgram skips a test where a program is missing, or fails it if CI or
// NIX_DISPATCH_REQUIRE_FLEET is set.
func needProgram(t *testing.T, name string) {
	t.Helper()
	_, err := exec.LookPath(name)
	switch {
	case err == nil:
	case os.Getenv("CI") != "" || os.Getenv("NIX_DISPATCH_REQUIRE_FLEET") != "":
		t.Fatal(err)
	default:
		t.Skip(err)
	}
}

// generated is what "nix-dispatch ARGS" prints.
func generated(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	if code := run(t.Context(), append([]string{"nix-dispatch"}, args...), stdio{out: &out, err: io.Discard}); code != exitOK {
		t.Fatalf("nix-dispatch %q: status %d", args, code)
	}
	return out.String()
}

func TestManualAndCompletionKnowEveryOption(t *testing.T) {
	manual := strings.ReplaceAll(generated(t, "man"), `\-`, "-")
	subcommands := generated(t, "complete", "--", "")
	for _, c := range commands() {
		if c.Hidden {
			continue
		}
		_, section, inManual := strings.Cut(manual, "\n.SS nix-dispatch "+c.Name+" ")
		section, _, _ = strings.Cut(section, "\n.SS ")
		if !inManual || !strings.Contains("\n"+subcommands, "\n"+c.Name+"\t") {
			t.Errorf("the manual or completion does not know %s", c.Name)
		}
		if c.Raw {
			continue
		}
		long := generated(t, "complete", "--", c.Name, "--") + generated(t, "complete", "--", c.Name, "-")
		c.Flags.VisitAll(func(f *flag.Flag) {
			name := "--" + f.Name
			if len(f.Name) == 1 {
				name = "-" + f.Name
			}
			if !strings.Contains(section, `\fB`+name+`\fR`) || !strings.Contains("\n"+long, "\n"+name+"\t") {
				t.Errorf("%s: the manual or completion does not know %s", c.Name, name)
			}
		})
	}
}

func TestManualIsSound(t *testing.T) {
	needProgram(t, "mandoc")
	cmd := exec.Command("mandoc", "-T", "lint", "-W", "warning")
	cmd.Stdin = strings.NewReader(generated(t, "man"))
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if !strings.Contains(line, "missing date") { // the pages have a version instead
			t.Error(line)
		}
	}
}

// TestShellsComplete types at real shells.
func TestShellsComplete(t *testing.T) {
	t.Parallel()
	d := (&fakeDaemon{status: &dispatchv1.StatusResponse{Machines: []*dispatchv1.MachineStatus{{Uri: "ssh://mac"}, {Uri: "ssh-ng://root@big"}}}}).start(t)
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	put := func(name, text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	// It completes as nix-dispatch does, and else tells what it was called with.
	put("nix-dispatch", `#!/bin/sh
[ "$1" != complete ] || `+asProgramEnv+`=1 exec `+self+` "$@"
{ printf '<%s>' "$@"; echo; } >>`+dir+`/ran
`, 0o755)
	put("some file", "", 0o644)
	put("_nix-dispatch", generated(t, "completion", "zsh"), 0o644)
	put(".zshrc", "fpath=("+dir+" $fpath); autoload -Uz compinit; compinit -u -D; PS1='REA''DY>'", 0o644)
	put("bash", generated(t, "completion", "bash")+"PS1='REA''DY>'", 0o644)
	put("fish", generated(t, "completion", "fish"), 0o644)
	env := append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "NIX_DISPATCH_SOCKET="+d.socket, "ZDOTDIR="+dir, "HOME="+dir, "TERM=dumb", "LC_ALL=C.UTF-8")
	cases := []struct{ typed, ran, choice string }{
		{"hist", "<history>", "history"},
		{"build --print-b", "<build><--print-build-logs>", "--print-build-logs"},
		{"drain ssh://", "<drain><ssh://mac>", "ssh://mac"},
		{"history --machine=ssh-ng:", "<history><--machine=ssh-ng://root@big>", "--machine=ssh-ng://root@big"},
		{"machines check " + dir + "/so", "<machines><check><" + dir + "/some file>", dir + "/some file"},
		{"build --out-link=" + dir + "/so", "<build><--out-link=" + dir + "/some file>", "--out-link=" + dir + "/some file"},
	}
	for _, argv := range [][]string{{"bash", "--noprofile", "--rcfile", dir + "/bash", "-i"}, {"zsh", "-d", "-i"}} {
		t.Run(argv[0], func(t *testing.T) {
			needProgram(t, argv[0])
			os.Remove(dir + "/ran")
			term := startOnTerminal(t, env, argv...)
			for i, tt := range cases {
				term.await(t, "READY>", i+1)
				term.write(t, "nix-dispatch "+tt.typed+"\t\r")
			}
			term.await(t, "READY>", len(cases)+1)
			ran, err := os.ReadFile(dir + "/ran")
			if err != nil {
				t.Fatalf("%v; the terminal shows:\n%s", err, term.seen(t))
			}
			lines := strings.Split(string(ran), "\n")
			for i, tt := range cases {
				if i >= len(lines) || lines[i] != tt.ran {
					t.Errorf("%q and a tab: ran %q, want %q", tt.typed, lines[min(i, len(lines)-1)], tt.ran)
				}
			}
		})
	}
	t.Run("fish", func(t *testing.T) {
		needProgram(t, "fish")
		for _, tt := range cases {
			cmd := exec.Command("fish", "--no-config", "-c", `source $argv[1]; complete -C "nix-dispatch $argv[2]"`, dir+"/fish", tt.typed)
			cmd.Env = env
			out, err := cmd.Output()
			choice, _, _ := strings.Cut(strings.TrimSuffix(string(out), "\n"), "\t")
			if err != nil || choice != tt.choice {
				t.Errorf("%q: %v, fish offers %q, want %q", tt.typed, err, out, tt.choice)
			}
		}
	})
}

// A shellTerminal is a pseudo-terminal with a program on it.
type shellTerminal struct {
	keys *os.File
	text chan []byte
	all  bytes.Buffer
}

func startOnTerminal(t *testing.T, env []string, argv ...string) *shellTerminal {
	t.Helper()
	keys, tty := terminal(t)
	defer tty.Close()
	if err := unix.IoctlSetWinsize(int(keys.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 50, Col: 200}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, tty, tty, tty
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	term := &shellTerminal{keys: keys, text: make(chan []byte)}
	done := make(chan struct{})
	go func() {
		defer close(term.text)
		for {
			buf := make([]byte, 4096)
			n, err := keys.Read(buf)
			if err != nil {
				return
			}
			select {
			case term.text <- buf[:n]:
			case <-done:
				return
			}
		}
	}()
	t.Cleanup(func() {
		close(done)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return term
}

func (term *shellTerminal) write(t *testing.T, keys string) {
	t.Helper()
	if _, err := term.keys.WriteString(keys); err != nil {
		t.Fatal(err)
	}
}

// await waits until the program has written want so many times.
func (term *shellTerminal) await(t *testing.T, want string, times int) {
	t.Helper()
	timeout := time.After(2 * time.Minute)
	for strings.Count(term.all.String(), want) < times {
		select {
		case text, ok := <-term.text:
			if !ok {
				t.Fatalf("the shell has ended; the terminal shows:\n%s", term.seen(t))
			}
			term.all.Write(text)
		case <-timeout:
			t.Fatalf("after two minutes the terminal shows:\n%s", term.seen(t))
		}
	}
}

func (term *shellTerminal) seen(t *testing.T) string {
	t.Helper()
	return strconv.QuoteToASCII(term.all.String())
}
