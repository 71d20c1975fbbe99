package nix

import (
	"fmt"
	"path"
	"strings"
)

// DefaultStoreDir is the store directory of practically every Nix store.
const DefaultStoreDir = "/nix/store"

const (
	hashPartLen = 32
	maxNameLen  = 211

	// Base32Alphabet is Nix's own base-32 alphabet, which leaves out e, o, t
	// and u. See src/libutil/base-nix-32.hh.
	Base32Alphabet = "0123456789abcdfghijklmnpqrsvwxyz"
)

// A StorePath is the absolute path of a store object, for example
// "/nix/store/s66mzxpvicwk07gjbjfw9izjfa797vsw-hello-2.12.1".
// [ParseStorePath] is the only way to make one from foreign text.
// The empty StorePath stands for "none".
type StorePath string

// ParseStorePath checks that s is a store path: a clean absolute store
// directory, a slash, 32 characters of Nix's base-32, a dash and a name of 1
// to 211 permitted characters.
//
// See src/libstore/path.cc (checkName, StorePath::StorePath).
func ParseStorePath(s string) (StorePath, error) {
	dir, base := path.Split(s)
	if dir == "" || dir == "/" || dir[0] != '/' || path.Clean(dir)+"/" != dir {
		return "", fmt.Errorf("parse store path %q: not directly in an absolute store directory", s)
	}
	if err := checkBase(base); err != nil {
		return "", fmt.Errorf("parse store path %q: %w", s, err)
	}
	return StorePath(s), nil
}

func checkBase(base string) error {
	if len(base) < hashPartLen+2 {
		return fmt.Errorf("too short")
	}
	for i := range hashPartLen {
		if strings.IndexByte(Base32Alphabet, base[i]) < 0 {
			return fmt.Errorf("illegal base-32 character %q in its hash", base[i])
		}
	}
	if base[hashPartLen] != '-' {
		return fmt.Errorf("no dash after its hash")
	}
	return checkName(base[hashPartLen+1:])
}

// checkName follows checkName of src/libstore/path.cc: '.' and '..' and names
// that begin with one of them and a dash are refused too.
func checkName(name string) error {
	if len(name) > maxNameLen {
		return fmt.Errorf("name longer than %d characters", maxNameLen)
	}
	if name == "." || name == ".." || strings.HasPrefix(name, ".-") || strings.HasPrefix(name, "..-") {
		return fmt.Errorf("name %q is not allowed", name)
	}
	for i := range len(name) {
		if !nameChar(name[i]) {
			return fmt.Errorf("illegal character %q in its name", name[i])
		}
	}
	return nil
}

func nameChar(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' ||
		strings.IndexByte("+-._?=", c) >= 0
}

// Dir is the store directory, without a slash at its end.
func (p StorePath) Dir() string { return path.Dir(string(p)) }

// Base is the last component: hash, dash and name.
func (p StorePath) Base() string { return path.Base(string(p)) }

// Name is what follows the hash, for example "hello-2.12.1"; "" for the empty path.
func (p StorePath) Name() string {
	if base := p.Base(); len(base) > hashPartLen {
		return base[hashPartLen+1:]
	}
	return ""
}

// IsDerivation tells whether the name ends in ".drv".
func (p StorePath) IsDerivation() bool { return strings.HasSuffix(string(p), ".drv") }
