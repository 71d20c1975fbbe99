package cli

import (
	"embed"
	"fmt"
	"io"
	"slices"
	"strings"
)

//go:embed shell
var shellScripts embed.FS

// A Generator makes what goes with a program: its manual page, its shells' scripts,
// and what those ask it.
type Generator struct {
	Program *Command
	Version string
	// ManSection and SeeAlso are for WriteMan.
	ManSection string
	SeeAlso    []string
	// LookUp is for Complete.
	LookUp func(kind string) []Candidate
}

// Run handles the arguments after the program's name if they are "man",
// "completion SHELL" or "complete -- WORD...", none of which --help lists; else ok
// is false.
func (g *Generator) Run(args []string, w io.Writer) (ok bool, err error) {
	switch {
	case slices.Equal(args, []string{"man"}):
		g.Program.WriteMan(w, g.ManSection, g.Version, g.SeeAlso...)
	case len(args) == 2 && args[0] == "completion":
		err = g.script(args[1], w)
	case len(args) >= 2 && args[0] == "complete" && args[1] == "--":
		for _, c := range g.Program.Complete(args[2:], g.LookUp) {
			fmt.Fprintln(w, strings.TrimSuffix(c.Word+"\t"+c.About, "\t"))
		}
	default:
		return false, nil
	}
	return true, err
}

// script prints what a shell reads to complete the program's arguments.
func (g *Generator) script(shell string, w io.Writer) error {
	text, err := shellScripts.ReadFile("shell/" + shell)
	if err != nil {
		return fmt.Errorf("completion is for bash, zsh or fish, not for %q", shell)
	}
	function := strings.ReplaceAll(g.Program.Name, "-", "_")
	_, err = strings.NewReplacer("PROGRAM", g.Program.Name, "FUNCTION", function).WriteString(w, string(text))
	return err
}
