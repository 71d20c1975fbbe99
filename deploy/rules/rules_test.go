package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the table into docs/hacking.md")

// TestRulesAreInTheCode sees that the code of each rule is where the table says, and
// that its test exists: else the nightly check would say nothing about it.
func TestRulesAreInTheCode(t *testing.T) {
	t.Chdir("../..")
	for _, r := range rules {
		if _, err := r.overlay(t.TempDir()); err != nil {
			t.Errorf("%s: %v", r.name, err)
		}
		if !declares(t, r.pkg, r.test) {
			t.Errorf("%s: no %s in %s", r.name, r.test, r.pkg)
		}
	}
}

func declares(t *testing.T, pkg, test string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(pkg, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "\nfunc "+test+"(t *testing.T) {") {
			return true
		}
	}
	return false
}

// The table in docs/hacking.md stands between these lines.
const (
	begin = "| rule | test that fails without it |\n| --- | --- |\n"
	end   = "\n"
)

func TestRulesAreDocumented(t *testing.T) {
	const page = "../../docs/hacking.md"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	if !ok {
		t.Fatalf("%s has no table of rules", page)
	}
	got, after, _ := strings.Cut(rest, "\n\n")
	var want strings.Builder
	for _, r := range rules {
		fmt.Fprintf(&want, "| %s | `%s` in `%s` |\n", r.name, r.test, strings.TrimPrefix(r.pkg, "./"))
	}
	if *update {
		if err := os.WriteFile(page, []byte(before+begin+want.String()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want.String(), got+"\n"); diff != "" {
		t.Errorf("%s (-rules +page); go test ./deploy/rules -update writes it:\n%s", page, diff)
	}
}

// TestCheckTellsRulesApart runs the check on a package of its own: with a test that
// guards its rule, one that does not, and none.
func TestCheckTellsRulesApart(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":       "module example\n\ngo 1.24\n",
		"calc.go":      "package calc\n\nfunc half(n int) int { return n / 2 }\n",
		"calc_test.go": "package calc\n\nimport \"testing\"\n\nfunc TestHalf(t *testing.T) {\n\tif half(4) != 2 {\n\t\tt.Fatal()\n\t}\n}\n\nfunc TestNothing(t *testing.T) { half(4) }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	of := func(with, without, test string) rule { return rule{"a rule", "calc.go", with, without, ".", test} }
	for name, tt := range map[string]struct {
		rule rule
		want string // in the error; "" if there is none
	}{
		"guarded":          {of("n / 2", "n", "TestHalf"), ""},
		"unguarded":        {of("n / 2", "n", "TestNothing"), "passes without it"},
		"no such test":     {of("n / 2", "n", "TestDouble"), "passes without it"},
		"does not compile": {of("n / 2", "m", "TestHalf"), "did not run"},
		"not in the code":  {of("n / 3", "n", "TestHalf"), "0 times, want once"},
	} {
		err := check(t.Context(), tt.rule)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}
