package cli

import (
	"fmt"
	"io"
	"strings"
)

// WriteMan writes the manual page of a program, in the man macros. Subcommands are
// sections of it. seeAlso are names such as "nix.conf(5)".
func (c *Command) WriteMan(w io.Writer, manSection, version string, seeAlso ...string) {
	var b strings.Builder
	fmt.Fprintf(&b, ".TH %s %s \"\" \"%s\"\n", roff(strings.ToUpper(c.Name)), manSection, roff("nix-dispatch "+version))
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(c.Name), roff(c.Summary))
	b.WriteString(".SH SYNOPSIS\n.nf\n")
	for _, line := range c.synopses("") {
		fmt.Fprintf(&b, "%s\n", roff(line))
	}
	b.WriteString(".fi\n.SH DESCRIPTION\n")
	sections := c.sections()
	writeManText(&b, sections[0].text)
	c.writeManOptions(&b, ".SH OPTIONS\n")
	if subs := c.shown(); len(subs) > 0 {
		b.WriteString(".SH SUBCOMMANDS\n")
		for _, sub := range subs {
			sub.writeManSubcommand(&b, c.Name)
		}
	}
	for _, s := range sections[1:] {
		fmt.Fprintf(&b, ".SH %s\n", roff(strings.ToUpper(s.title)))
		writeManText(&b, s.text)
	}
	for i, page := range seeAlso {
		name, number, _ := strings.Cut(strings.TrimSuffix(page, ")"), "(")
		if i == 0 {
			b.WriteString(".SH SEE ALSO\n")
		}
		comma := " ,"
		if i == len(seeAlso)-1 {
			comma = ""
		}
		fmt.Fprintf(&b, ".BR %s (%s)%s\n", roff(name), number, comma)
	}
	io.WriteString(w, b.String())
}

func (c *Command) writeManSubcommand(b *strings.Builder, program string) {
	fmt.Fprintf(b, ".SS %s\n", roff(c.synopses(program)[0]))
	sections := c.sections()
	writeManText(b, sections[0].text)
	c.writeManOptions(b, ".PP\nOptions:\n")
	for _, s := range sections[1:] {
		fmt.Fprintf(b, ".PP\n%s:\n", roff(s.title))
		writeManText(b, s.text)
	}
}

func (c *Command) writeManOptions(b *strings.Builder, heading string) {
	if !c.hasOptions() {
		return
	}
	b.WriteString(heading)
	for _, o := range c.options() {
		var names []string
		for _, name := range o.names {
			names = append(names, `\fB`+roff(name)+`\fR`)
		}
		head := strings.Join(names, ", ")
		if o.value != "" {
			head += ` \fI` + roff(o.value) + `\fR`
		}
		fmt.Fprintf(b, ".TP\n%s\n%s\n", head, roff(o.text))
	}
}

// writeManText writes paragraphs; what is indented stays as it is.
func writeManText(b *strings.Builder, text string) {
	const literal, endLiteral = ".PP\n.RS 4\n.nf\n", ".fi\n.RE\n"
	for i, paragraph := range strings.Split(text, "\n\n") {
		asIs := false
		if i > 0 && !strings.HasPrefix(paragraph, "  ") {
			b.WriteString(".PP\n")
		}
		for _, line := range strings.Split(paragraph, "\n") {
			code, indented := strings.CutPrefix(line, "  ")
			switch {
			case indented && !asIs:
				b.WriteString(literal)
			case !indented && asIs:
				b.WriteString(endLiteral)
			}
			asIs = indented
			fmt.Fprintf(b, "%s\n", roff(code))
		}
		if asIs {
			b.WriteString(endLiteral)
		}
	}
}

var roffEscapes = strings.NewReplacer(
	`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", `\(ga`, "^", `\(ha`, "~", `\(ti`, `"`, `\(dq`,
)

// roff makes text of a line, or an argument between double quotes, of any text.
func roff(text string) string {
	text = roffEscapes.Replace(text)
	if strings.HasPrefix(text, ".") {
		return `\&` + text
	}
	return text
}
