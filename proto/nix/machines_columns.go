package nix

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
)

// schemes are those of Nix's stores that can build.
var schemes = []string{
	"auto", "daemon", "local", "local-overlay", "mounted-ssh-ng", "ssh", "ssh-ng", "unix",
}

// A machineEntry is one entry of a machines file while its columns are read.
type machineEntry struct {
	p       *machinesParser
	at      Position
	columns []string
	bad     bool
}

// machine reads one entry. It looks at all columns, so that one run shows
// everything wrong.
func (p *machinesParser) machine(entry string, at Position) {
	e := machineEntry{p: p, at: at, columns: strings.FieldsFunc(entry, isBlank)}
	m := Machine{Source: at}
	e.storeURI(&m)
	m.SystemTypes = e.set(1, p.opts.DefaultSystems)
	m.SSHKey, _ = e.column(2)
	m.MaxJobs = e.maxJobs()
	m.SpeedFactor = e.speedFactor()
	m.SupportedFeatures = e.set(5, nil)
	m.MandatoryFeatures = e.set(6, nil)
	m.SSHPublicHostKey = e.hostKey()
	if n := len(columnNames); len(e.columns) > n {
		p.warn(MachineError{
			Source: at, Column: -1, Found: strings.Join(e.columns[n:], " "),
			Expected: fmt.Sprintf("%d columns; the rest is ignored", n),
		})
	}
	if !e.bad {
		p.machines = append(p.machines, m)
	}
}

func isBlank(c rune) bool { return c == ' ' || c == '\t' || c == '\r' || c == '\n' }

// column is the text of a column and whether it is set.
func (e *machineEntry) column(i int) (string, bool) {
	if i >= len(e.columns) || e.columns[i] == "-" {
		return "", false
	}
	return e.columns[i], true
}

func (e *machineEntry) problem(column int, expected string, cause error) MachineError {
	return MachineError{
		Source: e.at, Column: column, Name: columnNames[column],
		Found: e.columns[column], Expected: expected, Err: cause,
	}
}

func (e *machineEntry) fail(column int, expected string, cause error) {
	e.bad = true
	e.p.fail(e.problem(column, expected, cause))
}

func (e *machineEntry) warn(column int, expected string, cause error) {
	e.p.warn(e.problem(column, expected, cause))
}

func (e *machineEntry) storeURI(m *Machine) {
	const expected = `a store URI such as "ssh://user@host" or a host name`
	uri, ok := e.column(0)
	if !ok {
		e.fail(0, expected, nil)
		return
	}
	ref, err := ParseStoreReferenceWarn(CompleteStoreURI(uri), func(message string) {
		e.warn(0, `parameters like "?compress=true"`, errors.New(message))
	})
	if err != nil {
		e.fail(0, expected, err)
		return
	}
	if !slices.Contains(schemes, ref.Scheme) {
		e.warn(0, "a scheme of a store that can build, such as ssh or ssh-ng", nil)
	}
	m.Ref, m.StoreURI = ref, ref.String()
}

// set reads a column of names with commas between.
func (e *machineEntry) set(i int, unset []string) []string {
	text, ok := e.column(i)
	if !ok {
		return slices.Clone(unset)
	}
	return sortedSet(strings.FieldsFunc(text, func(c rune) bool { return c == ',' }))
}

func (e *machineEntry) maxJobs() int {
	text, ok := e.column(3)
	if !ok {
		return 1
	}
	// Nix's conversion takes a plus sign.
	n, err := strconv.ParseUint(strings.TrimPrefix(text, "+"), 10, 32)
	if err != nil {
		e.fail(3, fmt.Sprintf("a whole number from 0 to %d", uint32(math.MaxUint32)), nil)
		return 0
	}
	if n == 0 {
		e.warn(3, "a number above 0; with 0 the machine never builds", nil)
	}
	return int(n)
}

// speedFactor follows Nix in taking 0 for 1, but refuses nan and inf, with
// which no machine compares.
func (e *machineEntry) speedFactor() float64 {
	text, ok := e.column(4)
	if !ok {
		return 1
	}
	plain := !strings.ContainsFunc(text, func(c rune) bool { return !strings.ContainsRune("0123456789+-.eE", c) })
	f, err := strconv.ParseFloat(text, 64)
	// Nix keeps a float of 32 bits.
	if single := float64(float32(f)); !plain || err != nil || f < 0 || math.IsInf(single, 0) {
		e.fail(4, "a finite number of 0 or more such as 1.5", nil)
	} else if single == 0 {
		return 1
	}
	return f
}

func (e *machineEntry) hostKey() string {
	text, ok := e.column(7)
	if !ok {
		return ""
	}
	const expected = `the base-64 of a line like "ssh-ed25519 AAAA... comment"`
	if _, err := nixBase64(text); err != nil {
		e.fail(7, expected, err)
	} else if _, err := DecodeHostKey(text); err != nil {
		// Nix takes it, and ssh may still know the host from its global file.
		e.warn(7, expected, err)
	}
	return text
}
