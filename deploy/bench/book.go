package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// An entry is what a row came to, and under which conditions.
type entry struct {
	Row        string     `json:"row"`
	Work       string     `json:"work"`
	Conditions conditions `json:"conditions"`
	Figures    []figure   `json:"figures"`
}

// conditions are what the computer was and did when a row was begun.
type conditions struct {
	Time   time.Time `json:"time"`
	CPU    string    `json:"cpu"`
	Cores  int       `json:"cores"`
	Kernel string    `json:"kernel"`
	Go     string    `json:"go"`
	// Load is the number of processes that wanted to run, in the minute before.
	Load string `json:"load"`
}

func conditionsNow() conditions {
	c := conditions{Time: time.Now().UTC().Truncate(time.Second), Cores: runtime.NumCPU(), Go: runtime.Version()}
	c.Kernel = firstWord("/proc/sys/kernel/osrelease")
	c.Load = firstWord("/proc/loadavg")
	text, _ := os.ReadFile("/proc/cpuinfo") // left out where it is not to be had
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			c.CPU = strings.TrimSpace(value)
			break
		}
	}
	return c
}

// firstWord of a file, "?" if there is none.
func firstWord(file string) string {
	text, _ := os.ReadFile(file)
	words := strings.Fields(string(text))
	if len(words) == 0 {
		return "?"
	}
	return words[0]
}

// A book holds the last result of each row. It is kept in a JSON file.
type book struct {
	Entries []entry `json:"rows"`
}

// openBook reads a book; there need not be one. "" is an empty one.
func openBook(file string) (*book, error) {
	b := new(book)
	if file == "" {
		return b, nil
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return b, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, b); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return b, nil
}

// put adds an entry, in the place of an earlier one of the row.
func (b *book) put(e entry) {
	if n := slices.IndexFunc(b.Entries, func(old entry) bool { return old.Row == e.Row }); n >= 0 {
		b.Entries[n] = e
		return
	}
	b.Entries = append(b.Entries, e)
}

// measured are the entries of rows, in their order.
func (b *book) measured(rows []row) []entry {
	var out []entry
	for _, r := range rows {
		for _, e := range b.Entries {
			if e.Row == r.name {
				out = append(out, e)
			}
		}
	}
	return out
}

func (b *book) save(file string) error {
	if file == "" {
		return nil
	}
	data, err := json.MarshalIndent(b, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644) //nolint:gosec // for all to read
}

// What is between these lines of a Markdown file is the table.
const (
	tableBegin = "<!-- begin: table by make bench -->\n"
	tableEnd   = "<!-- end: table by make bench -->\n"
)

// insertInto replaces the table in a Markdown file; "" is none.
func (b *book) insertInto(file string, all []row) error {
	if file == "" {
		return nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok1 := strings.Cut(string(text), tableBegin)
	_, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok1 || !ok2 {
		return fmt.Errorf("%s: no place for the table: the lines %q and %q are missing", file, strings.TrimSpace(tableBegin), strings.TrimSpace(tableEnd))
	}
	var table strings.Builder
	writeTable(&table, b.measured(all))
	return os.WriteFile(file, []byte(before+tableBegin+table.String()+tableEnd+after), 0o644) //nolint:gosec // as it was
}
