package nix

import (
	"strings"
	"unicode/utf8"
)

const (
	escape = 0x1b
	bell   = 0x07
)

// PlainText makes foreign text safe to show: escape sequences, control
// characters other than newline and tab, and characters that turn the direction
// of writing are removed; invalid UTF-8 becomes U+FFFD.
func PlainText(s string) string {
	if isPlain(s) {
		return s
	}
	var b strings.Builder
	b.Grow(len(s))
	for i := 0; i < len(s); {
		if s[i] == escape {
			i += escapeLen(s[i:])
			continue
		}
		r, n := utf8.DecodeRuneInString(s[i:])
		if i += n; isShown(r) {
			b.WriteRune(r)
		}
	}
	return b.String()
}

func isPlain(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < ' ' && c != '\n') || c >= 0x7f {
			return false
		}
	}
	return true
}

func isShown(r rune) bool {
	switch {
	case r == '\n', r == '\t':
		return true
	case r < ' ', 0x7f <= r && r < 0xa0: // C0, DEL, C1
		return false
	case 0x202a <= r && r <= 0x202e, 0x2066 <= r && r <= 0x2069: // bidirectional controls
		return false
	}
	return true
}

// escapeLen is the length of the escape sequence at the start of s: of a
// control sequence up to its final byte, of a command string up to its
// terminator or the end of the line, of any other up to its final byte.
//
// See ECMA-48, 5.4 and 5.6.
func escapeLen(s string) int {
	if len(s) < 2 {
		return len(s)
	}
	switch s[1] {
	case '[':
		for i := 2; i < len(s); i++ {
			if s[i] < ' ' || s[i] > '?' {
				if 0x40 <= s[i] && s[i] <= 0x7e {
					i++
				}
				return i
			}
		}
		return len(s)
	case ']', 'P', 'X', '^', '_':
		for i := 2; i < len(s); i++ {
			switch {
			case s[i] == bell:
				return i + 1
			case s[i] == '\n' || s[i] == escape:
				return i // the terminator ESC \ is a sequence of its own
			}
		}
		return len(s)
	}
	i := 1
	for i < len(s) && ' ' <= s[i] && s[i] <= '/' {
		i++
	}
	if i < len(s) && '0' <= s[i] && s[i] <= '~' {
		i++
	}
	return i
}
