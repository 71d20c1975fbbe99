package hook

import (
	"encoding/json"
	"io"
	"os"
	"strings"
	"sync"
	"unicode"
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

// An ActivityID names an activity within the user's Nix process. 0 is none.
type ActivityID uint64

// A Log writes replies and log messages for Nix, each in a single write, so
// that nothing gets between the lines of one reply. Write errors are dropped:
// there is nobody left to tell.
//
// It is safe for concurrent use.
type Log struct {
	mu   sync.Mutex
	w    io.Writer
	next ActivityID
}

// NewLog makes a Log to the hook's standard error. Activity ids are made unique
// with the process id, as Nix does.
func NewLog(w io.Writer) *Log {
	return &Log{w: w, next: ActivityID(os.Getpid()) << 32}
}

// Accept replies that the hook will build, on what is called machine. The name
// must be the very next line, so both go in one write.
func (l *Log) Accept(machine string) { l.write("# accept\n" + oneLine(machine) + "\n") }

// Decline replies that Nix should build locally, or fail.
func (l *Log) Decline() { l.write("# decline\n") }

// DeclinePermanently replies that Nix should ask no hook any more.
func (l *Log) DeclinePermanently() { l.write("# decline-permanently\n") }

// Postpone replies that Nix should ask again after its build-poll-interval.
func (l *Log) Postpone() { l.write("# postpone\n") }

func (l *Log) write(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	io.WriteString(l.w, line) //nolint:errcheck // see Log
}

func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
}

// message is the JSON form of every log message (JSONLogger in
// src/libutil/logging.cc).
type message struct {
	Action string      `json:"action"`
	ID     ActivityID  `json:"id,omitempty"`
	Level  *Level      `json:"level,omitempty"`
	Msg    *string     `json:"msg,omitempty"`
	Type   *int        `json:"type,omitempty"`
	Text   *string     `json:"text,omitempty"`
	Parent *ActivityID `json:"parent,omitempty"`
	Fields []any       `json:"fields,omitempty"`
}

func (l *Log) emit(m message) {
	text, err := json.Marshal(m)
	if err != nil { // fields are strings and numbers only
		panic("hook: marshal log message: " + err.Error())
	}
	l.write("@nix " + string(text) + "\n")
}

// Msg shows text to the user. Text is not changed but that invalid UTF-8 is
// replaced.
func (l *Log) Msg(level Level, text string) {
	l.emit(message{Action: "msg", Level: &level, Msg: &text})
}

// Start begins an activity. Fields are strings and uint64.
func (l *Log) Start(level Level, kind ActivityType, text string, parent ActivityID, fields ...any) ActivityID {
	l.mu.Lock()
	l.next++
	id := l.next
	l.mu.Unlock()
	t := int(kind)
	l.emit(message{Action: "start", ID: id, Level: &level, Type: &t, Text: &text, Parent: &parent, Fields: fields})
	return id
}

// Stop ends an activity.
func (l *Log) Stop(id ActivityID) { l.emit(message{Action: "stop", ID: id}) }

// Progress tells how far an activity is, in units of its type: paths for
// CopyPaths, bytes for CopyPath.
func (l *Log) Progress(id ActivityID, done, expected, running uint64) {
	l.result(id, resultProgress, done, expected, running, uint64(0))
}

// SetExpected tells how much the activities of a type below id will come to.
func (l *Log) SetExpected(id ActivityID, kind ActivityType, n uint64) {
	l.result(id, resultSetExpected, uint64(kind), n)
}

func (l *Log) result(id ActivityID, kind resultType, fields ...any) {
	t := int(kind)
	l.emit(message{Action: "result", ID: id, Type: &t, Fields: fields})
}
