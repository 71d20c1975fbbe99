package doctest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestNothingIsConcurrentWithoutTheRaceDetector looks for goroutines, channels and
// locks in the packages that the Makefile tests without the race detector.
func TestNothingIsConcurrentWithoutTheRaceDetector(t *testing.T) {
	text, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	plain := regexp.MustCompile(`(?m)^PLAIN +=((?:.*\\\n)*.*)`).FindSubmatch(text)
	if plain == nil {
		t.Fatal("the Makefile does not set PLAIN")
	}
	packages := strings.Fields(strings.ReplaceAll(string(plain[1]), "\\\n", " "))
	for _, name := range packages {
		dir, below := strings.CutSuffix(name, "/...")
		files := 0
		err := filepath.WalkDir(filepath.Join("../..", dir), func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && path != filepath.Join("../..", dir) && (!below || d.Name() == "testdata"):
				return fs.SkipDir
			case strings.HasSuffix(path, ".go"):
				files++
				for _, what := range concurrent(t, path) {
					t.Errorf("%s: the Makefile tests %s without the race detector, but there is %s", path, name, what)
				}
			}
			return nil
		})
		if err != nil || files == 0 {
			t.Errorf("%s of the Makefile's PLAIN has %d files, %v", name, files, err)
		}
	}
}

// concurrent lists what a Go file has that is for several goroutines.
func concurrent(t *testing.T, path string) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, i := range file.Imports {
		if i.Path.Value == `"sync"` || i.Path.Value == `"sync/atomic"` {
			found = append(found, "an import of "+i.Path.Value)
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n.(type) {
		case *ast.GoStmt:
			found = append(found, "a go statement")
		case *ast.ChanType:
			found = append(found, "a channel")
		}
		return true
	})
	return found
}
