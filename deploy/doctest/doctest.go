// Package doctest reads the documentation as its tests do: the code blocks of
// Markdown pages, the commands in them, and what the pages say that these print.
//
// A code block is fenced and says what it is. Two kinds have commands:
//
//	sh       a script to paste, run as root
//	console  commands behind a prompt, "# " of root's shell or "$ " of alice's, each
//	         followed by what it prints; a command goes on after a backslash at
//	         the end of a line
//
// All other kinds (Languages) are files, output and drawings.
package doctest

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Languages are the words that a fence may have.
var Languages = []string{"sh", "console", "text", "nix", "ini", "json", "yaml", "promql", "proto", "go"}

// hidden is what no test would run in a block of text. Lines of drawings go on with
// dashes.
var hidden = regexp.MustCompile(`^(nix|nix-build|nix-dispatch|nix-dispatchd|systemctl|make|go|promtool|apt|apt-get) [^-]*(-{1,2}[a-z].*)?$`)

// A Block is one fenced code block.
type Block struct {
	Page string
	Line int // of its first line, from 1
	Lang string
	Text string
}

// Blocks returns the code blocks of a page. A fence without a language, or with
// one that is not among Languages, is an error, and so is a block by indentation:
// nobody could tell whether it has commands.
func Blocks(page, text string) ([]Block, error) {
	var blocks []Block
	var inside *Block
	blank, list := true, false
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimRight(line, "\r\n")
		fence, isFence := strings.CutPrefix(line, "```")
		switch {
		case inside != nil && isFence && fence == "":
			blocks = append(blocks, *inside)
			inside = nil
		case inside != nil:
			if inside.Lang == "text" && hidden.MatchString(line) {
				return nil, fmt.Errorf("%s:%d: a command in a block of text: make it sh or console", page, n)
			}
			inside.Text += line + "\n"
		case isFence:
			if !slices.Contains(Languages, fence) {
				return nil, fmt.Errorf("%s:%d: code block of %q: want one of %s", page, n, fence, strings.Join(Languages, ", "))
			}
			inside = &Block{Page: page, Line: n + 1, Lang: fence}
		case strings.HasPrefix(line, "    ") && blank && !list:
			return nil, fmt.Errorf("%s:%d: code block by indentation: fence it", page, n)
		case line != "" && line[0] != ' ':
			list = strings.HasPrefix(line, "* ") || strings.HasPrefix(line, "- ") || line[0] >= '0' && line[0] <= '9'
		}
		blank = line == ""
	}
	if inside != nil {
		return nil, fmt.Errorf("%s:%d: the code block has no end", page, inside.Line)
	}
	return blocks, nil
}

// A Command is something that a page tells its reader to type.
type Command struct {
	Page   string
	Line   int
	User   string // "root" or "alice"
	Text   string // for sh -c
	Output string // what it prints according to the page; "" if the page does not say
}

func (c Command) String() string { return fmt.Sprintf("%s:%d: %s", c.Page, c.Line, c.Text) }

// ofBuilds are the subcommands whose arguments are numbers of builds.
var ofBuilds = regexp.MustCompile(`^nix-dispatch (log|cancel|attach) `)

// With is the command with the numbers of builds that its page has replaced by those
// that they have here.
func (c Command) With(numbers map[string]string) Command {
	if ofBuilds.MatchString(c.Text) {
		words := strings.Fields(c.Text)
		for i, word := range words {
			words[i] = cmp.Or(numbers[word], word)
		}
		c.Text = strings.Join(words, " ")
	}
	return c
}

// Commands are the commands of the block, in order. A script is one.
func (b Block) Commands() ([]Command, error) {
	switch b.Lang {
	case "sh":
		return []Command{{Page: b.Page, Line: b.Line, User: "root", Text: b.Text}}, nil
	case "console":
	default:
		return nil, nil
	}
	var commands []Command
	continues := false
	n := b.Line - 1
	for line := range strings.Lines(b.Text) {
		n++
		user := map[string]string{"# ": "root", "$ ": "alice"}[line[:min(2, len(line))]]
		switch {
		case continues:
			commands[len(commands)-1].Text += line
		case user != "":
			commands = append(commands, Command{Page: b.Page, Line: n, User: user, Text: line[2:]})
		case len(commands) == 0:
			return nil, fmt.Errorf("%s:%d: output before the first command: want a prompt", b.Page, n)
		default:
			commands[len(commands)-1].Output += line
			continue
		}
		continues = strings.HasSuffix(strings.TrimRight(line, "\n"), `\`)
	}
	if len(commands) == 0 {
		return nil, fmt.Errorf("%s:%d: a console without a command", b.Page, b.Line)
	}
	return commands, nil
}

// Commands are all commands of a page, in order.
func Commands(page, text string) ([]Command, error) {
	blocks, err := Blocks(page, text)
	var all []Command
	for _, b := range blocks {
		commands, e := b.Commands()
		all = append(all, commands...)
		err = errors.Join(err, e)
	}
	return all, err
}

// Pages reads the README and all pages of docs: path in the repository -> text.
func Pages(root string) (map[string]string, error) {
	names, err := filepath.Glob(filepath.Join(root, "docs", "*.md"))
	if err != nil {
		return nil, err
	}
	texts := make(map[string]string)
	for _, name := range append(names, filepath.Join(root, "README.md")) {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		if name, err = filepath.Rel(root, name); err != nil {
			return nil, err
		}
		texts[name] = string(text)
	}
	return texts, nil
}

// Spans are the inline code spans of a page outside of its code blocks, with
// their lines.
func Spans(text string) map[string]int {
	spans := make(map[string]int)
	fenced := false
	n := 0
	for line := range strings.Lines(text) {
		n++
		if strings.HasPrefix(line, "```") {
			fenced = !fenced
			continue
		}
		if fenced {
			continue
		}
		for i, span := range strings.Split(line, "`") {
			if i%2 == 1 && spans[span] == 0 {
				spans[span] = n
			}
		}
	}
	return spans
}
