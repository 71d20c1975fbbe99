package integration

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"nixdispatch/deploy/doctest"
)

var (
	// usage is a call of one of the programs.
	usage  = regexp.MustCompile(`(?m)(?:^|[;&|(/])[ \t]*(nix-dispatch|nix-dispatchd)((?: +[^\s;&|)]+)*)`)
	option = regexp.MustCompile(`^--?[a-z][a-z-]*`)
	word   = regexp.MustCompile(`^[a-z][a-z-]+$`)
)

// TestDocsSpeakOfWhatExists checks that there are the subcommands and options that
// pages speak of, in commands and in passing.
func TestDocsSpeakOfWhatExists(t *testing.T) {
	t.Parallel()
	texts, err := doctest.Pages("../..")
	if err != nil {
		t.Fatal(err)
	}
	calls := 0
	for name, text := range texts {
		said := make(map[string]int)
		for span, line := range doctest.Spans(text) {
			if strings.HasPrefix(span, "nix-dispatch") { // elsewhere it may be a word of a sentence
				said[span] = line
			}
		}
		commands, err := doctest.Commands(name, text)
		if err != nil {
			t.Error(err)
		}
		for _, c := range commands {
			said[c.Text] = c.Line
		}
		for text, line := range said {
			for _, m := range usage.FindAllStringSubmatch(text, -1) {
				calls++
				if err := checkUsage(m[1], strings.Fields(m[2])); err != nil {
					t.Errorf("%s:%d: %q: %v", name, line, m[0], err)
				}
			}
		}
	}
	if calls < 50 {
		t.Errorf("only %d calls of our programs were found: this test sees nothing", calls)
	}
}

// helpOf is what a program says of itself, or of a subcommand; "" if there is none.
func helpOf(program, sub string) (string, error) {
	dir, err := binaries()
	if err != nil {
		return "", err
	}
	args := []string{sub, "--help"}
	if sub == "" {
		args = args[1:]
	}
	out, err := exec.Command(filepath.Join(dir, program), args...).CombinedOutput()
	return string(out), err
}

func checkUsage(program string, args []string) error {
	sub := ""
	if program == "nix-dispatch" && len(args) > 0 && word.MatchString(args[0]) {
		sub = args[0]
	}
	help, err := helpOf(program, sub)
	if err != nil {
		return fmt.Errorf("there is no subcommand %q: %w", sub, err)
	}
	for _, arg := range args {
		name := option.FindString(strings.TrimLeft(arg, "["))
		if name == "" || name == "--help" || name == "--version" {
			continue
		}
		if !regexp.MustCompile(`(?m)^ .*` + name + `(,| |$)`).MatchString(help) {
			return fmt.Errorf("there is no option %s", name)
		}
	}
	return nil
}
