// Package nar copies Nix archives: it finds where one ends in a stream of other
// things, checks that it is one, and holds no more of it than a fixed buffer.
//
// The format is Nix's src/libutil/archive.cc; the checks and the limits are
// those of parseDump in Nix 2.34.8. Its field order is the only one any Nix
// ever wrote, though readers before 2.24 took others too.
package nar

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"

	"nixdispatch/proto/nix/wire"
)

// Limits of the format, as in Nix 2.34.8.
const (
	maxDepth  = 64   // of directories in one another
	maxName   = 255  // bytes of an entry's name
	maxTarget = 4095 // bytes of a symbolic link's target
	maxTag    = 32   // bytes of a word of the format, of which the longest has 13

	magic = "nix-archive-1"
)

// ErrFormat is an archive that breaks the format's rules. It comes wrapped with
// what is wrong.
var ErrFormat = errors.New("bad NAR")

// ErrSize is an archive that is not as long as announced. It comes wrapped with
// what is wrong.
var ErrSize = errors.New("wrong NAR size")

// copyBuffer gathers the format's many short words into large writes.
const copyBuffer = 32 << 10

// Copy copies exactly one NAR from src to dst and returns how many bytes it
// wrote to dst.
//
// An archive that breaks the format is an error that wraps [ErrFormat], as soon
// as that shows; some bytes before it are copied by then. The end of src inside the archive
// is io.ErrUnexpectedEOF. After any error src is somewhere inside the archive and of
// no more use.
func Copy(dst io.Writer, src *wire.Reader) (int64, error) {
	return copyUpTo(math.MaxInt64, dst, src)
}

// CopySized is [Copy] for an archive that was announced to be size bytes long.
// Another length is an error that wraps [ErrSize], as soon as that shows: it
// does not wait for more than was announced.
func CopySized(size uint64, dst io.Writer, src *wire.Reader) (int64, error) {
	n, err := copyUpTo(int64(min(size, math.MaxInt64)), dst, src)
	if err == nil && uint64(n) != size {
		err = fmt.Errorf("%w: %d bytes, announced were %d", ErrSize, n, size)
	}
	return n, err
}

func copyUpTo(limit int64, dst io.Writer, src *wire.Reader) (int64, error) {
	count := &counter{w: dst, limit: limit}
	c := copier{src: src, dst: bufio.NewWriterSize(count, copyBuffer), limit: uint64(limit)}
	err := c.archive()
	if err == nil {
		err = c.dst.Flush()
	}
	if err != nil {
		return count.n, fmt.Errorf("copy NAR after %d bytes: %w", count.n, wire.UnexpectedEOF(err))
	}
	return count.n, nil
}

type counter struct {
	w     io.Writer
	n     int64
	limit int64
}

func (c *counter) Write(p []byte) (int, error) {
	if int64(len(p)) > c.limit-c.n {
		return 0, fmt.Errorf("%w: more than the %d bytes announced", ErrSize, c.limit)
	}
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

type copier struct {
	src   *wire.Reader
	dst   *bufio.Writer
	limit uint64
	names [maxDepth][maxName]byte // of the last entry of each open directory
	buf   [maxTarget]byte
}

func (c *copier) archive() error {
	if err := c.expect(magic); err != nil {
		return err
	}
	return c.node(0)
}

func (c *copier) node(depth int) error {
	if depth >= maxDepth {
		return fmt.Errorf("%w: directories nested deeper than %d", ErrFormat, maxDepth)
	}
	if err := c.expect("(", "type"); err != nil {
		return err
	}
	kind, err := c.word(maxTag)
	if err != nil {
		return err
	}
	switch string(kind) {
	case "regular":
		return c.regular()
	case "directory":
		return c.directory(depth)
	case "symlink":
		return c.symlink()
	default:
		return fmt.Errorf("%w: unknown file type %q", ErrFormat, kind)
	}
}

func (c *copier) regular() error {
	tag, err := c.word(maxTag)
	if err != nil {
		return err
	}
	if string(tag) == "executable" {
		if err := c.expect(""); err != nil {
			return err
		}
		if tag, err = c.word(maxTag); err != nil {
			return err
		}
	}
	if string(tag) != "contents" {
		return unexpected("contents", tag)
	}
	if err := c.contents(); err != nil {
		return err
	}
	return c.expect(")")
}

func (c *copier) contents() error {
	size := c.src.Uint64()
	if size > c.limit {
		return fmt.Errorf("%w: a file of %d bytes in an archive of %d", ErrSize, size, c.limit)
	}
	c.number(size)
	if err := c.src.CopyN(c.dst, size); err != nil {
		return err
	}
	c.src.Padding(size)
	c.pad(size)
	return c.srcErr()
}

// srcErr is the reader's error, as one of the format where it is.
func (c *copier) srcErr() error {
	err := c.src.Err()
	if errors.Is(err, wire.ErrTooLong) || errors.Is(err, wire.ErrPadding) {
		return fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return err
}

func (c *copier) directory(depth int) error {
	last := c.names[depth][:0]
	for {
		tag, err := c.word(maxTag)
		if err != nil {
			return err
		}
		if string(tag) == ")" {
			return nil
		}
		if string(tag) != "entry" {
			return unexpected("entry", tag)
		}
		if err := c.expect("(", "name"); err != nil {
			return err
		}
		name, err := c.word(maxName)
		if err != nil {
			return err
		}
		if err := checkEntry(name, last); err != nil {
			return err
		}
		last = append(last[:0], name...)
		if err := c.expect("node"); err != nil {
			return err
		}
		if err := c.node(depth + 1); err != nil {
			return err
		}
		if err := c.expect(")"); err != nil {
			return err
		}
	}
}

func checkEntry(name, last []byte) error {
	switch {
	case len(name) == 0, string(name) == ".", string(name) == "..", bytes.ContainsAny(name, "/\x00"):
		return fmt.Errorf("%w: invalid file name %q", ErrFormat, name)
	case bytes.Compare(name, last) <= 0:
		return fmt.Errorf("%w: directory not sorted, %q after %q", ErrFormat, name, last)
	}
	return nil
}

func (c *copier) symlink() error {
	if err := c.expect("target"); err != nil {
		return err
	}
	target, err := c.word(maxTarget)
	if err != nil {
		return err
	}
	if len(target) == 0 || bytes.IndexByte(target, 0) >= 0 {
		return fmt.Errorf("%w: invalid symlink target %q", ErrFormat, target)
	}
	return c.expect(")")
}

func (c *copier) expect(words ...string) error {
	for _, want := range words {
		got, err := c.word(maxTag)
		if err != nil {
			return err
		}
		if string(got) != want {
			return unexpected(want, got)
		}
	}
	return nil
}

func unexpected(want string, got []byte) error {
	return fmt.Errorf("%w: %q where %q was due", ErrFormat, got, want)
}

// word copies one string and returns it; it is valid until the next word.
func (c *copier) word(limit int) ([]byte, error) {
	s := c.src.StringIn(c.buf[:limit])
	if err := c.srcErr(); err != nil {
		return nil, err
	}
	c.number(uint64(len(s)))
	_, err := c.dst.Write(s)
	c.pad(uint64(len(s)))
	return s, err
}

// number and pad leave the error to the writes that follow: bufio.Writer keeps
// it.
func (c *copier) number(v uint64) {
	b := c.dst.AvailableBuffer()
	for i := range 8 {
		b = append(b, byte(v>>(8*i)))
	}
	c.dst.Write(b) //nolint:errcheck // kept by the bufio.Writer
}

func (c *copier) pad(n uint64) {
	c.dst.WriteString("\x00\x00\x00\x00\x00\x00\x00"[:-n&7]) //nolint:errcheck // kept by the bufio.Writer
}
