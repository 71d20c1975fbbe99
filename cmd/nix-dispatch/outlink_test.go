package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func TestOutLinks(t *testing.T) {
	got, err := outLinks("/home/alice/result", []*dispatchv1.Output{
		output(helloDrv, "out", helloOut), output(helloDrv, "doc", helloDoc), output(otherDrv, "out", otherOut),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []outLink{{"/home/alice/result", helloOut}, {"/home/alice/result-doc", helloDoc}, {"/home/alice/result-2", otherOut}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(outLink{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, bad := range []*dispatchv1.Output{output(helloDrv, "../x", helloOut), output(helloDrv, "out", "/etc/passwd")} {
		if got, err := outLinks("result", []*dispatchv1.Output{bad}); err == nil {
			t.Errorf("outLinks(%v) = %v, want an error", bad, got)
		}
	}
}

// fakeNixStore puts a stand-in for nix-store into PATH.
func fakeNixStore(t *testing.T, body string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "nix-store"), []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestBuildMakesOutLinks(t *testing.T) {
	fakeNixStore(t, `[ "$#,$1,$3" = 4,--add-root,--realise ] && ln -s "$4" "$2"`)
	t.Chdir(t.TempDir())
	code, _, stderr := runCommand(t.Context(), builtTwo(t).socket, "build", helloDrv, "--out-link", "result")
	if code != exitOK {
		t.Fatalf("status %d: %s", code, stderr)
	}
	for link, want := range map[string]string{"result": helloOut, "result-doc": helloDoc, "result-2": otherOut} {
		if got, err := os.Readlink(link); got != want {
			t.Errorf("%s -> %q, %v, want %q", link, got, err, want)
		}
	}
}

func TestBuildSaysWhyItCannotMakeALink(t *testing.T) {
	fakeNixStore(t, `echo "error: cannot create symlink; already exists" >&2; exit 1`)
	code, stdout, stderr := runCommand(t.Context(), builtTwo(t).socket, "build", helloDrv, "-o", "/x/result")
	if code != exitFailed || stdout != "" || !strings.Contains(stderr, `make link "/x/result"`) || !strings.Contains(stderr, "already exists") {
		t.Errorf("status %d, output %q, said %q", code, stdout, stderr)
	}
}
