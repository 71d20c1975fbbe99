package nix

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// Bounds on configuration files.
const (
	// MaxConfSize is for all files together, in bytes.
	MaxConfSize = 4 << 20
	// maxConfDepth is for files that include files.
	maxConfDepth = 32
)

// A ConfSource is where Nix finds its configuration.
type ConfSource struct {
	// Getenv looks up an environment variable; "" if it is not set.
	Getenv func(name string) string
	// Home is the user's home directory.
	Home string
	// ReadFile reads a file. It should refuse files larger than MaxConfSize. An error
	// that is fs.ErrNotExist means that there is none.
	ReadFile func(path string) ([]byte, error)
}

// ConfDir is the directory of the system's configuration.
func (c ConfSource) ConfDir() string {
	if dir := c.Getenv("NIX_CONF_DIR"); dir != "" {
		return path.Clean(dir)
	}
	return "/etc/nix"
}

// Setting returns the value that the configuration files and NIX_CONFIG give a
// setting, and whether they do; the last one wins. Words are separated by one
// blank in it. As in Nix, a file that is there and cannot be read is skipped: it may
// be root's only. The error names the line that Nix would reject.
//
// See parseConfigFiles in src/libutil/configuration.cc and loadConfFile in
// src/libstore/globals.cc (Nix 2.34.8).
func (c ConfSource) Setting(name string) (value string, found bool, err error) {
	p := &confParser{source: c, name: name, bytesLeft: MaxConfSize}
	for _, file := range append([]string{c.ConfDir() + "/nix.conf"}, c.userFiles()...) {
		text, err := c.ReadFile(file)
		if err != nil {
			continue
		}
		if err := p.text(string(text), file, 0); err != nil {
			return "", false, err
		}
	}
	if text := c.Getenv("NIX_CONFIG"); text != "" {
		if err := p.text(text, "NIX_CONFIG", 0); err != nil {
			return "", false, err
		}
	}
	return p.value, p.found, nil
}

// userFiles are the user's configuration files, the one that wins last.
func (c ConfSource) userFiles() []string {
	var files []string
	add := func(list, suffix string) {
		for _, entry := range strings.Split(list, ":") {
			if entry != "" {
				files = append([]string{entry + suffix}, files...)
			}
		}
	}
	if list := c.Getenv("NIX_USER_CONF_FILES"); list != "" {
		add(list, "")
		return files
	}
	or := func(value, other string) string {
		if value == "" {
			return other
		}
		return value
	}
	add(or(c.Getenv("XDG_CONFIG_HOME"), c.Home+"/.config"), "/nix/nix.conf")
	add(or(c.Getenv("XDG_CONFIG_DIRS"), "/etc/xdg"), "/nix/nix.conf")
	return files
}

type confParser struct {
	source    ConfSource
	name      string
	bytesLeft int
	value     string
	found     bool
}

// text reads a file's text, and what it includes.
func (p *confParser) text(text, file string, depth int) error {
	if p.bytesLeft -= len(text); p.bytesLeft < 0 {
		return fmt.Errorf("%s: more than %d bytes in all configuration files together", file, MaxConfSize)
	}
	at := Position{File: file}
	for line := range strings.SplitSeq(text, "\n") {
		at.Line++
		line, _, _ = strings.Cut(line, "#")
		words := strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune(" \t\n\r", r) })
		switch {
		case len(words) == 0:
		case len(words) == 2 && (words[0] == "include" || words[0] == "!include"):
			if err := p.include(words[1], words[0] == "!include", at, depth); err != nil {
				return err
			}
		case len(words) < 2 || words[1] != "=":
			return fmt.Errorf("%s: found %q, expected a line like \"name = value\"", at, clip(line))
		case words[0] == p.name:
			p.value, p.found = strings.Join(words[2:], " "), true
		}
	}
	return nil
}

func (p *confParser) include(name string, mayMiss bool, at Position, depth int) error {
	if !path.IsAbs(name) {
		name = path.Join(path.Dir(at.File), name)
	}
	if depth == maxConfDepth {
		return fmt.Errorf("%s: more than %d files one within the other", at, maxConfDepth)
	}
	text, err := p.source.ReadFile(name)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !mayMiss:
		return fmt.Errorf("%s: %w", at, err)
	case err != nil:
		return nil
	}
	return p.text(string(text), name, depth+1)
}
