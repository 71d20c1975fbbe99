package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"nixdispatch/proto/nix"
)

// Errors of a [Reader]; they come wrapped with the numbers.
var (
	// ErrTooLong is a string or list longer than its limit; the error is a
	// [*LengthError].
	ErrTooLong = errors.New("longer than permitted")
	// ErrPadding is a string whose padding is not zero.
	ErrPadding = errors.New("non-zero padding")
	// ErrRange is an integer that its field cannot hold.
	ErrRange = errors.New("integer out of range")
)

// A LengthError is a string, list or frame longer than its limit. It wraps
// [ErrTooLong].
type LengthError struct {
	// What is "string", "list" or "frame".
	What string
	// Length is the one the peer announced, in bytes or elements.
	Length, Limit uint64
}

func (e *LengthError) Error() string {
	return fmt.Sprintf("%s of length %d, limit %d: %v", e.What, e.Length, e.Limit, ErrTooLong)
}

// Unwrap gives ErrTooLong.
func (e *LengthError) Unwrap() error { return ErrTooLong }

// readBuffer holds the largest string that is read without a temporary copy,
// and is the unit in which bulk data moves.
const readBuffer = 64 << 10

// A Reader decodes Nix's wire encoding. It keeps its first error.
//
// At the end of the input the error is io.EOF if not one byte of the value was
// there and io.ErrUnexpectedEOF otherwise.
type Reader struct {
	br  *bufio.Reader
	err error
}

// NewReader makes a Reader that reads ahead from r by up to 64 KiB.
func NewReader(r io.Reader) *Reader {
	return &Reader{br: bufio.NewReaderSize(r, readBuffer)}
}

// Err is the first error met, nil if there was none.
func (r *Reader) Err() error { return r.err }

// Fail makes err the reader's error, unless it has one. Callers use it for
// values that are well encoded and still wrong.
func (r *Reader) Fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

// peek gives the next n bytes without consuming them; n is at most readBuffer.
// It is nil after an error.
func (r *Reader) peek(n int) []byte {
	if r.err != nil {
		return nil
	}
	p, err := r.br.Peek(n)
	if err != nil {
		if err == io.EOF && len(p) > 0 {
			err = io.ErrUnexpectedEOF
		}
		r.err = err
		return nil
	}
	return p
}

func (r *Reader) discard(n int) { r.br.Discard(n) } //nolint:errcheck // only what was peeked

// Uint64 reads an integer.
func (r *Reader) Uint64() uint64 {
	p := r.peek(8)
	if p == nil {
		return 0
	}
	v := binary.LittleEndian.Uint64(p)
	r.discard(8)
	return v
}

// PeekUint64 gives the next integer and leaves it to be read; 0 after an error.
func (r *Reader) PeekUint64() uint64 {
	p := r.peek(8)
	if p == nil {
		return 0
	}
	return binary.LittleEndian.Uint64(p)
}

// Int reads an integer from 0 to limit; a larger one is [ErrRange].
func (r *Reader) Int(limit int) int {
	v := r.Uint64()
	if v > uint64(limit) {
		r.Fail(fmt.Errorf("%w: %d is above %d", ErrRange, v, limit))
		return 0
	}
	return int(v)
}

// Bool reads a truth value; as in Nix every number but 0 is true.
func (r *Reader) Bool() bool { return r.Uint64() != 0 }

// lastSecond is the end of the year 9999, beyond which time.Time has no
// customary text form.
const lastSecond = 253402300799

// Time reads a time in seconds since 1970; 0 is the zero Time.
func (r *Reader) Time() time.Time {
	if s := r.Int(lastSecond); s != 0 {
		return time.Unix(int64(s), 0)
	}
	return time.Time{}
}

// Count reads the length of a list, at most limit; more is [ErrTooLong]. It
// promises nothing of the elements: allocate as they come.
func (r *Reader) Count(limit int) int {
	n := r.Uint64()
	if n > uint64(limit) {
		r.Fail(&LengthError{What: "list", Length: n, Limit: uint64(limit)})
		return 0
	}
	return int(n)
}

func padding(n int) int { return -n & 7 }

// String reads a string of at most limit bytes; a longer one is [ErrTooLong].
func (r *Reader) String(limit int) string { return r.body(r.stringLen(limit)) }

// body reads a string's bytes and padding.
func (r *Reader) body(n int) string {
	if n+7 <= readBuffer {
		return string(r.shortString(n))
	}
	var b bytes.Buffer // grows with what arrives
	if _, err := io.CopyN(&b, r.br, int64(n)); err != nil {
		r.failRead(err)
		return ""
	}
	if r.Padding(uint64(n)); r.err != nil {
		return ""
	}
	return b.String()
}

// StringIn reads a string into buf and returns the part of buf that it fills.
// One that does not fit is [ErrTooLong].
func (r *Reader) StringIn(buf []byte) []byte {
	n := r.stringLen(min(len(buf), readBuffer-8))
	return buf[:copy(buf, r.shortString(n))]
}

func (r *Reader) stringLen(limit int) int {
	n := r.Uint64()
	if n > uint64(limit) {
		r.Fail(&LengthError{What: "string", Length: n, Limit: uint64(limit)})
	}
	if r.err != nil {
		return 0
	}
	return int(n)
}

// shortString consumes a string's bytes and padding and returns the bytes,
// which stay valid until the next read.
func (r *Reader) shortString(n int) []byte {
	if r.err != nil {
		return nil
	}
	p := r.peek(n + padding(n))
	if p == nil {
		r.lateEOF()
		return nil
	}
	for _, b := range p[n:] {
		if b != 0 {
			r.Fail(ErrPadding)
			return nil
		}
	}
	r.discard(len(p))
	return p[:n]
}

// lateEOF turns the end of the input inside a value into an unexpected one.
func (r *Reader) lateEOF() {
	if r.err == io.EOF {
		r.err = io.ErrUnexpectedEOF
	}
}

func (r *Reader) failRead(err error) {
	r.Fail(err)
	r.lateEOF()
}

// Padding reads what follows n bytes of data up to a multiple of 8, which must
// be zero ([ErrPadding]).
func (r *Reader) Padding(n uint64) {
	pad := padding(int(n % 8))
	if r.err != nil || pad == 0 {
		return
	}
	for _, b := range r.peek(pad) {
		if b != 0 {
			r.Fail(ErrPadding)
			return
		}
	}
	r.lateEOF()
	if r.err == nil {
		r.discard(pad)
	}
}

// Text reads a string and keeps its first limit bytes. What was cut is said at
// the end of the text; more than [MaxSkipped] in all is [ErrTooLong]. Nothing is
// checked about the bytes: they are foreign and may hold anything.
func (r *Reader) Text(limit int) string {
	n := r.Uint64()
	if n > MaxSkipped {
		r.Fail(&LengthError{What: "text", Length: n, Limit: MaxSkipped})
	}
	if r.err != nil {
		return ""
	}
	if n <= uint64(limit) {
		return r.body(int(n))
	}
	var b bytes.Buffer
	_, err := io.CopyN(&b, r.br, int64(limit))
	if err == nil {
		err = r.skip(n - uint64(limit))
	}
	if err != nil {
		r.failRead(err)
		return ""
	}
	r.Padding(n)
	fmt.Fprintf(&b, "[... %d bytes cut]", n-uint64(limit))
	return b.String()
}

func (r *Reader) skip(n uint64) error {
	_, err := r.br.Discard(int(n)) // at most MaxSkipped
	return err
}

// Strings reads a list of at most maxCount strings of at most maxLen bytes.
func (r *Reader) Strings(maxCount, maxLen int) []string {
	var list []string
	for n := r.Count(maxCount); n > 0 && r.err == nil; n-- {
		list = append(list, r.String(maxLen))
	}
	return list
}

// StringMap reads a map of at most maxCount pairs of strings of at most maxLen
// bytes.
func (r *Reader) StringMap(maxCount, maxLen int) map[string]string {
	m := make(map[string]string)
	for n := r.Count(maxCount); n > 0 && r.err == nil; n-- {
		key := r.String(maxLen)
		m[key] = r.String(maxLen)
	}
	return m
}

// StorePath reads a store path, which must be one.
func (r *Reader) StorePath() nix.StorePath {
	return r.storePath(r.String(MaxStorePath))
}

// OptStorePath reads a store path or nothing, which is "".
func (r *Reader) OptStorePath() nix.StorePath {
	s := r.String(MaxStorePath)
	if s == "" {
		return ""
	}
	return r.storePath(s)
}

func (r *Reader) storePath(s string) nix.StorePath {
	if r.err != nil {
		return ""
	}
	p, err := nix.ParseStorePath(s)
	if err != nil {
		r.Fail(err)
	}
	return p
}

// StorePaths reads a list or set of at most limit store paths, in the order of
// the wire.
func (r *Reader) StorePaths(limit int) []nix.StorePath {
	var list []nix.StorePath
	for n := r.Count(limit); n > 0 && r.err == nil; n-- {
		list = append(list, r.StorePath())
	}
	return list
}

// Read reads raw bytes, up to len(p). It is the way to data that has no
// length of its own.
func (r *Reader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	n, err := r.br.Read(p)
	if err != nil {
		r.err = err
	}
	return n, err
}

// CopyN copies n raw bytes to w in the pieces in which they arrive, without a
// buffer of its own, and returns w's error. The reader's own errors are in Err;
// the end of the input is io.ErrUnexpectedEOF.
func (r *Reader) CopyN(w io.Writer, n uint64) error {
	for n > 0 && r.err == nil {
		if r.br.Buffered() == 0 && r.peek(1) == nil {
			r.lateEOF()
			break
		}
		p := r.peek(int(min(n, uint64(r.br.Buffered()))))
		if _, err := w.Write(p); err != nil {
			return err
		}
		r.discard(len(p))
		n -= uint64(len(p))
	}
	return r.err
}
