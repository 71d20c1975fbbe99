package cli

import (
	"fmt"
	"io"
	"strings"
)

const (
	// textWidth is where lines of options and summaries are broken, in characters.
	textWidth = 90
	// optionWidth is the column where the text of options begins.
	optionWidth = 26
)

// WriteHelp prints what --help does. prefix is the program's name if c is a
// subcommand, else "".
func (c *Command) WriteHelp(w io.Writer, prefix string) {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: %s\n", strings.Join(c.synopses(prefix), "\n       "))
	sections := c.sections()
	if intro := sections[0].text; intro != "" {
		fmt.Fprintf(&b, "\n%s\n", intro)
	}
	c.writeSubcommands(&b)
	if c.hasOptions() {
		b.WriteString("\nOptions:\n")
		for _, o := range c.options() {
			writeOption(&b, o)
		}
	}
	for _, s := range sections[1:] {
		space := " "
		if strings.HasPrefix(s.text, "  ") {
			space = "\n"
		}
		fmt.Fprintf(&b, "\n%s:%s%s\n", s.title, space, s.text)
	}
	io.WriteString(w, b.String())
}

func (c *Command) writeSubcommands(b *strings.Builder) {
	names, args := 0, 0
	for _, sub := range c.shown() {
		names, args = max(names, len(sub.Name)), max(args, len(sub.Args))
	}
	if names > 0 {
		b.WriteString("\nSubcommands:\n")
	}
	for _, sub := range c.shown() {
		fmt.Fprintf(b, "  %-*s  %-*s  %s\n", names, sub.Name, args, sub.Args, sub.Summary)
	}
}

func writeOption(b *strings.Builder, o option) {
	head := "  " + strings.Join(o.names, ", ")
	if o.value != "" {
		head += " " + o.value
	}
	if len(head) > optionWidth-2 {
		fmt.Fprintln(b, head)
		head = ""
	}
	for _, line := range wrap(o.text, textWidth-optionWidth) {
		fmt.Fprintf(b, "%-*s%s\n", optionWidth, head, line)
		head = ""
	}
}

// wrap breaks text into lines of at most width characters, where its words allow.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		switch {
		case line == "":
			line = word
		case len(line)+1+len(word) > width:
			lines = append(lines, line)
			line = word
		default:
			line += " " + word
		}
	}
	return append(lines, line)
}
