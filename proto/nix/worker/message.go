package worker

import (
	"fmt"
	"regexp"

	"nixdispatch/proto/nix/wire"
)

// The server's messages (src/libstore/include/nix/store/worker-protocol.hh).
const (
	msgNext          = 0x6f6c6d67
	msgStartActivity = 0x53545254
	msgStopActivity  = 0x53544f50
	msgResult        = 0x52534c54
	msgLast          = 0x616c7473
	msgError         = 0x63787470
)

const (
	maxTraces  = 1 << 16  // traces that a server may send with an error
	keptTraces = 32       // traces that are kept
	maxTrace   = 16 << 10 // bytes of a trace that are kept
	maxFields  = 1024     // fields of an activity or result; Nix has at most five
)

// Events receives what a server tells during an operation. The methods are
// called one after the other, while a method of the client runs, but not always from
// the goroutine that called it. They hold up the connection while they run. All
// texts are foreign and at most [wire.MaxText] bytes, longer ones are cut.
type Events interface {
	// Log receives a message for the user, mostly with a newline at its end.
	Log(text string)
	// StartActivity tells that something has begun.
	StartActivity(a Activity)
	// StopActivity tells that an activity has ended.
	StopActivity(id uint64)
	// Result tells something of a running activity: a line of a build's log, a
	// phase, progress.
	Result(r Result)
}

// An Activity is something that a server does, such as one build.
type Activity struct {
	ID    uint64
	Level uint64
	// Type is Nix's ActivityType, such as [ActBuild].
	Type   uint64
	Text   string
	Fields []Field
	Parent uint64
}

// A Result is news of the activity with the same ID.
type Result struct {
	ID uint64
	// Type is Nix's ResultType, such as [ResBuildLogLine].
	Type   uint64
	Fields []Field
}

// A Field is a text or a number.
type Field struct {
	IsText bool
	Text   string
	Number uint64
}

// Types of activities and results that callers look at
// (src/libutil/include/nix/util/logging.hh).
const (
	ActCopyPath   = 100
	ActBuild      = 105
	ActSubstitute = 108

	ResBuildLogLine = 101
	ResSetPhase     = 104
	ResProgress     = 105
)

// A RemoteError is an operation's failure as the server told it. The connection
// stays in order, unless the client's Err tells otherwise. A server that did
// not understand a request closes after such an error, which the next
// operation notices.
type RemoteError struct {
	// Message is the server's own, which may have several lines and colours. It
	// is foreign.
	Message string
	// Level is Nix's verbosity level of the error, 0 for plain errors.
	Level uint64
	// Traces tell what the server did when it failed, innermost first; the
	// first 32 of them.
	Traces []string
}

// Error quotes the message without its colours, which quoting would spell out.
func (e *RemoteError) Error() string {
	return fmt.Sprintf("%s said: %q", program, colours.ReplaceAllLiteralString(e.Message, ""))
}

var colours = regexp.MustCompile("\x1b\\[[0-9;]*m")

// messages reads up to the end of an operation: nil if its result follows, a
// [*RemoteError] if it failed. Every other error is one of the connection.
func (c *Client) messages() error {
	events := c.Events
	if events == nil {
		events = discard{}
	}
	for {
		switch tag := c.r.Uint64(); {
		case c.r.Err() != nil:
			return c.r.Err()
		case tag == msgLast:
			return nil
		case tag == msgError:
			return c.readError()
		default:
			if err := c.message(tag, events); err != nil {
				return err
			}
		}
	}
}

func (c *Client) message(tag uint64, events Events) error {
	switch tag {
	case msgNext:
		if text := c.r.Text(wire.MaxText); c.r.Err() == nil {
			events.Log(text)
		}
	case msgStartActivity:
		a := Activity{
			ID:     c.r.Uint64(),
			Level:  c.r.Uint64(),
			Type:   c.r.Uint64(),
			Text:   c.r.Text(wire.MaxText),
			Fields: c.readFields(),
			Parent: c.r.Uint64(),
		}
		if c.r.Err() == nil {
			events.StartActivity(a)
		}
	case msgStopActivity:
		if id := c.r.Uint64(); c.r.Err() == nil {
			events.StopActivity(id)
		}
	case msgResult:
		res := Result{ID: c.r.Uint64(), Type: c.r.Uint64(), Fields: c.readFields()}
		if c.r.Err() == nil {
			events.Result(res)
		}
	default:
		// READ and WRITE among them, which only operations before 1.23 use.
		c.r.Fail(fmt.Errorf("unknown message %#x", tag))
	}
	return c.r.Err()
}

func (c *Client) readFields() []Field {
	var fields []Field
	for n := c.r.Count(maxFields); n > 0 && c.r.Err() == nil; n-- {
		var f Field
		if f.IsText = c.r.Int(1) == 1; f.IsText {
			f.Text = c.r.Text(wire.MaxText)
		} else {
			f.Number = c.r.Uint64()
		}
		fields = append(fields, f)
	}
	return fields
}

// readError reads an error as servers from 1.26 on send it (readError in
// src/libutil/serialise.cc).
func (c *Client) readError() error {
	c.r.String(wire.MaxToken) // "Error"
	e := &RemoteError{Level: c.r.Uint64()}
	c.r.String(wire.MaxToken) // name, no longer used
	e.Message = c.r.Text(wire.MaxText)
	c.noPosition()
	for n := c.r.Count(maxTraces); n > 0 && c.r.Err() == nil; n-- {
		c.noPosition()
		if trace := c.r.Text(maxTrace); len(e.Traces) < keptTraces {
			e.Traces = append(e.Traces, trace)
		}
	}
	if err := c.r.Err(); err != nil {
		return err
	}
	return e
}

// noPosition reads the mark of a source position, which no server ever sends
// and nobody knows how to read.
func (c *Client) noPosition() { c.r.Int(0) }

type discard struct{}

func (discard) Log(string)             {}
func (discard) StartActivity(Activity) {}
func (discard) StopActivity(uint64)    {}
func (discard) Result(Result)          {}
