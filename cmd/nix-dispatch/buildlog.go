package main

import (
	"bytes"
	"encoding/json"
	"strings"

	"nixdispatch/proto/nix"
)

const (
	// tailLines is how much of a failed build's log is shown (Nix's log-lines).
	tailLines = 25
	// maxLogLine is how much of one line is kept, in bytes.
	maxLogLine = 4096
)

// A buildLog cuts the bytes of one builder's log into lines fit to show, and
// keeps the last of them. It holds at most tailLines of maxLogLine.
type buildLog struct {
	partial []byte
	cut     bool // the rest of the line under way is dropped
	tail    []string
	// phase is what the builder last said with Nix's setPhase message.
	phase string
}

// write takes bytes of the log and returns the lines they complete.
func (l *buildLog) write(data []byte) (lines []string) {
	for {
		line, rest, found := bytes.Cut(data, []byte{'\n'})
		l.add(line)
		if !found {
			return lines
		}
		if text, ok := l.take(); ok {
			lines = append(lines, text)
		}
		data = rest
	}
}

// end returns the last line if the log does not end with a newline.
func (l *buildLog) end() (lines []string) {
	if len(l.partial) == 0 {
		return nil
	}
	if text, ok := l.take(); ok {
		lines = append(lines, text)
	}
	return lines
}

func (l *buildLog) add(data []byte) {
	if room := maxLogLine - len(l.partial); len(data) > room {
		data, l.cut = data[:room], true
	}
	l.partial = append(l.partial, data...)
}

// take ends the line under way. Messages to Nix are not for showing.
func (l *buildLog) take() (text string, ok bool) {
	raw := strings.TrimSuffix(string(l.partial), "\r")
	cut := l.cut
	l.partial, l.cut = l.partial[:0], false
	if message, isMessage := strings.CutPrefix(raw, "@nix "); isMessage {
		l.message(message)
		return "", false
	}
	// A carriage return starts the line anew, as on a terminal.
	text = nix.PlainText(raw[strings.LastIndexByte(raw, '\r')+1:])
	if cut {
		text += " [...]"
	}
	if len(l.tail) == tailLines {
		l.tail = append(l.tail[:0], l.tail[1:]...)
	}
	l.tail = append(l.tail, text)
	return text, true
}

func (l *buildLog) message(text string) {
	var m struct{ Action, Phase string }
	if json.Unmarshal([]byte(text), &m) == nil && m.Action == "setPhase" {
		l.phase = cell(m.Phase)
	}
}
