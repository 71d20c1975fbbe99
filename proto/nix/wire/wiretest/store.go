package wiretest

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"

	"nixdispatch/proto/nix"
)

// Path makes a store path in the default store directory whose hash part holds
// the number n.
func Path(n int, name string) nix.StorePath {
	digits := []byte("00000000000000000000000000000000")
	for i := len(digits) - 1; n > 0; i, n = i-1, n/32 {
		digits[i] = nix.Base32Alphabet[n%32]
	}
	return nix.StorePath(nix.DefaultStoreDir + "/" + string(digits) + "-" + name)
}

// FileNAR is the NAR of a regular file.
func FileNAR(content string) []byte {
	var b bytes.Buffer
	for _, s := range []string{"nix-archive-1", "(", "type", "regular", "contents", content, ")"} {
		AppendString(&b, s)
	}
	return b.Bytes()
}

// AppendString writes a string in Nix's encoding.
func AppendString(b *bytes.Buffer, s string) {
	n := uint64(len(s))
	for i := range 8 {
		b.WriteByte(byte(n >> (8 * i)))
	}
	b.WriteString(s)
	b.Write(make([]byte, -len(s)&7))
}

// Info describes a NAR as the contents of path.
func Info(path nix.StorePath, nar []byte, refs ...nix.StorePath) nix.PathInfo {
	return nix.PathInfo{Path: path, NarHash: sha256.Sum256(nar), NarSize: uint64(len(nar)), References: refs}
}

// A BuildRequest is what a fake server is asked to build.
type BuildRequest struct {
	DrvPath nix.StorePath
	// Drv is nil if the build was asked for by name only.
	Drv     *nix.BasicDerivation
	Options nix.BuildOptions
	// Log adds a line to the build's log. The serve protocol drops it.
	Log func(line string)
}

// A Store is a Nix store in memory. Set the exported fields before it is used;
// the methods are safe for concurrent use.
type Store struct {
	// Build does a build; it may add outputs to the store with Put. Without it
	// builds fail.
	Build func(BuildRequest) nix.BuildResult
	// Outputs tells the outputs of a derivation in the store; nil, or a nil map,
	// is a derivation that the store does not have.
	Outputs func(drvPath nix.StorePath) map[string]nix.StorePath
	// Substitute is asked for a path that is not valid, where the client asks for
	// substitution; it may add it with Put.
	Substitute func(nix.StorePath)
	// BeforeValid is called when a client asks which of paths are valid.
	BeforeValid func(paths []nix.StorePath)
	// BeforeAdd is called when a client has sent the info of a path and before
	// its NAR is read; an error refuses the path.
	BeforeAdd func(nix.PathInfo) error

	mu    sync.Mutex
	paths map[nix.StorePath]object
	roots []nix.StorePath
}

type object struct {
	info nix.PathInfo
	nar  []byte
}

// Put adds or replaces a path, unchecked. The store keeps nar.
func (s *Store) Put(info nix.PathInfo, nar []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.paths == nil {
		s.paths = make(map[nix.StorePath]object)
	}
	s.paths[info.Path] = object{info, nar}
}

// PutFile adds a path that is a regular file and returns its info.
func (s *Store) PutFile(path nix.StorePath, content string, refs ...nix.StorePath) nix.PathInfo {
	nar := FileNAR(content)
	info := Info(path, nar, refs...)
	s.Put(info, nar)
	return info
}

// Remove makes a path invalid.
func (s *Store) Remove(path nix.StorePath) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.paths, path)
}

// Get returns a path's info and NAR; ok is false if the path is not valid.
func (s *Store) Get(path nix.StorePath) (info nix.PathInfo, nar []byte, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.paths[path]
	return o.info, o.nar, ok
}

// Valid returns those of paths that are valid, after an attempt to substitute
// the others if that is asked for.
func (s *Store) Valid(paths []nix.StorePath, substitute bool) []nix.StorePath {
	if s.BeforeValid != nil {
		s.BeforeValid(paths)
	}
	var valid []nix.StorePath
	for _, p := range paths {
		_, _, ok := s.Get(p)
		if !ok && substitute && s.Substitute != nil {
			s.Substitute(p)
			_, _, ok = s.Get(p)
		}
		if ok {
			valid = append(valid, p)
		}
	}
	return valid
}

// Add adds a path as a client's upload: its NAR must match the info and its
// references must be valid. The store keeps nar.
func (s *Store) Add(info nix.PathInfo, nar []byte) error {
	if sha256.Sum256(nar) != info.NarHash {
		return fmt.Errorf("hash mismatch importing path '\x1b[35;1m%s\x1b[0m'", info.Path) // in colour, as Nix says it
	}
	for _, ref := range info.References {
		if _, _, ok := s.Get(ref); !ok && ref != info.Path {
			return fmt.Errorf("path '%s' is not valid", ref)
		}
	}
	info.Ultimate = false
	s.Put(info, nar)
	return nil
}

// AddRoots takes temporary roots.
func (s *Store) AddRoots(paths ...nix.StorePath) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roots = append(s.roots, paths...)
}

// Roots returns all temporary roots that were taken, in order.
func (s *Store) Roots() []nix.StorePath {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.roots)
}

// RunBuild calls Build.
func (s *Store) RunBuild(req BuildRequest) nix.BuildResult {
	if s.Build == nil {
		return nix.BuildResult{Status: nix.MiscFailure, ErrorMsg: "this store does not build"}
	}
	return s.Build(req)
}

// SplitTarget tells whether a target names a derivation's outputs, "x.drv!out" or
// "x.drv", or another path.
func SplitTarget(target string) (drv, path nix.StorePath) {
	before, _, built := strings.Cut(target, "!")
	if p := nix.StorePath(before); built || p.IsDerivation() {
		return p, ""
	}
	return "", nix.StorePath(target)
}
