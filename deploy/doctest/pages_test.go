package doctest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

const root = "../.."

func pages(t *testing.T) map[string]string {
	t.Helper()
	texts, err := Pages(root)
	if err != nil || len(texts) < 6 {
		t.Fatalf("%d pages (%v)", len(texts), err)
	}
	return texts
}

func TestEveryCodeBlockIsUnderstood(t *testing.T) {
	n := 0
	for name, text := range pages(t) {
		commands, err := Commands(name, text)
		if err != nil {
			t.Error(err)
		}
		n += len(commands)
	}
	if n < 20 {
		t.Errorf("only %d commands in all pages: this test sees nothing", n)
	}
}

func TestReadmeIsShort(t *testing.T) {
	if n := strings.Count(pages(t)["README.md"], "\n"); n > 200 {
		t.Errorf("README.md has %d lines, more than anybody reads", n)
	}
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	notSlug = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// anchors are the names that a page's headings have as targets of links.
func anchors(text string) map[string]bool {
	found := make(map[string]bool)
	for _, h := range heading.FindAllStringSubmatch(text, -1) {
		found[strings.ReplaceAll(notSlug.ReplaceAllString(strings.ToLower(h[1]), ""), " ", "-")] = true
	}
	return found
}

func TestLinksLeadSomewhere(t *testing.T) {
	texts := pages(t)
	for name, text := range texts {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			target, anchor, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			to := name
			if target != "" {
				to = filepath.Join(filepath.Dir(name), target)
			}
			if _, err := os.Stat(filepath.Join(root, to)); err != nil {
				t.Errorf("%s: link to %s: %v", name, m[1], err)
			} else if anchor != "" && !anchors(texts[to])[anchor] {
				t.Errorf("%s: link to %s: no such heading", name, m[1])
			}
		}
	}
}

// Every page is found from the README, directly or over another.
func TestEveryPageIsLinked(t *testing.T) {
	texts := pages(t)
	seen := map[string]bool{}
	var walk func(string)
	walk = func(name string) {
		if seen[name] || texts[name] == "" {
			return
		}
		seen[name] = true
		for _, m := range link.FindAllStringSubmatch(texts[name], -1) {
			target, _, _ := strings.Cut(m[1], "#")
			walk(filepath.Join(filepath.Dir(name), target))
		}
	}
	walk("README.md")
	for name := range texts {
		if !seen[name] {
			t.Errorf("no link leads from the README to %s", name)
		}
	}
}

var (
	testName   = regexp.MustCompile(`^(Test|Fuzz|Benchmark)[A-Z]\w*$`)
	makeTarget = regexp.MustCompile(`^(?:.* )?make ([a-z-]+)`)
)

// Tests and targets of make that pages name exist.
func TestNamedTestsAndTargetsExist(t *testing.T) {
	var sources strings.Builder
	for _, text := range files(t, "_test.go") {
		sources.WriteString(text)
	}
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for name, text := range pages(t) {
		for span, line := range Spans(text) {
			if testName.MatchString(span) {
				named++
				if !strings.Contains(sources.String(), "\nfunc "+span+"(") {
					t.Errorf("%s:%d: there is no %s", name, line, span)
				}
			}
			if m := makeTarget.FindStringSubmatch(span); m != nil {
				named++
				if !strings.Contains("\n"+string(makefile), "\n"+m[1]+":") {
					t.Errorf("%s:%d: there is no target of that name: %s", name, line, span)
				}
			}
		}
	}
	if named < 20 {
		t.Errorf("only %d names were found: this test sees nothing", named)
	}
}

// files reads the repository's files with this ending.
func files(t *testing.T, ending string) map[string]string {
	t.Helper()
	texts := make(map[string]string)
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(name, ending) {
			return err
		}
		text, err := os.ReadFile(name)
		texts[name] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return texts
}

var verb = regexp.MustCompile(`%[-+# 0]*[0-9.*]*[a-zA-Z]`)

// literals are all string literals of the repository's Go files, with "..." for
// what is filled in.
func literals(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for name, text := range files(t, ".go") {
		if strings.HasSuffix(name, ".pb.go") || strings.Contains(name, "deploy/doctest") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, text, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if text, ok := constant(n); ok {
				text = strings.ReplaceAll(text, "%q", `"..."`)
				all.WriteString(verb.ReplaceAllString(text, "...") + "\x00")
				return false
			}
			return true
		})
	}
	return all.String()
}

// constant is the value of a string literal, or of a sum with literals in it.
func constant(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.BasicLit:
		if n.Kind != token.STRING {
			return "", false
		}
		text, err := strconv.Unquote(n.Value)
		return text, err == nil
	case *ast.BinaryExpr:
		if n.Op != token.ADD {
			return "", false
		}
		a, okA := constant(n.X)
		b, okB := constant(n.Y)
		if !okA && !okB {
			return "", false
		}
		if !okA {
			a = "..."
		}
		if !okB {
			b = "..."
		}
		return a + b, true
	}
	return "", false
}

// isErrno tells whether it is the kernel that says so.
func isErrno(text string) bool {
	for n := range syscall.Errno(134) {
		if n.Error() == text {
			return true
		}
	}
	return false
}

// notQuoted are commands, files, and words of configurations.
var notQuoted = regexp.MustCompile(`^(nix|ssh|ssh-keygen|chsh|systemctl) |^[~/@?$-]|^[A-Z]\w+( 0)?$|^[a-z-]+$`)

// What troubleshooting.md quotes is in the source, or at least in a test that has
// met it, word for word between its dots.
func TestQuotedErrorsExist(t *testing.T) {
	texts, known := pages(t), literals(t)
	quotes := 0
	for row := range strings.Lines(texts["docs/troubleshooting.md"]) {
		cells := strings.Split(row, " | ")
		if !strings.HasPrefix(row, "| ") || len(cells) < 2 {
			continue
		}
		said := Spans(strings.TrimPrefix(cells[0], "| "))
		if len(cells) == 3 { // step, kind of failure, and what it looks like
			maps.Copy(said, Spans(cells[1]))
			maps.Copy(said, Spans(cells[2]))
		}
		maps.DeleteFunc(said, func(span string, _ int) bool { return notQuoted.MatchString(span) })
		for quote := range said {
			for part := range strings.SplitSeq(quote, "...") {
				part = strings.Trim(part, " :;,()")
				if len(part) < 4 {
					continue
				}
				quotes++
				if !strings.Contains(known, part) && !isErrno(part) {
					t.Errorf("docs/troubleshooting.md quotes %q, of which %q is nowhere in the source", quote, part)
				}
			}
		}
	}
	if quotes < 20 {
		t.Errorf("only %d quotes were found: this test sees nothing", quotes)
	}
	if strings.Contains(known, "nobody ever says "+fmt.Sprint(quotes)) {
		t.Error("everything is found, so this test sees nothing")
	}
}
