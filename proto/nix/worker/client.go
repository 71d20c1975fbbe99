// Package worker is a client of Nix's worker protocol: of the local Nix daemon
// on its socket, and of "nix-daemon --stdio", the protocol behind ssh-ng://
// machines.
//
// It announces protocol 1.38 (Nix 2.26 and later) without features, and accepts
// servers from 1.34 on (Nix 2.8); Lix speaks 1.35.
//
// Every operation ends with the server's result or with its error, a
// [*RemoteError], which leaves the connection in order. Until then the server
// sends log messages, which go to the client's Events.
//
// Methods block. The owner cancels them by closing the transport: then every
// method returns an error. No goroutine outlives the method that started it.
//
// It follows src/libstore/worker-protocol-connection.cc, worker-protocol.cc,
// remote-store.cc and daemon.cc of Nix 2.34.8.
package worker

import (
	"errors"
	"fmt"
	"io"

	"nixdispatch/proto/nix/wire"
)

const (
	clientMagic = 0x6e697863
	serverMagic = 0x6478696f

	announced = wire.Version(1<<8 | 38)
	// oldest is Nix 2.8's. From there on every operation used here exists.
	oldest = wire.Version(1<<8 | 34)

	program = "nix-daemon"
)

// A Trust tells whether the server trusts this connection's user.
type Trust uint64

// What a server says of trust; servers before 1.35 say nothing.
const (
	TrustUnknown Trust = iota
	Trusted
	NotTrusted
)

// A Client speaks to one server process. It does one operation at a time and is
// not safe for concurrent use.
//
// A failure of the transport or of the protocol makes it unusable: every
// further call fails at once, with that error inside.
type Client struct {
	// Events receives what the server tells during operations; nil drops it. It
	// may be changed between operations.
	Events Events

	r          *wire.Reader
	w          *wire.Writer
	version    wire.Version
	nixVersion string
	trust      Trust
	err        error
}

// NewClient does the handshake with the server that reads w and writes r;
// events may be nil. Its errors are of type [*wire.HandshakeError], or
// [*RemoteError] if the server refuses the user in so many words.
func NewClient(r io.Reader, w io.Writer, events Events) (*Client, error) {
	c := &Client{Events: events, r: wire.NewReader(r), w: wire.NewWriter(w)}
	c.w.Uint64(clientMagic)
	c.w.Uint64(uint64(announced))
	// What the other side said before it closed tells more than that it closed.
	werr := c.w.Flush()
	v, err := c.r.Greeting(program, serverMagic, oldest)
	if err != nil {
		return nil, err
	}
	c.version = min(v, announced)
	if werr == nil {
		werr = c.introduce()
	}
	if werr == nil {
		werr = c.messages()
	}
	if remote, ok := errors.AsType[*RemoteError](werr); ok {
		return nil, fmt.Errorf("%s handshake: %w", program, remote)
	}
	if werr != nil {
		return nil, &wire.HandshakeError{Protocol: program, Fault: wire.Closed, Err: wire.UnexpectedEOF(werr), Greeted: true}
	}
	return c, nil
}

// introduce is the part of the handshake after the versions are known.
func (c *Client) introduce() error {
	if c.version >= 1<<8|38 {
		c.w.Strings(nil) // our features
		if err := c.w.Flush(); err != nil {
			return err
		}
		c.r.Strings(wire.MaxTokens, wire.MaxToken)
	}
	c.w.Uint64(0) // no CPU affinity
	c.w.Uint64(0) // reserve no space
	if err := c.w.Flush(); err != nil {
		return err
	}
	c.nixVersion = c.r.String(wire.MaxToken)
	if c.version >= 1<<8|35 {
		c.trust = Trust(c.r.Int(int(NotTrusted)))
	}
	return c.r.Err()
}

// Version is the version spoken: the older of the two sides'.
func (c *Client) Version() wire.Version { return c.version }

// NixVersion is the server's own version, such as "2.34.8". It is foreign text.
func (c *Client) NixVersion() string { return c.nixVersion }

// Trust tells whether the server trusts this connection's user.
func (c *Client) Trust() Trust { return c.trust }

// Err tells why the client is unusable; nil while it is usable.
func (c *Client) Err() error { return c.err }

// begin refuses an operation on an unusable client.
func (c *Client) begin(what string) error {
	if c.err != nil {
		return fmt.Errorf("%s: connection unusable after: %w", what, c.err)
	}
	return nil
}

// fail makes the client unusable and names the operation.
func (c *Client) fail(what string, err error) error {
	c.err = fmt.Errorf("%s: %w", what, wire.UnexpectedEOF(err))
	return c.err
}

// call does one operation: it sends the code and what request writes, and reads
// the answer with result, which may be nil. what names the operation in errors.
func (c *Client) call(what string, code opcode, request, result func()) error {
	if err := c.begin(what); err != nil {
		return err
	}
	c.w.Uint64(uint64(code))
	request()
	if err := c.w.Flush(); err != nil {
		return c.fail(what, err)
	}
	err := c.answer(result)
	if _, ok := errors.AsType[*RemoteError](err); ok {
		return fmt.Errorf("%s: %w", what, err)
	}
	if err != nil {
		return c.fail(what, err)
	}
	return nil
}

// answer reads an operation's messages and, if it went well, its result. An
// error that is not a [*RemoteError] is one of the connection.
func (c *Client) answer(result func()) error {
	if err := c.messages(); err != nil {
		return err
	}
	if result != nil {
		result()
	}
	return c.r.Err()
}

// A pipe is the reading side of operations that are sent without waiting.
type pipe struct {
	sent chan struct{} // one for each request begun; room for all
	done chan struct{} // closed when the reading has ended
	stop chan struct{} // closed at the first error: sending more is useless

	// Valid once done is closed.
	answered int   // operations that went well, counted from the first
	err      error // the first error
	broken   bool  // the connection failed
}

// startPipe starts to read the answers of up to n operations; answer reads
// that of the i-th. It ends when sent is closed and all that was sent is
// answered, or the connection fails.
func (c *Client) startPipe(n int, answer func(i int) error) *pipe {
	p := &pipe{sent: make(chan struct{}, n), done: make(chan struct{}), stop: make(chan struct{})}
	go func() {
		defer close(p.done)
		i := 0
		for range p.sent {
			err := answer(i)
			i++
			if err == nil {
				if p.err == nil {
					p.answered = i
				}
				continue
			}
			if p.err == nil {
				p.err = err
				close(p.stop)
			}
			if _, ok := errors.AsType[*RemoteError](err); !ok {
				p.err, p.broken = err, true
				return
			}
		}
	}()
	return p
}

// finish flushes and waits for the remaining answers. Afterwards the pipe's
// results are valid.
func (p *pipe) finish(c *Client) error {
	err := c.w.Flush()
	close(p.sent)
	<-p.done
	return err
}

// stopped tells that an answer was an error.
func (p *pipe) stopped() bool {
	select {
	case <-p.stop:
		return true
	default:
		return false
	}
}

// pipeline does n operations without waiting for one before the next.
func (c *Client) pipeline(what string, n int, request func(i int), answer func(i int) error) error {
	if err := c.begin(what); err != nil {
		return err
	}
	p := c.startPipe(n, answer)
	for i := range n {
		if p.stopped() {
			break
		}
		p.sent <- struct{}{}
		request(i)
	}
	werr := p.finish(c)
	switch {
	case p.broken:
		return c.fail(what, p.err)
	case werr != nil:
		return c.fail(what, werr)
	case p.err != nil:
		return fmt.Errorf("%s: %w", what, p.err)
	}
	return nil
}
