package hookcall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"time"
)

const (
	// window is how much of the daemon's side may be on its way to us.
	window = 1 << 20
	// maxMessage bounds one message from the daemon; the largest holds 64 KiB of
	// a log, or the output paths of a derivation.
	maxMessage = 4 << 20
	// idleTime is how long the daemon may be silent before it is asked for a sign
	// of life, and then how long it may take for that: one that is stopped must
	// not keep a build for ever.
	idleTime = 30 * time.Second
)

// A StatusError is a call that the daemon ended, or that ended with the
// connection: then the code is Unavailable.
type StatusError struct {
	Code    Code
	Message string
}

func (e *StatusError) Error() string { return e.Message }

func lost(format string, args ...any) error {
	return &StatusError{Unavailable, fmt.Sprintf(format, args...)}
}

var errFrame = errors.New("malformed HTTP/2 frame")

// A Call is one Hook call on a connection of its own. After any error it is of no
// more use and must be closed.
//
// It is not safe for concurrent use, and does nothing between calls.
type Call struct {
	socket   socket
	deadline time.Time     // of the answer waited for; zero for any sign of life
	idle     time.Duration // idleTime, but in tests
	pong     time.Duration // idleTime, but in tests: for the sign of life
	pinged   bool          // the daemon was asked for a sign of life

	in      [2 * (frameHeaderSize + maxFrame)]byte
	inStart int // in[inStart:inEnd] is what was read and not yet used
	inEnd   int
	out     []byte // frames not yet sent

	message []byte   // the start of the daemon's next message, with its prefix
	next    int      // length of the message at the start of it, used up
	headers [][]byte // the response's headers and trailers, encoded
	// inHeaders is set while the last of headers goes on, lastHeaders if the
	// stream ends with it, ended when it has.
	inHeaders, lastHeaders, ended bool

	// What may be sent, and what was received but not yet given back.
	initialWindow, connWindow, streamWindow int64
	received                                uint32
}

// Dial connects to the daemon's socket, at most until deadline, whose passing is
// ErrNoAnswer. The caller must Close the call; that gives up a build it has.
func Dial(path string, deadline time.Time) (*Call, error) {
	s, err := connect(path, deadline)
	if err != nil {
		return nil, err
	}
	return newCall(s), nil
}

func newCall(s socket) *Call {
	c := &Call{socket: s, idle: idleTime, pong: idleTime, initialWindow: defaultWindow, connWindow: defaultWindow, streamWindow: defaultWindow}
	c.out = appendOpening(c.out)
	return c
}

// Close ends the call.
func (c *Call) Close() { c.socket.close() }

// Hello opens the conversation. It is sent with the first Try; a large one waits
// for the daemon, at most until deadline.
func (c *Call) Hello(h *Hello, deadline time.Time) error {
	c.deadline = deadline
	defer func() { c.deadline = time.Time{} }()
	return c.send(h.encode())
}

// Try asks, and waits for the reply until deadline, whose passing is ErrNoAnswer.
// The daemon's refusal, or its end, is a *StatusError.
func (c *Call) Try(t *Try, deadline time.Time) (*Reply, error) {
	c.deadline = deadline
	defer func() { c.deadline = time.Time{} }()
	if err := c.send(t.encode()); err != nil {
		return nil, err
	}
	m, err := c.Next()
	if err != nil {
		return nil, err
	}
	reply, ok := m.(Reply)
	if !ok {
		return nil, &StatusError{Internal, "it answered with something else than a reply"}
	}
	return &reply, nil
}

// Start says what to build with, after a Reply of Accept.
func (c *Call) Start(s *Start) error {
	if err := c.send(s.encode()); err != nil {
		return err
	}
	return c.flush()
}

// HandedOver answers HandOver.
func (c *Call) HandedOver() error {
	if err := c.send(encodeHandedOver()); err != nil {
		return err
	}
	return c.flush()
}

// Next waits for the daemon's next message. The daemon's end of the call, or its
// own, is a *StatusError; so is a silence of twice idleTime.
func (c *Call) Next() (Message, error) {
	c.message = append(c.message[:0], c.message[c.next:]...)
	c.next = 0
	for {
		data, ok, err := c.complete()
		switch {
		case err != nil:
			return nil, err
		case ok:
			m, err := decode(data)
			if err != nil {
				return nil, fmt.Errorf("message of nix-dispatchd: %w", err)
			}
			return m, nil
		case c.ended:
			return nil, c.status()
		}
		if err := c.flush(); err != nil {
			return nil, err
		}
		if err := c.readFrame(); err != nil {
			return nil, err
		}
	}
}

// Ready tells whether Next will return without waiting.
func (c *Call) Ready() bool {
	rest := c.message[c.next:]
	return len(rest) >= prefixSize && len(rest)-prefixSize >= int(binary.BigEndian.Uint32(rest[1:]))
}

// prefixSize is the length of what comes before each message: a byte that tells
// whether it is compressed, and its length.
const prefixSize = 5

// complete returns the message under way if all of it is there.
func (c *Call) complete() (data []byte, ok bool, err error) {
	if len(c.message) < prefixSize {
		return nil, false, nil
	}
	size := binary.BigEndian.Uint32(c.message[1:])
	if c.message[0] != 0 || size > maxMessage {
		return nil, false, fmt.Errorf("message of nix-dispatchd: %w", errMessage)
	}
	if len(c.message) < prefixSize+int(size) {
		return nil, false, nil
	}
	c.next = prefixSize + int(size)
	return c.message[prefixSize:c.next], true, nil
}

// send puts a message into frames, and sends those that the daemon's windows do
// not allow to be kept any longer.
func (c *Call) send(m fields) error {
	data := make([]byte, prefixSize, prefixSize+len(m))
	binary.BigEndian.PutUint32(data[1:], uint32(len(m))) //nolint:gosec // what Nix sends is bounded
	data = append(data, m...)
	for len(data) > 0 {
		n := min(int64(len(data)), maxFrame, c.connWindow, c.streamWindow)
		if n > 0 {
			c.out = appendFrame(c.out, frameData, 0, streamID, data[:n])
			data = data[n:]
			c.connWindow -= n
			c.streamWindow -= n
			continue
		}
		if c.ended {
			return c.status()
		}
		if err := c.flush(); err != nil {
			return err
		}
		if err := c.readFrame(); err != nil {
			return err
		}
	}
	return nil
}

// flush sends what there is to send.
func (c *Call) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	deadline := c.deadline
	if deadline.IsZero() {
		deadline = time.Now().Add(c.idle + c.pong)
	}
	err := c.socket.write(c.out, deadline)
	c.out = c.out[:0]
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrNoAnswer):
		return c.silent()
	default:
		return lost("connection lost: %v", err)
	}
}

// silent is the error for a deadline passed.
func (c *Call) silent() error {
	if !c.deadline.IsZero() {
		return ErrNoAnswer
	}
	return lost("%v", ErrNoAnswer)
}

// fill reads until n bytes are there.
func (c *Call) fill(n int) error {
	if len(c.in)-c.inStart < n {
		c.inEnd = copy(c.in[:], c.in[c.inStart:c.inEnd])
		c.inStart = 0
	}
	for c.inEnd-c.inStart < n {
		deadline := c.deadline
		if deadline.IsZero() {
			deadline = time.Now().Add(c.idle)
			if c.pinged {
				deadline = time.Now().Add(c.pong)
			}
		}
		got, err := c.socket.read(c.in[c.inEnd:], deadline)
		switch {
		case errors.Is(err, ErrNoAnswer):
			if !c.deadline.IsZero() || c.pinged {
				return c.silent()
			}
			c.pinged = true
			c.out = appendFrame(c.out, framePing, 0, 0, make([]byte, 8))
			if err := c.flush(); err != nil {
				return err
			}
			continue
		case err != nil:
			return lost("connection lost: %v", err)
		case got == 0:
			return lost("it closed the connection")
		}
		c.pinged = false
		c.inEnd += got
	}
	return nil
}

// readFrame reads one frame and does what it asks for.
func (c *Call) readFrame() error {
	if err := c.fill(frameHeaderSize); err != nil {
		return err
	}
	head := c.in[c.inStart:]
	size := int(head[0])<<16 | int(head[1])<<8 | int(head[2])
	f := frame{kind: head[3], flags: head[4], stream: binary.BigEndian.Uint32(head[5:]) & maxWindow}
	if size > maxFrame {
		return errFrame
	}
	if err := c.fill(frameHeaderSize + size); err != nil {
		return err
	}
	f.payload = c.in[c.inStart+frameHeaderSize : c.inStart+frameHeaderSize+size]
	c.inStart += frameHeaderSize + size
	return c.handle(f)
}

func (c *Call) handle(f frame) error {
	if f.stream != 0 && f.stream != streamID || c.inHeaders != (f.kind == frameContinuation) {
		return errFrame
	}
	switch f.kind {
	case frameData:
		return c.handleData(f)
	case frameHeaders, frameContinuation:
		return c.handleHeaders(f)
	case frameRSTStream:
		return lost("it broke the call off")
	case frameSettings:
		return c.handleSettings(f)
	case framePing:
		if len(f.payload) != 8 {
			return errFrame
		}
		if f.flags&flagAck == 0 {
			c.out = appendFrame(c.out, framePing, flagAck, 0, f.payload)
		}
	case frameGoAway:
		if len(f.payload) < 8 {
			return errFrame
		}
		if binary.BigEndian.Uint32(f.payload)&maxWindow < streamID {
			return lost("it is shutting down")
		}
	case frameWindowUpdate:
		return c.handleWindowUpdate(f)
	case framePushPromise:
		return errFrame
	}
	return nil
}

// handleData takes a part of a message, and gives the daemon its window back
// when half of it is used.
func (c *Call) handleData(f frame) error {
	size := uint32(len(f.payload)) //nolint:gosec // at most maxFrame
	if err := f.unpad(); err != nil {
		return err
	}
	if f.stream != streamID || c.ended || len(c.message)+len(f.payload) > maxMessage+window {
		return errFrame
	}
	c.message = append(c.message, f.payload...)
	c.ended = f.flags&flagEndStream != 0
	if c.received += size; c.received >= window/2 {
		c.out = appendWindowUpdate(c.out, 0, c.received)
		c.out = appendWindowUpdate(c.out, streamID, c.received)
		c.received = 0
	}
	return nil
}

// handleHeaders keeps headers and trailers: they are read only when the call has
// ended, which a build that succeeds does not wait for.
func (c *Call) handleHeaders(f frame) error {
	if f.kind == frameHeaders {
		if err := f.unpad(); err != nil {
			return err
		}
		c.headers = append(c.headers, nil)
		c.lastHeaders = f.flags&flagEndStream != 0
	}
	last := len(c.headers) - 1
	if f.stream != streamID || c.ended || last >= maxHeaderBlocks || len(c.headers[last])+len(f.payload) > maxHeaders {
		return errFrame
	}
	c.headers[last] = append(c.headers[last], f.payload...)
	c.inHeaders = f.flags&flagEndHeaders == 0
	c.ended = c.lastHeaders && !c.inHeaders
	return nil
}

func (c *Call) handleSettings(f frame) error {
	if f.flags&flagAck != 0 {
		return nil
	}
	size, err := parseSettings(f.payload)
	if err != nil {
		return err
	}
	if size >= 0 {
		c.streamWindow += size - c.initialWindow
		c.initialWindow = size
	}
	c.out = appendFrame(c.out, frameSettings, flagAck, 0, nil)
	return nil
}

func (c *Call) handleWindowUpdate(f frame) error {
	if len(f.payload) != 4 {
		return errFrame
	}
	grown := &c.connWindow
	if f.stream == streamID {
		grown = &c.streamWindow
	}
	*grown += int64(binary.BigEndian.Uint32(f.payload) & maxWindow)
	if *grown > maxWindow {
		return errFrame
	}
	return nil
}

// status is the error for the call's end by the daemon.
func (c *Call) status() error {
	headers, err := decodeHeaders(c.headers)
	if err != nil {
		return err
	}
	code, err := strconv.ParseUint(headers["grpc-status"], 10, 32)
	if err != nil {
		return &StatusError{Internal, fmt.Sprintf("it ended the call without a status (HTTP status %q)", headers[":status"])}
	}
	message := unescape(headers["grpc-message"])
	if code == uint64(OK) {
		return &StatusError{OK, "it ended the call"}
	}
	return &StatusError{Code(code), message} //nolint:gosec // an unknown one is treated as such
}

// unescape undoes the percent-encoding of grpc-message. What is not well formed
// stays as it is.
func unescape(s string) string {
	var b []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
				b = append(b, byte(c))
				i += 2
				continue
			}
		}
		b = append(b, s[i])
	}
	return string(b)
}
