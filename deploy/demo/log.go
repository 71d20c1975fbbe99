package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"syscall"
)

// A plainHandler writes the fleet's log as lines for a person: the message, and the
// values of its attributes behind it.
type plainHandler struct{ out io.Writer }

func (h plainHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo
}

func (h plainHandler) Handle(_ context.Context, r slog.Record) error {
	var values []string
	r.Attrs(func(a slog.Attr) bool {
		values = append(values, a.String())
		return true
	})
	line := "   " + r.Message
	if len(values) > 0 {
		line += " (" + strings.Join(values, ", ") + ")"
	}
	_, err := fmt.Fprintln(h.out, line)
	return err
}

// The demo's packages log with attributes of single calls only.
func (h plainHandler) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h plainHandler) WithGroup(string) slog.Handler      { return h }

// A lockedWriter may be written by several goroutines. When its reader has gone, as
// in "make demo | head", it calls gone, so that the demo ends and cleans up.
type lockedWriter struct {
	mu   sync.Mutex
	w    io.Writer
	gone func()
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.w.Write(p)
	if errors.Is(err, syscall.EPIPE) && l.gone != nil {
		l.gone()
	}
	return n, err
}

// A logFile keeps what nix-dispatchd prints. It may be read while it is written.
type logFile struct{ f *os.File }

// tail is the end of what was printed, at most n bytes.
func (l logFile) tail(n int64) string {
	info, err := l.f.Stat()
	if err != nil {
		return err.Error()
	}
	from := max(0, info.Size()-n)
	text, err := io.ReadAll(io.NewSectionReader(l.f, from, n))
	if err != nil {
		return err.Error()
	}
	return string(text)
}
