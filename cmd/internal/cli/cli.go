// Package cli describes a command line once: --help, the manual page and what a
// shell completes are made of the same description and cannot differ.
package cli

import (
	"flag"
	"io"
	"regexp"
	"strings"
	"time"
)

// A Command describes a program or one of its subcommands. It is not safe for
// concurrent use: parsing changes the values behind Flags.
type Command struct {
	// Name is the program's or the subcommand's own name.
	Name string
	// Args names the operands, as "DRV..." or "[FILE|-]"; "" if there are none. The
	// words in it tell what a shell completes, see Complete.
	Args string
	// Summary says what it does, in a line without a full stop.
	Summary string
	// About says all else in paragraphs of plain text, no line of more than 90
	// characters. Lines that begin with two blanks stand as they are, the rest may be
	// filled. A paragraph that begins with a title and a colon ("Examples:", "Exit
	// status:") and what follows it come after the options.
	About string
	// Flags are its options. The name of an option's value is in back quotes in its
	// usage text, see flag.UnquoteUsage.
	Flags *flag.FlagSet
	// Commands are a program's subcommands.
	Commands []*Command
	// Hidden ones are not shown; programs call them.
	Hidden bool
	// Raw ones get all arguments unparsed.
	Raw bool
}

// NewFlags is a flag set that prints nothing and leaves exiting to the caller.
func NewFlags(name string) *flag.FlagSet {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.Usage = func() {}
	return flags
}

// Alias adds a second name for an option of flags.
func Alias(flags *flag.FlagSet, alias, name string) {
	flags.Var(flags.Lookup(name).Value, alias, sameAs+name)
}

// sameAs begins the usage text of an alias.
const sameAs = "same as --"

// Parse parses args, options and operands in any order, and returns the operands.
// What follows "--" are operands. The error is flag.ErrHelp if help was asked for.
func Parse(flags *flag.FlagSet, args []string) (operands []string, err error) {
	for {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		rest := flags.Args()
		if len(rest) == 0 {
			return operands, nil
		}
		if n := len(args) - len(rest); n > 0 && args[n-1] == "--" {
			return append(operands, rest...), nil
		}
		operands, args = append(operands, rest[0]), rest[1:]
	}
}

// An option is one option with all its names.
type option struct {
	names []string // with dashes, the short one first
	value string   // the name of its value; "" if it takes none
	text  string
}

// options lists a command's options by their names.
func (c *Command) options() []option {
	var list []option
	aliases := make(map[string][]string)
	c.Flags.VisitAll(func(f *flag.Flag) {
		if name, ok := strings.CutPrefix(f.Usage, sameAs); ok {
			aliases[name] = append(aliases[name], dashed(f.Name))
		}
	})
	c.Flags.VisitAll(func(f *flag.Flag) {
		if strings.HasPrefix(f.Usage, sameAs) {
			return
		}
		value, text := flag.UnquoteUsage(f)
		if d := defaultText(f.DefValue); d != "" {
			text += " (default " + d + ")"
		}
		list = append(list, option{append(aliases[f.Name], dashed(f.Name)), value, text})
	})
	return list
}

func dashed(name string) string {
	if len(name) == 1 {
		return "-" + name
	}
	return "--" + name
}

// defaultText is a default value for people; "" for one that goes without saying.
func defaultText(value string) string {
	if d, err := time.ParseDuration(value); err == nil && d > 0 {
		if strings.HasSuffix(value, "m0s") {
			value = strings.TrimSuffix(value, "0s")
		}
		return strings.Replace(value, "h0m", "h", 1)
	}
	switch value {
	case "0", "0s", "false":
		return ""
	}
	return value
}

// A section is a part of About.
type section struct {
	title string // "" for what comes before all titles
	text  string // paragraphs, with an empty line between
}

var titleLine = regexp.MustCompile(`^([A-Z][a-z]+(?: [a-z]+)?):\s*`)

// sections splits About; the first section has no title.
func (c *Command) sections() []section {
	list := []section{{}}
	for _, paragraph := range strings.Split(strings.Trim(c.About, "\n"), "\n\n") {
		last := &list[len(list)-1]
		if m := titleLine.FindStringSubmatch(paragraph); m != nil {
			list = append(list, section{m[1], paragraph[len(m[0]):]})
			// The title may stand alone, before lines that are indented.
			if strings.HasPrefix(paragraph[len(m[1]):], ":\n") {
				list[len(list)-1].text = paragraph[len(m[1])+len(":\n"):]
			}
			continue
		}
		if last.text != "" {
			last.text += "\n\n"
		}
		last.text += paragraph
	}
	return list
}

// shown are the subcommands that are not hidden.
func (c *Command) shown() []*Command {
	var list []*Command
	for _, sub := range c.Commands {
		if !sub.Hidden {
			list = append(list, sub)
		}
	}
	return list
}

// hasOptions tells whether there are options to speak of.
func (c *Command) hasOptions() bool {
	some := false
	c.Flags.VisitAll(func(*flag.Flag) { some = true })
	return some
}

// synopses are the ways to call the command; prefix is the program's name for a
// subcommand.
func (c *Command) synopses(prefix string) []string {
	if prefix != "" {
		prefix += " "
	}
	if len(c.Commands) == 0 {
		return []string{prefix + c.synopsis()}
	}
	if !c.hasOptions() {
		return []string{c.Name + " SUBCOMMAND [ARGUMENT]..."}
	}
	list := []string{c.synopsis()}
	for _, sub := range c.shown() {
		list = append(list, c.Name+" "+sub.synopsis())
	}
	return list
}

func (c *Command) synopsis() string {
	words := []string{c.Name}
	if c.hasOptions() {
		words = append(words, "[OPTION]...")
	}
	if c.Args != "" {
		words = append(words, c.Args)
	}
	return strings.Join(words, " ")
}
