package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

const (
	// topQueued and topEnded are how many waiting and ended builds are asked for.
	topQueued = 100
	topEnded  = 20
)

func topCommand() *command {
	c := newCommand("top", "", "show machines and builds, live", `Shows machines, builds in progress, builds that wait and those that ended last, anew
every second, until q or Ctrl-C. Where the output is no terminal, it shows them once.

Examples:
  nix-dispatch top
  nix-dispatch top --interval 5s`)
	socket := socketFlag(c.Flags)
	once := c.Flags.Bool("once", false, "show it once and end")
	interval := c.Flags.Duration("interval", time.Second, "how often, a `DURATION`")
	c.run = func(ctx context.Context, _ []string, std stdio) int {
		if *interval < 100*time.Millisecond {
			return usageError(std, c.Name, "--interval must be 100ms at least")
		}
		ctx, stop := interruptible(ctx)
		defer stop()
		conn, err := dialReady(ctx, *socket)
		if err != nil {
			return reportCallError(std.err, *socket, err)
		}
		defer conn.Close()
		first, err := lookAt(ctx, conn)
		if err != nil {
			return reportCallError(std.err, *socket, err)
		}
		terminal := terminalOf(std.out)
		if *once || terminal == nil {
			for _, line := range first.lines(0) {
				fmt.Fprintln(std.out, strings.TrimRight(line.text, " "))
			}
			return exitOK
		}
		return watch(ctx, conn, std, terminal, first, *interval)
	}
	return c
}

// lookAt asks the daemon for what there is to see.
func lookAt(ctx context.Context, conn *daemonConn) (*overview, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	status, err := conn.Status(ctx, &dispatchv1.StatusRequest{MaxQueued: topQueued})
	if err != nil {
		return nil, err
	}
	o := &overview{status: status, at: time.Now()}
	inProgress := make(map[uint64]bool)
	for _, b := range status.GetBuilds() {
		inProgress[b.GetId()] = true
	}
	// Without a history there is none to show.
	stream, err := conn.History(ctx, &dispatchv1.HistoryRequest{Limit: topEnded})
	for err == nil {
		var b *dispatchv1.FinishedBuild
		if b, err = stream.Recv(); err == nil && !inProgress[b.GetId()] { // else it has ended since
			o.ended = append(o.ended, b)
		}
	}
	return o, nil
}

// watch shows an overview anew every interval, over the whole terminal, until q or
// a signal, and leaves the terminal as it was.
func watch(ctx context.Context, conn *daemonConn, std stdio, terminal *os.File, o *overview, interval time.Duration) int {
	ctx, quit := context.WithCancel(ctx)
	defer quit()
	keys, err := watchKeys(ctx, std.in, quit)
	if err != nil {
		return failure(std, err)
	}
	defer keys.stop()
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, unix.SIGWINCH)
	defer signal.Stop(resized)
	io.WriteString(terminal, "\x1b[?1049h\x1b[?25l")       //nolint:errcheck // nobody is left to tell
	defer io.WriteString(terminal, "\x1b[?25h\x1b[?1049l") //nolint:errcheck // likewise
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	colour := os.Getenv("NO_COLOR") == ""
	for {
		columns, rows := terminalSize(terminal)
		io.WriteString(terminal, repaint(o.lines(rows), columns, colour)) //nolint:errcheck // likewise
		select {
		case <-ctx.Done():
			return exitOK
		case <-resized:
			continue
		case <-ticker.C:
		}
		conn.cc.ResetConnectBackoff() // a daemon that was restarted is there again at once
		next, err := lookAt(ctx, conn)
		switch {
		case err == nil:
			o = next
		case ctx.Err() == nil:
			o.silent = cell(conn.whyNot(err))
		}
	}
}

// failure reports what is wrong here rather than with the daemon.
func failure(std stdio, err error) int {
	fmt.Fprintf(std.err, "nix-dispatch: %v\n", err)
	return exitFailed
}

// repaint writes lines over what is on a terminal of this many columns.
func repaint(lines []line, columns int, colour bool) string {
	var b strings.Builder
	b.WriteString("\x1b[H")
	for n, l := range lines {
		if n > 0 {
			b.WriteByte('\n')
		}
		text := fit(l.text, columns)
		if colour && l.style != "" {
			text = "\x1b[" + l.style + "m" + text + "\x1b[0m"
		}
		b.WriteString(text + "\x1b[K")
	}
	b.WriteString("\x1b[J")
	return b.String()
}

// keyReader reads a terminal's keys one by one, unseen, until it is stopped.
type keyReader struct {
	terminal *os.File // nil where there is none
	before   unix.Termios
	done     chan struct{}
}

// watchKeys calls quit when q is pressed on in, if that is a terminal.
func watchKeys(ctx context.Context, in io.Reader, quit func()) (*keyReader, error) {
	f, ok := in.(*os.File)
	if !ok {
		return &keyReader{}, nil
	}
	before, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return &keyReader{}, nil //nolint:nilerr // it is no terminal
	}
	k := &keyReader{terminal: f, before: *before, done: make(chan struct{})}
	raw := *before
	raw.Lflag &^= unix.ICANON | unix.ECHO
	raw.Cc[unix.VSUSP] = 0 // stopped, it would leave the terminal as it is
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 0, 1
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &raw); err != nil {
		return nil, fmt.Errorf("set up the terminal: %w", err)
	}
	go func() {
		defer close(k.done)
		key := make([]byte, 16)
		for ctx.Err() == nil {
			n, err := unix.Read(int(f.Fd()), key) // a tenth of a second at most
			if err != nil && err != unix.EINTR || n > 0 && strings.ContainsAny(string(key[:n]), "qQ\x03") {
				quit()
				return
			}
		}
	}()
	return k, nil
}

// stop waits for the reader's end, whose context must have ended, and gives the
// terminal its settings back.
func (k *keyReader) stop() {
	if k.terminal == nil {
		return
	}
	<-k.done
	unix.IoctlSetTermios(int(k.terminal.Fd()), unix.TCSETS, &k.before) //nolint:errcheck // nobody is left to tell
}
