package main

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A startHost is what start.sh finds on a host.
type startHost struct {
	system, machine, user string
	golang                string // shell text of the program go, "" if there is none
}

// start runs start.sh there.
func (h startHost) start(t *testing.T) (printed string, err error) {
	t.Helper()
	dir := t.TempDir()
	programs := map[string]string{
		"uname": "case $1 in -s) echo " + h.system + " ;; -m) echo " + h.machine + " ;; esac",
		"id":    "echo " + h.user,
		"cat":   "exec /bin/cat",
		"go":    h.golang,
	}
	for name, text := range programs {
		if text == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/bin/sh", "start.sh")
	cmd.Env = []string{"PATH=" + dir}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestStartSaysWhatToDo(t *testing.T) {
	for name, test := range map[string]struct {
		host startHost
		want string // of its message; "" if the demo can run
	}{
		"fine":         {startHost{"Linux", "x86_64", "0", "echo nixdispatch"}, ""},
		"another user": {startHost{"Linux", "x86_64", "1000", "echo nixdispatch"}, "it needs root"},
		"no go":        {startHost{"Linux", "x86_64", "0", ""}, "the program go is not in PATH"},
		"old go":       {startHost{"Linux", "x86_64", "0", "exit 1"}, "GOTOOLCHAIN=auto make demo"},
		"another CPU":  {startHost{"Linux", "aarch64", "0", "echo nixdispatch"}, "this is aarch64"},
		"another OS":   {startHost{"Darwin", "x86_64", "0", "echo nixdispatch"}, "this is Darwin"},
	} {
		t.Run(name, func(t *testing.T) {
			printed, err := test.host.start(t)
			if !strings.HasPrefix(printed, "The demo makes four small hosts") {
				t.Errorf("it does not begin with what it is about to do: %q", printed)
			}
			if (err == nil) != (test.want == "") || !strings.Contains(printed, test.want) {
				t.Errorf("%v, want %q in what it printed: %q", err, test.want, printed)
			}
			if err != nil && !strings.Contains(printed, "README.md") {
				t.Errorf("it does not say where to read on: %q", printed)
			}
		})
	}
}

func TestLogIsForPeople(t *testing.T) {
	var out strings.Builder
	slog.New(plainHandler{&out}).Info("root made", "suite", "sid", "seconds", 70)
	if want := "   root made (suite=sid, seconds=70)\n"; out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}

func TestReaderThatGoesEndsTheDemo(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out := &lockedWriter{w: w, gone: cancel}
	if _, err := out.Write([]byte("read\n")); err != nil || ctx.Err() != nil {
		t.Fatalf("with a reader: %v, %v", err, ctx.Err())
	}
	r.Close()
	if _, err := out.Write([]byte("not read\n")); err == nil || ctx.Err() == nil {
		t.Errorf("without a reader: %v, %v", err, ctx.Err())
	}
}
