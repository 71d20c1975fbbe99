package nix

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Bounds on what [ParseMachines] accepts: more is an error, not a larger list.
const (
	// MaxMachinesSize is for the text and all it includes, in bytes.
	MaxMachinesSize = 4 << 20
	// MaxMachineEntries is for machines and includes together.
	MaxMachineEntries = 10_000
	// maxIncludeDepth is for files that include files.
	maxIncludeDepth = 32
)

// MachinesOptions say how [ParseMachines] reads.
type MachinesOptions struct {
	// DefaultSystems are the systems of a machine that names none.
	DefaultSystems []string
	// File stands for the text in messages. If it is the path the text was read
	// from, a file that includes it again is noticed at once.
	File string
	// ReadFile reads an included file. It should refuse files larger than
	// MaxMachinesSize. An error that is fs.ErrNotExist means that the file is
	// skipped. If ReadFile is nil every include is an error.
	ReadFile func(path string) ([]byte, error)
	// Warn is called with what Nix accepts but is probably a mistake; it may be nil.
	Warn func(*MachineError)
}

// ParseMachines reads the value of the "builders" setting, which is also what a
// machines file holds:
//
//	text    = line, newline, line ...     from '#' to the end of a line is comment
//	line    = entry, ";", entry ...
//	entry   = nothing | "@" path | up to eight columns with blanks between; "-" means unset
//
// It returns every good entry in order, and an error for everything wrong with
// the others. Nix up to 2.28 cuts comments after it splits at ';' and knows no
// blanks around entries; what it accepts means the same here, but for a ';' in a comment.
//
// See src/libstore/machines.cc.
func ParseMachines(text string, opts MachinesOptions) ([]Machine, []*MachineError) {
	p := machinesParser{opts: opts, bytesLeft: MaxMachinesSize, entriesLeft: MaxMachineEntries}
	p.opts.DefaultSystems = sortedSet(slices.Clone(opts.DefaultSystems))
	p.text(text, opts.File)
	return p.machines, p.errs
}

type machinesParser struct {
	opts                   MachinesOptions
	bytesLeft, entriesLeft int
	chain                  []string // the files being read, outermost first
	machines               []Machine
	errs                   []*MachineError
}

func (p *machinesParser) fail(e MachineError) { p.errs = append(p.errs, &e) }

func (p *machinesParser) warn(e MachineError) {
	if p.opts.Warn != nil {
		p.opts.Warn(&e)
	}
}

// text reads a whole file. What it reads of an included one stays if the rest is bad.
func (p *machinesParser) text(text, file string) {
	if p.bytesLeft -= len(text); p.bytesLeft < 0 {
		p.fail(MachineError{
			Source: Position{File: file}, Column: -1, Found: fmt.Sprintf("%d bytes", len(text)),
			Expected: fmt.Sprintf("at most %d bytes in all files together", MaxMachinesSize),
		})
		return
	}
	p.chain = append(p.chain, file)
	defer func() { p.chain = p.chain[:len(p.chain)-1] }()
	at := Position{File: file}
	for line := range strings.SplitSeq(text, "\n") {
		at.Line++
		line, _, _ = strings.Cut(line, "#")
		for entry := range strings.SplitSeq(line, ";") {
			entry = strings.Trim(entry, " \t\r")
			if entry == "" {
				continue
			}
			if p.entriesLeft--; p.entriesLeft < 0 {
				if p.entriesLeft == -1 {
					p.fail(MachineError{
						Source: at, Column: -1, Found: entry,
						Expected: fmt.Sprintf("at most %d entries in all files together", MaxMachineEntries),
					})
				}
				return
			}
			if name, ok := strings.CutPrefix(entry, "@"); ok {
				p.include(strings.Trim(name, " \t\r"), at)
			} else {
				p.machine(entry, at)
			}
		}
	}
}

func (p *machinesParser) include(name string, at Position) {
	e := MachineError{Source: at, Column: -1, Found: "@" + name}
	if p.opts.ReadFile == nil {
		e.Expected = "no include here"
		p.fail(e)
		return
	}
	for i, file := range p.chain {
		if file != "" && path.Clean(file) == path.Clean(name) {
			e.Expected = "a file that is not being read already"
			e.Err = cycleError(append(slices.Clone(p.chain[i:]), name))
			p.fail(e)
			return
		}
	}
	if len(p.chain) > maxIncludeDepth {
		e.Expected = fmt.Sprintf("at most %d files one within the other", maxIncludeDepth)
		p.fail(e)
		return
	}
	text, err := p.opts.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return // as in Nix: the default setting names a file that need not exist
	}
	if err != nil {
		e.Expected, e.Err = "a readable file, or none", err
		p.fail(e)
		return
	}
	p.text(string(text), name)
}

func cycleError(files []string) error {
	for i, file := range files {
		files[i] = Position{File: file}.String()
	}
	return fmt.Errorf("include cycle: %s", strings.Join(files, " -> "))
}

// sortedSet sorts s and removes what is there twice.
func sortedSet(s []string) []string {
	slices.Sort(s)
	return slices.Compact(s)
}
