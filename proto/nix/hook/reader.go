package hook

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
)

const (
	// maxSettings and maxSettingValue bound the settings; Nix has about 200, and
	// a builders setting can hold a whole machines file.
	maxSettings     = 4096
	maxSettingValue = 8 << 20
	// maxRecorded bounds what is kept for a replay, in bytes.
	maxRecorded = 32 << 20

	// readAhead is at least what wire.NewReader wants, so that it reads from our
	// buffer instead of filling one of its own behind our back.
	readAhead = 64 << 10
)

// ErrTooLarge is a message of Nix that is larger than any honest one.
var ErrTooLarge = errors.New("build-hook message too large")

// A Try is Nix's question whether the hook will build a derivation.
type Try struct {
	// AmWilling tells whether the asking Nix has a free local job slot.
	AmWilling bool
	// System is the derivation's, such as "x86_64-linux", or "builtin".
	System  string
	DrvPath nix.StorePath
	// RequiredFeatures holds "ca-derivations" when the output paths are not
	// known beforehand.
	RequiredFeatures []string
}

// A Start is what Nix says after an accepting reply.
type Start struct {
	// Inputs is the closure of the inputs.
	Inputs []nix.StorePath
	// WantedOutputs are the names of the outputs that Nix lacks.
	WantedOutputs []string
}

// A Reader reads Nix's side of the conversation, in its order: [Reader.Settings]
// once, [Reader.Try] for each question, [Reader.Start] once after an accepting
// reply. It keeps the bytes of the settings and of the current Try for a
// replay. After an error other than io.EOF it is of no more use.
//
// It is not safe for concurrent use.
type Reader struct {
	tape     *tape
	br       *bufio.Reader
	wire     *wire.Reader
	settings []byte // raw
	try      []byte // raw, the last one
}

// NewReader makes a Reader of the hook's standard input. It reads ahead; what
// it has not consumed is in [Reader.Rest].
func NewReader(r io.Reader) *Reader {
	t := &tape{r: r}
	br := bufio.NewReaderSize(t, readAhead)
	return &Reader{tape: t, br: br, wire: wire.NewReader(br)}
}

// Settings reads the settings.
//
// The error is io.EOF if there was no input at all.
func (r *Reader) Settings() (*Settings, error) {
	s := new(Settings)
	var bad error
	for n := 0; ; n++ {
		more := r.wire.Bool()
		if err := r.wire.Err(); err != nil {
			return nil, readError("settings", err, n == 0)
		}
		if !more {
			break
		}
		if n == maxSettings {
			return nil, fmt.Errorf("read settings: more than %d: %w", maxSettings, ErrTooLarge)
		}
		name := r.wire.String(wire.MaxToken)
		value := r.wire.String(maxSettingValue)
		if err := r.wire.Err(); err != nil {
			return nil, readError("settings", err, false)
		}
		if err := s.set(name, value); err != nil && bad == nil {
			bad = err
		}
	}
	r.settings = r.consumed()
	if bad != nil {
		return nil, fmt.Errorf("read settings: %w", bad)
	}
	return s, nil
}

// Try reads the next question. The error is io.EOF when Nix has no more: at the
// end of the input and at any other word than "try", as the stock hook has it.
func (r *Reader) Try() (*Try, error) {
	word := r.wire.String(wire.MaxToken)
	if err := r.wire.Err(); err != nil {
		return nil, readError("try", err, true)
	}
	if word != "try" {
		return nil, io.EOF
	}
	t := &Try{
		AmWilling:        r.wire.Bool(),
		System:           r.wire.String(wire.MaxToken),
		DrvPath:          r.wire.StorePath(),
		RequiredFeatures: r.wire.Strings(wire.MaxTokens, wire.MaxToken),
	}
	if err := r.wire.Err(); err != nil {
		return nil, readError("try", err, false)
	}
	r.try = r.consumed()
	return t, nil
}

// Start reads the inputs and the wanted outputs. No replay is possible any more.
func (r *Reader) Start() (*Start, error) {
	r.tape.stop()
	r.settings, r.try = nil, nil
	s := &Start{
		Inputs:        r.wire.StorePaths(wire.MaxPaths),
		WantedOutputs: r.wire.Strings(wire.MaxTokens, wire.MaxToken),
	}
	if err := r.wire.Err(); err != nil {
		return nil, readError("inputs", err, false)
	}
	return s, nil
}

// Replay is what another hook must be given to come to where this one is: the
// bytes of the settings and of the last Try.
func (r *Reader) Replay() []byte { return bytes.Join([][]byte{r.settings, r.try}, nil) }

// Rest is the input after what was consumed. Use of it ends the Reader's.
func (r *Reader) Rest() io.Reader {
	r.tape.stop()
	return r.br
}

// consumed takes from the tape what was consumed since the last call.
func (r *Reader) consumed() []byte {
	return r.tape.take(r.br.Buffered())
}

func readError(what string, err error, mayEnd bool) error {
	if mayEnd && err == io.EOF {
		return err
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read %s from Nix: %w", what, err)
}

// A tape records what is read through it.
type tape struct {
	r       io.Reader
	buf     []byte
	stopped bool
}

func (t *tape) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if t.stopped {
		return n, err
	}
	if len(t.buf)+n > maxRecorded {
		return 0, fmt.Errorf("more than %d bytes: %w", maxRecorded, ErrTooLarge)
	}
	t.buf = append(t.buf, p[:n]...)
	return n, err
}

// take removes and returns the recording but for its last keep bytes.
func (t *tape) take(keep int) []byte {
	n := len(t.buf) - keep
	head := t.buf[:n:n]
	t.buf = bytes.Clone(t.buf[n:])
	return head
}

func (t *tape) stop() { t.buf, t.stopped = nil, true }
