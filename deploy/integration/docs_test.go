package integration

import (
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/doctest"
)

// docsNotRun are the commands of the pages that are not run, by how they begin, and
// why.
var docsNotRun = map[string]string{
	"go test ./deploy/integration -run TestEveryPairBuilds": "that test runs anyway",
	"go test -run '^$' -bench .":                            "it measures, for half an hour",
	"promtool check rules":                                  "deploy/prometheus has a test that runs it",
	"README.md: make test":                                  "it runs this test",
}

// docsFail are commands that fail, as their pages show, by how they begin.
var docsFail = map[string]string{
	"echo \"ssh://mac x86_64-linux - four\" | nix-dispatch machines check -": "the line is broken",
	"nix-dispatch ping 'ssh://old":                                           "sshd does not run there",
	"docs/troubleshooting.md: nix-dispatch doctor":                           "it finds a problem",
}

// docsBefore is what pages take for granted before the commands that begin so; a page
// goes before its own.
var docsBefore = map[string]func(*docs){
	"README.md: nix-dispatch status":                            (*docs).allUp,
	"docs/commands.md: nix-dispatch status":                     (*docs).holdOne,
	"nix-dispatch history":                                      (*docs).reset,
	"nix-dispatch explain --system x86_64-linux --features kvm": (*docs).allSorts,
	"nix build --builders":                                      (*docs).reset,
	"docs/troubleshooting.md: nix-dispatch doctor":              (*docs).switchedOff,
	"apt install":                   (*docs).bringPackage,
	"docs/install.md: make install": (*docs).removePackage,
	"systemctl --user":              (*docs).usersOwn,
}

// begins tells whether a command begins so, on its page if it begins with one.
func begins(c doctest.Command, begin string) bool {
	return strings.HasPrefix(c.Text, begin) || strings.HasPrefix(c.Page+": "+c.Text, begin)
}

// amongDocs tells whether a command is one of those of a table, which begin so.
func amongDocs(table map[string]string, c doctest.Command) bool {
	for begin := range table {
		if begins(c, begin) {
			return true
		}
	}
	return false
}

// TestDocs types what the pages say, each on a host as it takes it for granted, and
// compares what is printed with what they say is printed.
func TestDocs(t *testing.T) {
	t.Parallel()
	texts, err := doctest.Pages("../..")
	if err != nil {
		t.Fatal(err)
	}
	var all []doctest.Command
	d := newDocs(t)
	for name, text := range texts {
		commands, err := doctest.Commands(name, text)
		if err != nil {
			t.Error(err)
		}
		all = append(all, commands...)
		commands = slices.DeleteFunc(commands, func(c doctest.Command) bool { return amongDocs(docsNotRun, c) })
		if len(commands) == 0 {
			continue
		}
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			d := d.forPage(t, name, commands)
			for _, c := range commands {
				d.try(c)
			}
		})
	}
	for _, begin := range slices.Concat(slices.Collect(maps.Keys(docsNotRun)), slices.Collect(maps.Keys(docsFail)), slices.Collect(maps.Keys(docsBefore))) {
		if !slices.ContainsFunc(all, func(c doctest.Command) bool { return begins(c, begin) }) {
			t.Errorf("%q is in no page", begin)
		}
	}
}

// try types a command.
func (d *docs) try(c doctest.Command) {
	d.t.Helper()
	for begin, before := range docsBefore {
		if begins(c, begin) {
			before(d)
		}
	}
	printed, err := d.typed(c.With(d.numbers))
	if (err != nil) != amongDocs(docsFail, c) {
		d.t.Errorf("%s: %v, which it should not be. It printed:\n%s", c, err, printed)
		return
	}
	numbers, err := doctest.Match(c.Output, printed)
	if err != nil {
		d.t.Errorf("%s: %v. It printed:\n%s", c, err, printed)
	}
	maps.Copy(d.numbers, numbers)
}

// inCheckout tells whether a command is meant to be typed in a checkout: those with
// make, go and what they build.
func inCheckout(c doctest.Command) bool {
	program, _, _ := strings.Cut(c.Text, " ")
	return slices.Contains([]string{"make", "go", "promtool"}, program)
}

// typed runs a command where its page means it to be.
func (d *docs) typed(c doctest.Command) (printed string, err error) {
	ctx, cancel := context.WithTimeout(d.t.Context(), 10*time.Minute)
	defer cancel()
	var cmd *exec.Cmd
	if inCheckout(c) {
		cmd = exec.CommandContext(ctx, "sh", "-e", "-c", c.Text)
		cmd.Dir = d.checkout
		cmd.Env = append(os.Environ(), "NIX_DISPATCH_FLEET_CACHE="+d.cache, "VERSION=v1.0")
		if !nightly { // xz takes more of the processor than all else that is typed
			cmd.Env = append(cmd.Env, "COMPRESSION=none")
		}
		if strings.HasPrefix(c.Text, "make install") {
			cmd.Env = append(cmd.Env, "DESTDIR="+d.client.Root())
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		defer func() { // what it has left in the background
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}()
	} else {
		cmd = d.client.Command(ctx, c.User, "sh", "-e", "-c", c.Text)
		if c.User == "alice" {
			cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+alicesRuntime)
		}
	}
	cmd.WaitDelay = time.Second
	var out syncBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // something in the background has its output
	}
	return out.String(), err
}
