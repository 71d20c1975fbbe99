// Command rules removes the product's most important rules, one at a time, and sees
// that a test fails without each: a rule that no test guards is lost in some later
// change.
//
//	rules [-only REGEXP]
//
// It runs at the top of a checkout and changes no file there: the code without the
// rule is an overlay of go test. The exit status is 0 if every rule has a test that
// fails, 1 if one has not, and 2 for bad usage.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("rules", flag.ContinueOnError)
	flags.SetOutput(stderr)
	only := flags.String("only", "", "check only the rules whose names match `REGEXP`")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	match, err := regexp.Compile(*only)
	if err != nil || flags.NArg() > 0 {
		fmt.Fprintln(stderr, "usage: rules [-only REGEXP]", errors.Join(err))
		return 2
	}
	checked, unguarded := 0, 0
	for _, r := range rules {
		if !match.MatchString(r.name) {
			continue
		}
		checked++
		start := time.Now()
		if err := check(ctx, r); err != nil {
			unguarded++
			fmt.Fprintf(stdout, "FAIL  %s: %v\n", r.name, err)
		} else {
			fmt.Fprintf(stdout, "ok    %s: %s fails without it (%.0f s)\n", r.name, r.test, time.Since(start).Seconds())
		}
		if ctx.Err() != nil {
			break
		}
	}
	fmt.Fprintf(stdout, "%d passed, %d failed\n", checked-unguarded, unguarded)
	if unguarded > 0 || checked == 0 {
		return 1
	}
	return 0
}

// testTimeout ends a test that hangs without its rule: that is a failure, too.
const testTimeout = 3 * time.Minute

// check returns nil if the rule's test fails when the rule is removed, by its own
// verdict: a test that does not compile or does not exist says nothing.
func check(ctx context.Context, r rule) error {
	dir, err := os.MkdirTemp("", "nix-dispatch-rules-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	overlay, err := r.overlay(dir)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "test", "-overlay", overlay, "-count=1", "-v", "-vet=off",
		"-timeout", testTimeout.String(), "-run", "^("+r.test+")$", r.pkg)
	cmd.WaitDelay = time.Minute
	out, err := cmd.CombinedOutput()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err == nil:
		return fmt.Errorf("%s passes without it", r.test)
	case !strings.Contains(string(out), "\n--- FAIL: ") && !strings.Contains(string(out), "panic: "):
		return fmt.Errorf("%s did not run:\n%s", r.test, out)
	default:
		return nil
	}
}

// overlay writes the file without the rule, and go's description of it, into dir.
func (r rule) overlay(dir string) (string, error) {
	text, err := os.ReadFile(r.file)
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(text), r.with); n != 1 {
		return "", fmt.Errorf("%s has the rule's code %d times, want once: %q", r.file, n, r.with)
	}
	file, err := filepath.Abs(r.file)
	if err != nil {
		return "", err
	}
	changed := filepath.Join(dir, filepath.Base(r.file))
	if err := os.WriteFile(changed, []byte(strings.Replace(string(text), r.with, r.without, 1)), 0o600); err != nil {
		return "", err
	}
	data, err := json.Marshal(map[string]map[string]string{"Replace": {file: changed}})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, data, 0o600)
}
