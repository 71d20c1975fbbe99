package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// historyJSON is one line of "history --json".
type historyJSON struct {
	ID       uint64    `json:"id"`
	DrvPath  string    `json:"drvPath"`
	System   string    `json:"system"`
	Caller   string    `json:"caller"`
	Machine  string    `json:"machine"`
	Status   string    `json:"status"`
	Failed   bool      `json:"failed"`
	Error    string    `json:"error"`
	Attempts uint32    `json:"attempts"`
	Ended    time.Time `json:"ended"`

	QueueSeconds    float64 `json:"queueSeconds"`
	UploadSeconds   float64 `json:"uploadSeconds"`
	BuildSeconds    float64 `json:"buildSeconds"`
	DownloadSeconds float64 `json:"downloadSeconds"`
	BytesSent       uint64  `json:"bytesSent"`
	BytesReceived   uint64  `json:"bytesReceived"`
}

func historyCommand() *command {
	c := newCommand("history", "", "show builds that have ended", `Shows builds that have ended, the newest first. They are kept for 90 days, 100,000
at most. With --json, one JSON object a line.

Examples:
  nix-dispatch history --failed --since 24h
  nix-dispatch history --json --machine ssh://mac | jq .buildSeconds`)
	req := new(dispatchv1.HistoryRequest)
	socket := socketFlag(c.Flags)
	asJSON := c.Flags.Bool("json", false, "print JSON, one build a line")
	c.Flags.BoolVar(&req.Failed, "failed", false, "only builds that failed")
	c.Flags.StringVar(&req.Machine, "machine", "", "only builds of the machine with this store `URI`")
	since := c.Flags.String("since", "", "only builds that ended since then: a `TIME` as 24h, 7d, 2026-11-22 or 2026-11-22T15:04:05Z")
	limit := c.Flags.Uint("limit", 0, "at most so many, a `NUMBER`; 0: without --since and --json, 50")
	c.run = func(ctx context.Context, _ []string, std stdio) int {
		req.Limit = uint32(min(*limit, 1<<31))
		if *since != "" {
			t, err := parseSince(*since, time.Now())
			if err != nil {
				return usageError(std, c.Name, "--since: %v", err)
			}
			req.Since = timestamppb.New(t)
		}
		if req.Limit == 0 && *since == "" && !*asJSON {
			req.Limit = 50
		}
		print := printHistory
		if *asJSON {
			print = printHistoryJSON
		}
		return streamFromDaemon(ctx, *socket, std, func(ctx context.Context, conn *daemonConn) error {
			stream, err := conn.History(ctx, req)
			if err != nil {
				return err
			}
			return print(std.out, stream.Recv)
		})
	}
	return c
}

// streamFromDaemon makes a call that takes as long as it takes.
func streamFromDaemon(ctx context.Context, socket string, std stdio, call func(context.Context, *daemonConn) error) int {
	ctx, stop := interruptible(ctx)
	defer stop()
	conn, err := dialReady(ctx, socket)
	if err != nil {
		return reportCallError(std.err, socket, err)
	}
	defer conn.Close()
	if err := call(ctx, conn); err != nil {
		return reportCallError(std.err, socket, err)
	}
	return exitOK
}

// parseSince reads a time, or how long ago one was.
func parseSince(s string, now time.Time) (time.Time, error) {
	if n := len(s) - 1; n > 0 && s[n] == 'd' {
		if days, err := strconv.ParseUint(s[:n], 10, 16); err == nil {
			return now.AddDate(0, 0, -int(days)), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is neither a time nor a duration", s)
}

type recvBuild = func() (*dispatchv1.FinishedBuild, error)

func printHistory(w io.Writer, recv recvBuild) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "BUILD\tENDED\tSTATUS\tBUILT\tIN ALL\tMACHINE\tDERIVATION")
	for n := 0; ; n++ {
		b, err := recv()
		if err == io.EOF && n == 0 {
			_, err = fmt.Fprintln(w, "no such builds")
			return err
		}
		if err == io.EOF {
			return tw.Flush()
		}
		if err != nil {
			return errors.Join(tw.Flush(), err)
		}
		built := b.GetBuilding().AsDuration()
		all := built + b.GetQueued().AsDuration() + b.GetUploading().AsDuration() + b.GetDownloading().AsDuration()
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", b.GetId(), b.GetEnded().AsTime().Local().Format("2006-01-02 15:04:05"),
			cell(b.GetStatus()), seconds(built), seconds(all), cell(b.GetMachine()), cell(b.GetDrvPath()))
		if b.GetFailed() && b.GetError() != "" {
			fmt.Fprintf(tw, "\t\t%s\n", cell(firstLine(b.GetError())))
		}
	}
}

// firstLine is the part of a message for a table.
func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1fs", d.Seconds()) }

func printHistoryJSON(w io.Writer, recv recvBuild) error {
	out := json.NewEncoder(w)
	for {
		b, err := recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := out.Encode(historyJSON{
			ID: b.GetId(), DrvPath: b.GetDrvPath(), System: b.GetSystem(), Caller: b.GetCaller(), Machine: b.GetMachine(),
			Status: b.GetStatus(), Failed: b.GetFailed(), Error: b.GetError(), Attempts: b.GetAttempts(),
			Ended:           b.GetEnded().AsTime(),
			QueueSeconds:    b.GetQueued().AsDuration().Seconds(),
			UploadSeconds:   b.GetUploading().AsDuration().Seconds(),
			BuildSeconds:    b.GetBuilding().AsDuration().Seconds(),
			DownloadSeconds: b.GetDownloading().AsDuration().Seconds(),
			BytesSent:       b.GetBytesSent(), BytesReceived: b.GetBytesReceived(),
		}); err != nil {
			return err
		}
	}
}

func logCommand() *command {
	c := newCommand("log", "BUILD|DRV", "print the log of a build", `Prints the log of a build: of one in progress what there is so far, of one that has
ended what was kept, whether it failed or not. BUILD is its number in 'nix-dispatch
status' or 'history'; DRV is the path of a .drv file, and means its last build.

Examples:
  nix-dispatch log --follow 17
  nix-dispatch log $(nix-instantiate hello.nix) | less`)
	req := new(dispatchv1.LogRequest)
	socket := socketFlag(c.Flags)
	c.Flags.BoolVar(&req.Follow, "follow", false, "wait for the rest until the build has ended")
	c.run = func(ctx context.Context, operands []string, std stdio) int {
		if len(operands) != 1 {
			return usageError(std, c.Name, "want one build or derivation")
		}
		if id, err := strconv.ParseUint(operands[0], 10, 64); err == nil && id > 0 {
			req.BuildId = id
		} else if path, err := nix.ParseStorePath(operands[0]); err == nil {
			req.DrvPath = string(path)
		} else {
			return usageError(std, c.Name, "%q is neither the number of a build nor a derivation", operands[0])
		}
		return streamFromDaemon(ctx, *socket, std, func(ctx context.Context, conn *daemonConn) error {
			return printLog(ctx, conn, req, std)
		})
	}
	return c
}

// printLog prints the bytes of a log as they are, or on a terminal, which they could
// steer, its lines as plain text.
func printLog(ctx context.Context, conn *daemonConn, req *dispatchv1.LogRequest, std stdio) error {
	stream, err := conn.Log(ctx, req)
	if err != nil {
		return err
	}
	w, empty := std.out, true
	if isTerminal(w) {
		plain := &plainWriter{w: w}
		defer plain.end()
		w = plain
	}
	for {
		r, err := stream.Recv()
		if err == io.EOF {
			if empty {
				fmt.Fprintln(std.err, "nix-dispatch: the build has printed nothing")
			}
			return nil
		}
		if err != nil {
			return err
		}
		empty = false
		if _, err := w.Write(r.GetData()); err != nil {
			return err
		}
	}
}

// A plainWriter writes a log's lines as plain text.
type plainWriter struct {
	w   io.Writer
	log buildLog
}

func (p *plainWriter) Write(data []byte) (int, error) {
	for _, line := range p.log.write(data) {
		if _, err := io.WriteString(p.w, line+"\n"); err != nil {
			return 0, err
		}
	}
	return len(data), nil
}

// end writes the last line, if it has no end of its own.
func (p *plainWriter) end() {
	for _, line := range p.log.end() {
		_, _ = io.WriteString(p.w, line+"\n") // whoever looks has seen the rest
	}
}
