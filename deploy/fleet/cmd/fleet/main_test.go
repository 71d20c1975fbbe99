package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"nixdispatch/deploy/fleet"
)

func TestWrongCommandLinesSayWhatIsWanted(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"", "fleet up"},
		{"fly", `unknown command "fly"`},
		{"up", "want a host name"},
		{"up --bind x a", "want /path/in/host=/path/here"},
		{"up --nonsense a", "nonsense"},
		{"run onlyhost", "want a host and a command"},
		{"cut", "want a host"},
		{"far name", "want a new name and a host"},
		{"proxy", "want --to"},
	} {
		var stdout, stderr bytes.Buffer
		err := run(t.Context(), strings.Fields(test.args), &stdout, &stderr)
		if !errors.Is(err, errUsage) || !strings.Contains(stderr.String(), test.want) || stdout.Len() > 0 {
			t.Errorf("fleet %s: %v, stdout %q, stderr %q; want %q", test.args, err, &stdout, &stderr, test.want)
		}
	}
}

func TestHelpIsNoError(t *testing.T) {
	for _, args := range [][]string{{"--help"}, {"help"}, {"up", "--help"}, {"run", "-h"}} {
		var stdout, stderr bytes.Buffer
		if err := run(t.Context(), args, &stdout, &stderr); err != nil {
			t.Errorf("fleet %q: %v", args, err)
		}
		if out := stdout.String() + stderr.String(); !strings.Contains(out, "fleet") {
			t.Errorf("fleet %q says %q", args, out)
		}
	}
}

func TestUnknownFleetIsNamed(t *testing.T) {
	t.Setenv("NIX_DISPATCH_FLEET_CACHE", t.TempDir())
	for _, args := range [][]string{{"run", "--fleet", "nobody", "a", "true"}, {"down", "--fleet=nobody"}, {"cut", "a", "--fleet", "nobody"}} {
		err := run(t.Context(), args, &bytes.Buffer{}, &bytes.Buffer{})
		if !errors.Is(err, fleet.ErrNoFleet) || !strings.Contains(err.Error(), `"nobody"`) {
			t.Errorf("fleet %q: %v", args, err)
		}
	}
}

func TestDetachedFleetLivesBetweenCommands(t *testing.T) {
	fleet.Require(t)
	name := fmt.Sprintf("cli-%d", os.Getpid())
	do := func(args ...string) (string, error) {
		var stdout, stderr bytes.Buffer
		err := run(t.Context(), append([]string{args[0], "--fleet", name}, args[1:]...), &stdout, &stderr)
		return stdout.String(), err
	}
	must := func(args ...string) string {
		t.Helper()
		out, err := do(args...)
		if err != nil {
			t.Fatalf("fleet %q: %v", args, err)
		}
		return out
	}
	t.Cleanup(func() {
		if f, err := fleet.Open(context.Background(), name, nil); err == nil {
			f.Close()
		}
	})
	must("up", "a", "b")
	must("up", "--suite", "bookworm", "c")
	if got := must("run", "a", "ssh", "c", "nix", "--version"); got != "nix (Nix) 2.8.0\n" {
		t.Errorf("c has %q", got)
	}
	var exit *exec.ExitError
	if _, err := do("run", "--user", "alice", "a", "sh", "-c", "exit 9"); !errors.As(err, &exit) || exit.ExitCode() != 9 {
		t.Errorf("run mirrors %v, want status 9", err)
	}
	must("cut", "a")
	must("freeze", "b")
	must("kill", "c")
	list := must("list")
	for host, state := range map[string]string{"a": "cut off", "b": "frozen", "c": "off"} {
		found := false
		for line := range strings.Lines(list) {
			found = found || strings.HasPrefix(line, "  "+host+" ") && strings.HasSuffix(line, " "+state+"\n")
		}
		if !found {
			t.Errorf("list does not say that %s is %s:\n%s", host, state, list)
		}
	}
	must("restore", "a")
	must("thaw", "b")
	must("boot", "c")
	must("run", "a", "ssh", "b", "ssh", "-V")
	must("run", "a", "ssh", "c", "true")
	must("rm", "b")
	if _, err := do("run", "b", "true"); err == nil || !strings.Contains(err.Error(), `no host "b"`) {
		t.Errorf("running in a removed host: %v", err)
	}
	must("down")
	if _, err := do("down"); !errors.Is(err, fleet.ErrNoFleet) {
		t.Errorf("down again: %v", err)
	}
}
