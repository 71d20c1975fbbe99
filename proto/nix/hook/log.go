package hook

import (
	"io"
	"os"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A Level is how important a message is: Nix shows those up to its verbosity,
// which is Info unless the user says otherwise.
type Level int

// The levels (Verbosity in src/libutil/include/nix/util/error.hh).
const (
	Error Level = iota
	Warn
	Notice
	Info
	Talkative
	Chatty
	Debug
)

// An ActivityType says what an activity is, so that Nix's displays can count
// and name it.
type ActivityType int

// The activity types that a hook uses (src/libutil/include/nix/util/logging.hh).
const (
	UnknownActivity ActivityType = 0
	CopyPath        ActivityType = 100 // fields: path, from, to
	CopyPaths       ActivityType = 103
	BuildWaiting    ActivityType = 111
)

type resultType int

const (
	resultProgress    resultType = 105
	resultSetExpected resultType = 106
)

// NeutralMachine is what the machine of an accepted build is called towards Nix
// while none is chosen.
const NeutralMachine = "nix-dispatch"

// An ActivityID names an activity within the user's Nix process. 0 is none.
type ActivityID uint64

// A Log writes replies and log messages for Nix. Replies are written at once;
// messages are kept for [Log.Flush], so that several of them wake Nix once, but
// no more of them than a pipe takes. Write errors are dropped: there is nobody
// left to tell.
//
// It is not safe for concurrent use.
type Log struct {
	w    io.Writer
	buf  []byte
	next ActivityID
}

// NewLog makes a Log to the hook's standard error. Activity ids are made unique
// with the process id, as Nix does.
func NewLog(w io.Writer) *Log {
	return &Log{w: w, next: ActivityID(os.Getpid()) << 32}
}

// Accept replies that the hook will build, on what is called machine. The name
// must be the very next line, so both go in one write.
func (l *Log) Accept(machine string) { l.reply("# accept\n" + oneLine(machine) + "\n") }

// Decline replies that Nix should build locally, or fail.
func (l *Log) Decline() { l.reply("# decline\n") }

// DeclinePermanently replies that Nix should ask no hook any more.
func (l *Log) DeclinePermanently() { l.reply("# decline-permanently\n") }

// Postpone replies that Nix should ask again after its build-poll-interval.
func (l *Log) Postpone() { l.reply("# postpone\n") }

func (l *Log) reply(text string) {
	l.buf = append(l.buf, text...)
	l.Flush()
}

// Flush writes the messages kept.
func (l *Log) Flush() {
	if len(l.buf) > 0 {
		l.w.Write(l.buf) //nolint:errcheck // see Log
		l.buf = l.buf[:0]
	}
}

func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
}

// maxKept is how many bytes of messages are kept at most.
const maxKept = 32 << 10

// begin starts a message in its JSON form (JSONLogger in src/libutil/logging.cc).
// It is written by hand, for a hook has few milliseconds to live.
func (l *Log) begin(action string) {
	l.buf = append(l.buf, `@nix {"action":"`...)
	l.buf = append(append(l.buf, action...), '"')
}

func (l *Log) end() {
	l.buf = append(l.buf, "}\n"...)
	if len(l.buf) > maxKept {
		l.Flush()
	}
}

func (l *Log) key(name string) {
	l.buf = append(append(append(l.buf, `,"`...), name...), `":`...)
}

func (l *Log) number(name string, n uint64) {
	l.key(name)
	l.buf = strconv.AppendUint(l.buf, n, 10)
}

func (l *Log) text(name, s string) {
	l.key(name)
	l.buf = appendJSONString(l.buf, s)
}

// appendJSONString appends s as JSON has strings (RFC 8259, section 7). Invalid
// UTF-8 is replaced.
func appendJSONString(b []byte, s string) []byte {
	b = append(b, '"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r == '\n':
			b = append(b, '\\', 'n')
		case r < ' ':
			const hex = "0123456789abcdef"
			b = append(b, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
		default:
			b = utf8.AppendRune(b, r)
		}
	}
	return append(b, '"')
}

// Msg shows text to the user. Text is not changed but that invalid UTF-8 is
// replaced.
func (l *Log) Msg(level Level, text string) {
	l.begin("msg")
	l.number("level", uint64(level)) //nolint:gosec // not negative
	l.text("msg", text)
	l.end()
}

// Start begins an activity.
func (l *Log) Start(level Level, kind ActivityType, text string, parent ActivityID, fields ...string) ActivityID {
	l.next++
	l.begin("start")
	l.number("id", uint64(l.next))
	l.number("level", uint64(level)) //nolint:gosec // not negative
	l.number("type", uint64(kind))   //nolint:gosec // not negative
	l.text("text", text)
	l.number("parent", uint64(parent))
	if len(fields) > 0 {
		l.key("fields")
		for i, field := range fields {
			l.buf = appendJSONString(append(l.buf, separator(i)), field)
		}
		l.buf = append(l.buf, ']')
	}
	l.end()
	return l.next
}

// Stop ends an activity.
func (l *Log) Stop(id ActivityID) {
	l.begin("stop")
	l.number("id", uint64(id))
	l.end()
}

// Progress tells how far an activity is, in units of its type: paths for
// CopyPaths, bytes for CopyPath.
func (l *Log) Progress(id ActivityID, done, expected, running uint64) {
	l.result(id, resultProgress, done, expected, running, 0)
}

// SetExpected tells how much the activities of a type below id will come to.
func (l *Log) SetExpected(id ActivityID, kind ActivityType, n uint64) {
	l.result(id, resultSetExpected, uint64(kind), n) //nolint:gosec // not negative
}

func (l *Log) result(id ActivityID, kind resultType, fields ...uint64) {
	l.begin("result")
	l.number("id", uint64(id))
	l.number("type", uint64(kind)) //nolint:gosec // not negative
	l.key("fields")
	for i, n := range fields {
		l.buf = strconv.AppendUint(append(l.buf, separator(i)), n, 10)
	}
	l.buf = append(l.buf, ']')
	l.end()
}

// separator is what comes before the i-th element of an array.
func separator(i int) byte {
	if i == 0 {
		return '['
	}
	return ','
}
