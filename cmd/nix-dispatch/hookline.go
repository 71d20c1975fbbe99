package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// setBy stands behind the line that 'nix-dispatch enable' writes into nix.conf.
const setBy = " # set by 'nix-dispatch enable'"

// withHook returns the text of a nix.conf with build-hook set to the hook at that
// path. A line of ours is replaced, whoever wrote it; another's is an error.
func withHook(text, hook string) (string, error) {
	line := "build-hook = " + hook + setBy
	var lines []string
	done := false
	for n, old := range splitLines(text) {
		switch value, ok := hookValue(old); {
		case !ok:
			lines = append(lines, old)
		case !isOurs(value):
			return "", fmt.Errorf("line %d sets build-hook to %q, which is not nix-dispatch: take that out first", n+1, value)
		case !done:
			if program, _, arguments := hookProgram(value); program == hook && !arguments {
				line = old // as it is
			}
			lines = append(lines, line)
			done = true
		}
	}
	if !done {
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n") + "\n", nil
}

// withoutHook returns the text of a nix.conf without the lines that set build-hook to
// nix-dispatch.
func withoutHook(text string) string {
	var lines []string
	for _, line := range splitLines(text) {
		if value, ok := hookValue(line); !ok || !isOurs(value) {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		return ""
	}
	return strings.Join(lines, "\n") + "\n"
}

func splitLines(text string) []string {
	if text == "" {
		return nil
	}
	return strings.Split(strings.TrimSuffix(text, "\n"), "\n")
}

// hookValue is the value that a line of nix.conf gives to build-hook, if it does.
func hookValue(line string) (value string, ok bool) {
	line, _, _ = strings.Cut(line, "#")
	words := strings.Fields(line)
	if len(words) < 2 || words[0] != "build-hook" || words[1] != "=" {
		return "", false
	}
	return strings.Join(words[2:], " "), true
}

func isOurs(value string) bool {
	_, ours, _ := hookProgram(value)
	return ours
}

// A confFile is a configuration file that may be changed.
type confFile struct {
	path string
	text string
	info fs.FileInfo // nil if there is no such file
}

// readOwnConf reads a configuration file, unless it is a symbolic link: then others
// make it, as NixOS does.
func readOwnConf(path string) (confFile, error) {
	f := confFile{path: path}
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err == nil && info.Mode()&fs.ModeSymlink != 0 {
		target, _ := os.Readlink(path)
		err = fmt.Errorf("%s is a link to %s, which something else makes (NixOS, home-manager): "+
			"change it there; on NixOS the module services.nix-dispatch does it", path, target)
	}
	if err != nil {
		return f, err
	}
	text, err := readConfFile(path)
	f.text, f.info = string(text), info
	return f, err
}

// write replaces the file as a whole, or leaves it as it is. Owner and mode stay. A
// file with nothing in it is removed.
func (f confFile) write(text string) error {
	if text == "" {
		return os.Remove(f.path)
	}
	dir := filepath.Dir(f.path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	temp, err := os.CreateTemp(dir, ".nix.conf-*")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // fails once it is renamed
	_, err = temp.WriteString(text)
	mode := fs.FileMode(0o644)
	if f.info != nil {
		mode = f.info.Mode().Perm()
		if st, ok := f.info.Sys().(*syscall.Stat_t); ok {
			err = errors.Join(err, temp.Chown(int(st.Uid), int(st.Gid)))
		}
	}
	err = errors.Join(err, temp.Chmod(mode), temp.Sync(), temp.Close())
	if err == nil {
		err = os.Rename(temp.Name(), f.path)
	}
	return err
}
