package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// A Version is a protocol version as on the wire: the major number in the
// second lowest byte, the minor number in the lowest. Versions compare as
// numbers.
type Version uint64

// MakeVersion makes the version major.minor.
func MakeVersion(major, minor uint8) Version { return Version(major)<<8 | Version(minor) }

// Major is the part before the dot.
func (v Version) Major() uint64 { return uint64(v) >> 8 }

// Minor is the part after the dot.
func (v Version) Minor() uint64 { return uint64(v) & 0xff }

// String is the version as people write it, such as "1.38".
func (v Version) String() string { return fmt.Sprintf("%d.%d", v.Major(), v.Minor()) }

// A HandshakeFault says what went wrong in a handshake.
type HandshakeFault int

// The faults.
const (
	// Noise: what came was not the protocol, mostly a message of the remote shell
	// (a login script that prints, "command not found").
	Noise HandshakeFault = iota + 1
	// Closed: the peer ended, or the transport failed, before the handshake was over.
	Closed
	// UnsupportedVersion: the peer speaks the protocol in a version too old or
	// with another major number.
	UnsupportedVersion
)

// A HandshakeError is a handshake that failed. The connection is unusable.
type HandshakeError struct {
	// Protocol is the peer's program, "nix-store --serve" or "nix-daemon".
	Protocol string
	Fault    HandshakeFault
	// Got holds up to 200 of the peer's first bytes, of Noise. They are foreign.
	Got []byte
	// Version is the peer's, of UnsupportedVersion, and Oldest the oldest accepted.
	Version, Oldest Version
	// Err is the transport's error, of Closed.
	Err error
	// Greeted tells, of Closed, that the peer's greeting had come, but not all that
	// has to follow it.
	Greeted bool
}

func (e *HandshakeError) Error() string {
	switch e.Fault {
	case Noise:
		return fmt.Sprintf("%s handshake: the remote side printed %q instead of speaking the protocol", e.Protocol, e.Got)
	case Closed:
		when := "before"
		if e.Greeted {
			when = "after"
		}
		return fmt.Sprintf("%s handshake: connection ended %s the greeting: %v", e.Protocol, when, e.Err)
	default:
		return fmt.Sprintf("%s handshake: the remote side speaks version %v, need %v or a later %d.x",
			e.Protocol, e.Version, e.Oldest, e.Oldest.Major())
	}
}

// Unwrap gives the transport's error.
func (e *HandshakeError) Unwrap() error { return e.Err }

const (
	// noiseLen and noiseWait bound what is collected of a peer's noise for the
	// error message: a message of the shell arrives in one or two packets.
	noiseLen  = 200
	noiseWait = 200 * time.Millisecond
)

// Greeting reads a server's magic number and version and checks both. The
// version is the server's, which may be newer than ours. Every error is a
// [*HandshakeError].
//
// After Noise a goroutine may still read from the transport, until it is
// closed, and the Reader must not be used any more.
func (r *Reader) Greeting(protocol string, magic uint64, oldest Version) (Version, error) {
	fail := func(e HandshakeError) (Version, error) {
		e.Protocol = protocol
		r.Fail(&e)
		return 0, &e
	}
	want := binary.LittleEndian.AppendUint64(nil, magic)
	for i := range want {
		// Byte by byte, for noise may be shorter than a magic number.
		p := r.peek(i + 1)
		if p == nil {
			return fail(HandshakeError{Fault: Closed, Err: r.err})
		}
		if p[i] != want[i] {
			return fail(HandshakeError{Fault: Noise, Got: r.collect()})
		}
	}
	r.discard(len(want))
	v := Version(r.Uint64())
	switch {
	case r.err != nil:
		r.lateEOF()
		return fail(HandshakeError{Fault: Closed, Err: r.err})
	case v.Major() != oldest.Major() || v < oldest:
		return fail(HandshakeError{Fault: UnsupportedVersion, Version: v, Oldest: oldest})
	}
	return v, nil
}

// collect reads up to noiseLen bytes, as many as come soon.
func (r *Reader) collect() []byte {
	chunks := make(chan []byte, noiseLen) // never blocks the goroutine: a chunk has a byte or more
	go func() {
		defer close(chunks)
		for n := 0; n < noiseLen; {
			p := make([]byte, noiseLen-n)
			m, err := r.br.Read(p)
			if m > 0 {
				chunks <- p[:m]
			}
			if n += m; err != nil {
				return
			}
		}
	}()
	timer := time.NewTimer(noiseWait)
	defer timer.Stop()
	var got []byte
	for {
		select {
		case p, ok := <-chunks:
			if !ok {
				return got
			}
			got = append(got, p...)
		case <-timer.C:
			return got
		}
	}
}

// UnexpectedEOF makes an io.EOF an io.ErrUnexpectedEOF: a peer that ends while
// an answer is due did not end in order.
func UnexpectedEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
