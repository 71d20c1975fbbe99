package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

const (
	repaintInterval = 100 * time.Millisecond
	maxPaintedRows  = 12
)

// A screen paints a few lines at the bottom of a terminal again and again.
type screen struct {
	w       *os.File
	painted int // lines on the terminal; guarded by the owner's lock
	last    string
	done    chan struct{}
	wg      sync.WaitGroup
}

// newScreen is nil when w is no terminal. Otherwise start paints until stop.
func newScreen(w io.Writer) *screen {
	f := terminalOf(w)
	if f == nil {
		return nil
	}
	return &screen{w: f, done: make(chan struct{})}
}

// terminalOf is w if it is a terminal that can move its cursor, else nil.
func terminalOf(w io.Writer) *os.File {
	if os.Getenv("TERM") == "dumb" || !isTerminal(w) {
		return nil
	}
	return w.(*os.File)
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// terminalSize is that of a terminal, or what is usual where it does not tell.
func terminalSize(terminal *os.File) (columns, rows int) {
	size, err := unix.IoctlGetWinsize(int(terminal.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 || size.Row == 0 {
		return 80, 24
	}
	return int(size.Col), int(size.Row)
}

// start paints what lines gives, holding lock, every repaintInterval.
func (s *screen) start(lock sync.Locker, lines func(rows int) []string) {
	s.wg.Go(func() {
		ticker := time.NewTicker(repaintInterval)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				lock.Lock()
				s.paint(lines)
				lock.Unlock()
			case <-s.done:
				return
			}
		}
	})
}

// stop ends painting. What is painted stays until the next erase.
func (s *screen) stop() {
	close(s.done)
	s.wg.Wait()
}

// erase gives what takes the painted lines away.
func (s *screen) erase() string {
	if s.painted == 0 {
		return ""
	}
	text := fmt.Sprintf("\x1b[%dA\x1b[J", s.painted)
	s.painted, s.last = 0, ""
	return text
}

func (s *screen) paint(lines func(rows int) []string) {
	columns, rows := terminalSize(s.w)
	var b strings.Builder
	painted := lines(max(2, min(rows-1, maxPaintedRows)))
	for _, line := range painted {
		b.WriteString(fit(line, columns-1))
		b.WriteByte('\n')
	}
	if b.String() == s.last {
		return
	}
	io.WriteString(s.w, s.erase()+b.String()) //nolint:errcheck // nobody is left to tell
	s.painted, s.last = len(painted), b.String()
}

// fit cuts a line to a number of columns, counting wide characters as two, and
// leaves nothing in it that moves the cursor.
func fit(line string, columns int) string {
	var b strings.Builder
	for _, r := range line {
		if unicode.IsControl(r) {
			r = ' '
		}
		width := 1
		if unicode.In(r, unicode.Han, unicode.Hangul, unicode.Hiragana, unicode.Katakana) || r >= 0x1f300 {
			width = 2
		}
		if columns -= width; columns < 0 {
			break
		}
		b.WriteRune(r)
	}
	return b.String()
}
