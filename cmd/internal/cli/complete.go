package cli

import (
	"flag"
	"regexp"
	"slices"
	"strings"
)

// A Candidate is a word that may stand where the cursor is.
type Candidate struct {
	Word string
	// About is said beside it; it may be "".
	About string
}

// FileNames is the word of a candidate that stands for all names of files.
const FileNames = ":files"

// Complete lists what the last of words may become. words are the arguments after
// the program's name, the last one, under the cursor, being "" if it is not begun.
//
// An operand, or an option's value, is completed by what it is called: FILE, PATH,
// DIR and DRV are files, words in lower case are themselves, and lookUp knows the
// rest. It is asked for one kind at a time and may be nil.
func (c *Command) Complete(words []string, lookUp func(kind string) []Candidate) []Candidate {
	if len(words) == 0 {
		return nil
	}
	at, previous := words[len(words)-1], words[:len(words)-1]
	return fitting(c.possible(previous, at, lookUp), at)
}

// possible lists candidates, of which some may not fit what is there.
func (c *Command) possible(previous []string, at string, lookUp func(kind string) []Candidate) []Candidate {
	operands := 0
	for i := 0; i < len(previous); i++ {
		word := previous[i]
		f := c.flagOf(word)
		switch {
		case word == "--":
			return c.operand(operands+len(previous)-i-1, lookUp)
		case f != nil && !isBool(f) && !strings.Contains(word, "="):
			if i++; i == len(previous) {
				return valuesOf(f, "", lookUp)
			}
		case strings.HasPrefix(word, "-") && word != "-":
		default:
			if sub := c.subcommand(word); sub != nil && operands == 0 {
				return sub.possible(previous[i+1:], at, lookUp)
			}
			operands++
		}
	}
	if name, _, ok := strings.Cut(at, "="); ok && strings.HasPrefix(at, "-") {
		if f := c.flagOf(name); f != nil {
			return valuesOf(f, name+"=", lookUp)
		}
		return nil
	}
	if strings.HasPrefix(at, "-") {
		return c.optionCandidates()
	}
	list := c.operand(operands, lookUp)
	if operands == 0 {
		for _, sub := range c.shown() {
			list = append(list, Candidate{sub.Name, sub.Summary})
		}
	}
	return list
}

func (c *Command) subcommand(name string) *Command {
	for _, sub := range c.Commands {
		if sub.Name == name {
			return sub
		}
	}
	return nil
}

// flagOf is the option that a word names, or nil.
func (c *Command) flagOf(word string) *flag.Flag {
	name, _, _ := strings.Cut(word, "=")
	if trimmed := strings.TrimLeft(name, "-"); trimmed != name && len(name)-len(trimmed) <= 2 {
		return c.Flags.Lookup(trimmed)
	}
	return nil
}

func isBool(f *flag.Flag) bool {
	b, ok := f.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}

func (c *Command) optionCandidates() []Candidate {
	list := []Candidate{}
	for _, o := range c.options() {
		for _, name := range o.names {
			list = append(list, Candidate{name, firstClause(o.text)})
		}
	}
	return append(list, Candidate{"--help", "show all options"})
}

// firstClause is enough of an option's text for a list of them.
func firstClause(text string) string {
	if i := strings.IndexAny(text, ";("); i > 0 {
		text = text[:i]
	}
	return strings.TrimSpace(text)
}

// valuesOf lists values of an option; prefix stands before each.
func valuesOf(f *flag.Flag, prefix string, lookUp func(string) []Candidate) []Candidate {
	name, _ := flag.UnquoteUsage(f)
	list := wordsFor(name, lookUp)
	for i := range list {
		if list[i].Word != FileNames {
			list[i].Word = prefix + list[i].Word
		}
	}
	return list
}

var argWord = regexp.MustCompile(`[A-Za-z]+`)

// operand lists candidates for the operand of that number, from 0. The words of Args
// between blanks stand for one each, the last one for all that follow.
func (c *Command) operand(number int, lookUp func(string) []Candidate) []Candidate {
	all := strings.Fields(c.Args)
	if len(all) == 0 || number >= len(all) && !strings.Contains(all[len(all)-1], "...") {
		return nil
	}
	var list []Candidate
	for _, name := range argWord.FindAllString(all[min(number, len(all)-1)], -1) {
		for _, candidate := range wordsFor(name, lookUp) {
			if !slices.Contains(list, candidate) {
				list = append(list, candidate)
			}
		}
	}
	return list
}

func wordsFor(name string, lookUp func(string) []Candidate) []Candidate {
	switch {
	case name == "":
		return nil
	case name == "FILE" || name == "PATH" || name == "DIR" || name == "DRV":
		return []Candidate{{Word: FileNames}}
	case name == strings.ToLower(name):
		return []Candidate{{Word: name}}
	case lookUp == nil:
		return nil
	}
	return slices.Clone(lookUp(name))
}

// fitting keeps the candidates that begin with what is there.
func fitting(list []Candidate, at string) []Candidate {
	return slices.DeleteFunc(list, func(c Candidate) bool {
		return c.Word != FileNames && !strings.HasPrefix(c.Word, at)
	})
}
