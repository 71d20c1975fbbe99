package wire

import (
	"bufio"
	"encoding/binary"
	"io"
	"maps"
	"slices"
	"time"

	"nixdispatch/proto/nix"
)

// writeBuffer is large enough that a request with its paths is one write, and
// smaller than a frame, so that frames pass it uncopied.
const writeBuffer = 32 << 10

// A Writer encodes into Nix's wire encoding. It buffers, so call Flush before
// waiting for an answer; it keeps its first error, which Flush and Err return.
type Writer struct {
	bw  *bufio.Writer
	err error
}

// NewWriter makes a Writer to w.
func NewWriter(w io.Writer) *Writer {
	return &Writer{bw: bufio.NewWriterSize(w, writeBuffer)}
}

// Flush writes out what is buffered and returns the first error since the
// Writer was made.
func (w *Writer) Flush() error {
	if err := w.bw.Flush(); w.err == nil {
		w.err = err
	}
	return w.err
}

// Err is the first error of a write that has already happened.
func (w *Writer) Err() error { return w.err }

// Write writes raw bytes.
func (w *Writer) Write(p []byte) (int, error) {
	n, err := w.bw.Write(p)
	if w.err == nil {
		w.err = err
	}
	return n, err
}

// Uint64 writes an integer.
func (w *Writer) Uint64(v uint64) {
	w.Write(binary.LittleEndian.AppendUint64(w.bw.AvailableBuffer(), v)) //nolint:errcheck // kept in w.err
}

// Bool writes 1 or 0.
func (w *Writer) Bool(v bool) {
	if v {
		w.Uint64(1)
	} else {
		w.Uint64(0)
	}
}

// Time writes a time in seconds since 1970; the zero Time and every time before
// 1970 is 0.
func (w *Writer) Time(t time.Time) {
	if t.IsZero() || t.Unix() < 0 {
		w.Uint64(0)
		return
	}
	w.Uint64(uint64(t.Unix()))
}

// Seconds writes a duration in whole seconds, rounded up so that a limit never
// becomes 0, which means no limit. A negative one is 0.
func (w *Writer) Seconds(d time.Duration) {
	if d < 0 {
		d = 0
	}
	s := uint64(d / time.Second)
	if d%time.Second != 0 {
		s++
	}
	w.Uint64(s)
}

// String writes a string.
func (w *Writer) String(s string) {
	w.Uint64(uint64(len(s)))
	if _, err := w.bw.WriteString(s); w.err == nil {
		w.err = err
	}
	w.Padding(uint64(len(s)))
}

// Padding writes what must follow n bytes of data: zeros up to a multiple of 8.
func (w *Writer) Padding(n uint64) {
	if _, err := w.bw.WriteString("\x00\x00\x00\x00\x00\x00\x00"[:padding(int(n%8))]); w.err == nil {
		w.err = err
	}
}

// Strings writes a list of strings in its order.
func (w *Writer) Strings(list []string) {
	w.Uint64(uint64(len(list)))
	for _, s := range list {
		w.String(s)
	}
}

// StringSet writes strings sorted, as Nix writes sets.
func (w *Writer) StringSet(set []string) { w.Strings(sorted(set)) }

// StringMap writes a map of strings, sorted by key.
func (w *Writer) StringMap(m map[string]string) {
	w.Uint64(uint64(len(m)))
	for _, key := range slices.Sorted(maps.Keys(m)) {
		w.String(key)
		w.String(m[key])
	}
}

// StorePath writes a store path; "" stands for none where that is permitted.
func (w *Writer) StorePath(p nix.StorePath) { w.String(string(p)) }

// StorePathSet writes paths sorted, as Nix writes sets. It does not change the
// slice.
func (w *Writer) StorePathSet(set []nix.StorePath) {
	w.Uint64(uint64(len(set)))
	for _, p := range sorted(set) {
		w.StorePath(p)
	}
}

func sorted[T ~string](set []T) []T {
	if slices.IsSorted(set) {
		return set
	}
	set = slices.Clone(set)
	slices.Sort(set)
	return set
}
