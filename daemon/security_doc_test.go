package daemon

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every test that docs/security.md names to show a line of it is there, and so is
// every fault of a machine.
func TestSecurityDocNamesTestsThatExist(t *testing.T) {
	text, err := os.ReadFile("../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	var sources strings.Builder
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		sources.Write(source)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9_]+)`").FindAllStringSubmatch(string(text), -1)
	if len(names) < 30 {
		t.Errorf("%d tests are named", len(names))
	}
	for _, m := range names {
		if !strings.Contains(sources.String(), "\nfunc "+m[1]+"(") {
			t.Errorf("there is no %s", m[1])
		}
	}
	_, machines, _ := strings.Cut(string(text), "## What a machine may try")
	machines, _, _ = strings.Cut(machines, "\n## ")
	for line := range strings.Lines(machines) {
		cells := strings.Split(line, " | ")
		if len(cells) != 3 {
			continue
		}
		for _, m := range regexp.MustCompile("`([a-z -]+)`").FindAllStringSubmatch(cells[2], -1) {
			if !strings.Contains(sources.String(), `{name: "`+m[1]+`"`) && !strings.Contains(sources.String(), `t.Run("`+m[1]+`"`) {
				t.Errorf("there is no fault, or test, of the name %q", m[1])
			}
		}
	}
}
