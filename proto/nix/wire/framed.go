package wire

import (
	"encoding/binary"
	"errors"
	"io"
	"math"
)

const (
	frameHeader = 8
	// frameSize is the data of one frame. The receiver allocates a whole frame
	// (FramedSource in src/libutil/include/nix/util/serialise.hh), Nix itself
	// sends 32 KiB.
	frameSize = 64 << 10
	// maxFrame is what a receiver of Nix's can count in one frame.
	maxFrame = math.MaxUint32
)

var errFramedClosed = errors.New("write to a framed stream after its end")

// A FramedWriter writes one framed stream: any number of chunks, each with its
// length before it, and a length of 0 at the end.
type FramedWriter struct {
	w      *Writer
	buf    []byte // header and data of the frame being filled
	closed bool
}

// NewFramedWriter starts a framed stream on w, which must not be used otherwise
// until Close.
func NewFramedWriter(w *Writer) *FramedWriter {
	return &FramedWriter{w: w, buf: make([]byte, frameHeader, frameHeader+frameSize)}
}

// Write adds data to the stream.
func (f *FramedWriter) Write(p []byte) (int, error) {
	if f.closed {
		return 0, errFramedClosed
	}
	written := 0
	for len(p) > 0 {
		n := min(len(p), cap(f.buf)-len(f.buf))
		f.buf = append(f.buf, p[:n]...)
		p, written = p[n:], written+n
		if len(f.buf) < cap(f.buf) {
			break
		}
		if err := f.frame(); err != nil {
			return written, err
		}
	}
	return written, nil
}

func (f *FramedWriter) frame() error {
	if len(f.buf) == frameHeader {
		return f.w.Err()
	}
	binary.LittleEndian.PutUint64(f.buf, uint64(len(f.buf)-frameHeader))
	_, err := f.w.Write(f.buf)
	f.buf = f.buf[:frameHeader]
	return err
}

// Close writes what is left and the end of the stream. It does not flush the
// Writer below. Closing again does nothing.
func (f *FramedWriter) Close() error {
	if f.closed {
		return nil
	}
	f.closed = true
	if err := f.frame(); err != nil {
		return err
	}
	f.w.Uint64(0)
	return f.w.Err()
}

// A FramedReader reads the contents of one framed stream and ends with io.EOF
// at its end, having consumed it exactly.
type FramedReader struct {
	r    *Reader
	left uint64
	done bool
}

// NewFramedReader starts to read a framed stream from r, which must not be used
// otherwise until the stream's end.
func NewFramedReader(r *Reader) *FramedReader { return &FramedReader{r: r} }

// Read implements io.Reader.
func (f *FramedReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for f.left == 0 && !f.done {
		f.next()
	}
	if f.r.err != nil {
		return 0, f.r.err
	}
	if f.left == 0 {
		return 0, io.EOF
	}
	n, err := f.r.Read(p[:min(uint64(len(p)), f.left)])
	f.left -= uint64(n)
	if err == io.EOF { // of the stream below, inside a frame
		f.r.lateEOF()
		err = f.r.err
	}
	return n, err
}

func (f *FramedReader) next() {
	f.left = f.r.Uint64()
	if f.left > maxFrame {
		f.r.Fail(&LengthError{What: "frame", Length: f.left, Limit: maxFrame})
		f.left = 0
	}
	f.r.lateEOF()
	f.done = f.left == 0
}

// Drain reads and drops what is left of the stream.
func (f *FramedReader) Drain() error {
	_, err := io.Copy(io.Discard, f)
	return err
}
