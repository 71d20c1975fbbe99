package doctest

import (
	"fmt"
	"regexp"
	"strings"
)

// apiIntro is what API begins with.
const apiIntro = `# The gRPC interface

<!-- Made from proto/dispatch/v1/dispatch.proto: go test ./deploy/doctest -run TestAPIPage -update -->

`

const apiHow = `Any gRPC client can use it; ` + "`proto/dispatch/v1`" + ` has the code generated for Go, and gRPC's own health check answers
on the same socket. What ` + "`nix-dispatch`" + ` does, it does through these calls. Fields and calls are added, not changed: a
client ignores what it does not know, and an older daemon answers a newer client's calls that it lacks with
UNIMPLEMENTED.

`

var (
	protoRPC   = regexp.MustCompile(`^rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\);$`)
	protoBlock = regexp.MustCompile(`^(service|message|enum|oneof) (\w+) \{(\})?$`)
	protoField = regexp.MustCompile(`^(?:(repeated|optional) )?([\w.]+) (\w+) = (\d+);$`)
	protoValue = regexp.MustCompile(`^([A-Z0-9_]+) = (\d+);$`)
)

// API is the page about the gRPC interface, made of its proto file's text. It knows
// the forms that file uses, and no others.
func API(proto string) (string, error) {
	var b strings.Builder
	b.WriteString(apiIntro)
	var comment []string // of what comes next
	var inside []string  // kinds of the blocks around
	n := 0
	flow := func(indent string) string {
		text := paragraphs(comment, indent)
		comment = nil
		return text
	}
	for line := range strings.Lines(proto) {
		n++
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "//"):
			comment = append(comment, strings.TrimPrefix(strings.TrimPrefix(line, "//"), " "))
		case line == "" || strings.HasPrefix(line, "package ") || strings.HasPrefix(line, "import ") || strings.HasPrefix(line, "option "):
		case strings.HasPrefix(line, "syntax "):
			b.WriteString(flow(""))
			b.WriteString(apiHow)
		case line == "}":
			inside = inside[:len(inside)-1]
			if len(inside) == 0 {
				b.WriteString("\n")
			}
		case protoBlock.MatchString(line):
			m := protoBlock.FindStringSubmatch(line)
			switch {
			case m[1] == "service":
				fmt.Fprintf(&b, "## %s\n\n%s", m[2], flow(""))
			case m[1] == "oneof":
				fmt.Fprintf(&b, "* one of these, as `%s`:\n", m[2])
			case len(inside) > 0:
				fmt.Fprintf(&b, "* the words of `%s`:\n", m[2])
			default:
				fmt.Fprintf(&b, "## %s\n\n%s", m[2], flow(""))
			}
			if m[3] == "" {
				inside = append(inside, m[1])
			}
		case protoRPC.MatchString(line):
			m := protoRPC.FindStringSubmatch(line)
			fmt.Fprintf(&b, "### %s\n\n`%s%s` → `%s%s`\n\n%s", m[1], m[2], m[3], m[4], m[5], flow(""))
		case protoField.MatchString(line) && len(inside) > 0:
			m := protoField.FindStringSubmatch(line)
			kind := strings.TrimPrefix(m[2], "google.protobuf.")
			if m[1] != "" {
				kind = m[1] + " " + kind
			}
			item(&b, len(inside), fmt.Sprintf("`%s` (%s, %s)", m[3], kind, m[4]), flow("  "))
		case protoValue.MatchString(line) && len(inside) > 0:
			m := protoValue.FindStringSubmatch(line)
			item(&b, len(inside), fmt.Sprintf("`%s` (%s)", m[1], m[2]), flow("  "))
		default:
			return "", fmt.Errorf("dispatch.proto:%d: a form that the page is not made for: %q", n, line)
		}
	}
	return strings.TrimRight(b.String(), "\n") + "\n", nil
}

func item(b *strings.Builder, depth int, head, text string) {
	indent := strings.Repeat("  ", depth-1)
	text = strings.TrimSpace(strings.ReplaceAll(text, "\n", "\n"+indent))
	if text != "" {
		text = ": " + text
	}
	fmt.Fprintf(b, "%s* %s%s\n", indent, head, text)
}

// paragraphs is a comment as Markdown. A line that ends with a colon begins a list,
// whose items begin in a column of their own.
func paragraphs(comment []string, indent string) string {
	if len(comment) == 0 {
		return ""
	}
	var b strings.Builder
	for i, line := range comment {
		switch {
		case line == "":
			b.WriteString("\n")
			continue
		case regexp.MustCompile(`^  [A-Z_]+: `).MatchString(line):
			if i > 0 && !strings.HasPrefix(comment[i-1], "  ") {
				b.WriteString("\n")
			}
			line = "* " + strings.TrimSpace(line)
		case strings.HasPrefix(line, "    "):
			line = "  " + strings.TrimSpace(line)
		}
		if i > 0 && indent != "" {
			b.WriteString(indent)
		}
		b.WriteString(line + "\n")
	}
	return b.String() + "\n"
}
