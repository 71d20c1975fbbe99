package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"nixdispatch/cmd/internal/pingtext"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

const pingAbout = `Connects to machines anew and prints each step of the way to their Nix, with its time:
ssh's configuration, the address, the connection, host key, login, Nix, its protocol
and version, and whether it trusts the user there. What fails is told in one line:
the step, the kind of failure, what exactly, and what to do.

A machine of nix-dispatchd's list, named by its store URI or its host's name, is asked
by nix-dispatchd, as the user that it runs as. Any other store URI is tried by a process
of your own (nix-dispatchd probe), with your keys and your ssh configuration.

Examples:
  nix-dispatch ping mac
  nix-dispatch ping --timeout 5s ssh-ng://nix@big
  nix-dispatch ping 'ssh://mac?ssh-key=/home/alice/my-key'

Exit status: 0 all is well, 1 a step failed, 2 wrong usage, 3 the daemon, which would
have to ask a MACHINE, is out of reach.`

func pingCommand() *command {
	c := newCommand("ping", "MACHINE|URI...", "try the way to machines, step by step", pingAbout)
	socket := socketFlag(c.Flags)
	timeout := stepTimeoutFlag(c.Flags)
	asJSON := c.Flags.Bool("json", false, "print a JSON array")
	c.run = func(ctx context.Context, names []string, std stdio) int {
		switch {
		case len(names) == 0:
			return usageError(std, c.Name, "which machine?")
		case *timeout < 0:
			return usageError(std, c.Name, "--timeout must be positive")
		}
		ctx, stop := interruptible(ctx)
		defer stop()
		p := newPinger(ctx, *socket, *timeout)
		defer p.close()
		return p.report(ctx, names, *asJSON, std)
	}
	return c
}

// stepTimeoutFlag registers --timeout of ping and doctor.
func stepTimeoutFlag(flags *flag.FlagSet) *time.Duration {
	return flags.Duration("timeout", 0, "how long a step of the way to a machine may take, a `DURATION`; by default from 15 seconds to a minute")
}

// report pings machines and prints what comes of it; it returns the exit status.
func (p *pinger) report(ctx context.Context, names []string, asJSON bool, std stdio) int {
	reports := []*pingtext.Report{}
	worst := exitOK
	for _, ping := range p.all(ctx, names) {
		r, code := ping.follow(func(r *pingtext.Report, s pingtext.Step) {
			if asJSON {
				return
			}
			if len(r.Steps) == 1 {
				fmt.Fprintf(std.out, "%s, asked by %s\n", pingtext.OneLine(r.Machine), asker(r.By))
			}
			s.Write(std.out)
		})
		reports = append(reports, r)
		worst = max(worst, code)
		switch {
		case asJSON:
		case len(r.Steps) == 0:
			fmt.Fprintf(std.err, "nix-dispatch ping: %s: %s\n", pingtext.OneLine(r.Machine), pingtext.OneLine(r.Error))
		default:
			r.WriteEnd(std.out)
		}
	}
	if asJSON {
		worst = max(worst, printJSON(std, reports))
	}
	return worst
}

// asker is who asks a machine, for a person.
func asker(by string) string {
	if by == byDaemon {
		return "nix-dispatchd"
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return "this user"
}

// Who asks a machine.
const (
	byDaemon = "daemon"
	byCaller = "caller"
)

// A pinger pings machines, through the daemon or by processes of its own.
type pinger struct {
	timeout time.Duration
	claims  bool // see PingRequest
	conn    *daemonConn
	connErr error // why there is none
}

func newPinger(ctx context.Context, socket string, timeout time.Duration) *pinger {
	p := &pinger{timeout: timeout}
	p.conn, p.connErr = dialReady(ctx, socket)
	return p
}

func (p *pinger) close() {
	if p.conn != nil {
		p.conn.Close()
	}
}

// A ping is one that is under way. Its events are for the one who follows it.
type ping struct {
	report *pingtext.Report
	steps  chan pingtext.Step // closed at its end
	code   int                // exit status; valid after the end
}

// maxPings bounds how many are under way at once.
const maxPings = 4

// all pings machines, several at once. Each must be followed, in order.
func (p *pinger) all(ctx context.Context, names []string) []*ping {
	pings := make([]*ping, len(names))
	for i, name := range names {
		pings[i] = &ping{report: &pingtext.Report{Machine: name, OK: true, Steps: []pingtext.Step{}}, steps: make(chan pingtext.Step, 64)}
	}
	places := make(chan struct{}, maxPings)
	go func() {
		for _, pg := range pings {
			places <- struct{}{}
			go func() {
				defer func() { <-places }()
				defer close(pg.steps)
				pg.code = p.ping(ctx, pg)
			}()
		}
	}()
	return pings
}

// follow waits for a ping's end and gives each step to told, with the report that
// it is the last in. It returns the exit status, too.
func (pg *ping) follow(told func(*pingtext.Report, pingtext.Step)) (*pingtext.Report, int) {
	for s := range pg.steps {
		pg.report.Add(s)
		told(pg.report, s)
	}
	switch {
	case pg.code != exitOK:
		pg.report.OK = false
	case !pg.report.OK:
		pg.code = exitFailed
	}
	return pg.report, pg.code
}

// ping is through the daemon for its machines, else by a process of the caller's
// own: the daemon, which may be root's, goes nowhere on a caller's word.
func (p *pinger) ping(ctx context.Context, pg *ping) int {
	name := pg.report.Machine
	isURI := strings.Contains(name, "://")
	err := p.connErr
	if err == nil {
		pg.report.By = byDaemon
		err = p.byDaemon(ctx, pg)
	}
	switch status.Code(err) {
	case codes.OK:
		return exitOK
	case codes.NotFound, codes.Unavailable, codes.DeadlineExceeded, codes.PermissionDenied, codes.Unimplemented:
		if isURI && len(pg.report.Steps) == 0 && ctx.Err() == nil {
			pg.report.By = byCaller
			return p.byCaller(ctx, pg)
		}
	}
	pg.report.Error = status.Convert(err).Message()
	code := exitStatus(err)
	if code == exitUnreachable {
		pg.report.Error = "the daemon, which would have to ask it, is out of reach: " + pg.report.Error
	}
	return code
}

func (p *pinger) byDaemon(ctx context.Context, pg *ping) error {
	req := &dispatchv1.PingRequest{Machine: pg.report.Machine, Claims: p.claims}
	if p.timeout > 0 {
		req.Timeout = durationpb.New(p.timeout)
	}
	stream, err := p.conn.Ping(ctx, req)
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		pg.steps <- pingtext.Step{
			Name: m.GetStep(), Verdict: pingVerdicts[m.GetVerdict()], Milliseconds: pingtext.Millis(m.GetTook().AsDuration()),
			Detail: m.GetDetail(), Cause: m.GetCause(), Fix: m.GetFix(),
		}
	}
}

var pingVerdicts = map[dispatchv1.PingVerdict]string{
	dispatchv1.PingVerdict_PING_VERDICT_OK:      pingtext.OK,
	dispatchv1.PingVerdict_PING_VERDICT_WARNING: pingtext.Warning,
	// What is not known is no good sign.
	dispatchv1.PingVerdict_PING_VERDICT_UNSPECIFIED: pingtext.Failed,
	dispatchv1.PingVerdict_PING_VERDICT_FAILED:      pingtext.Failed,
}

// byCaller runs nix-dispatchd probe, which brings ssh and Nix's protocols.
func (p *pinger) byCaller(ctx context.Context, pg *ping) int {
	fail := func(code int, err error) int {
		pg.report.Error = err.Error()
		return code
	}
	program, err := findDispatchd()
	if err != nil {
		return fail(exitFailed, err)
	}
	var stderr firstWords
	cmd := exec.CommandContext(ctx, program, "probe", "--json", "--timeout", p.timeout.String(), "--", pg.report.Machine)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it may have children
	cmd.WaitDelay = 5 * time.Second
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return fail(exitFailed, fmt.Errorf("start %s: %w", program, err))
	}
	readErr := pingtext.ReadSteps(out, func(s pingtext.Step) { pg.steps <- s })
	_, _ = io.Copy(io.Discard, out)
	err = cmd.Wait()
	exit, exited := errors.AsType[*exec.ExitError](err)
	said, _, _ := strings.Cut(strings.TrimPrefix(string(stderr), "nix-dispatchd probe: "), "\n")
	switch {
	case ctx.Err() != nil:
		return fail(exitInterrupted, errors.New("interrupted"))
	case exited && exit.ExitCode() == exitUsage:
		return fail(exitUsage, errors.New(said))
	case exited && exit.ExitCode() != exitFailed:
		return fail(exitFailed, fmt.Errorf("%s: %w: %s", program, exit, said))
	case readErr != nil:
		return fail(exitFailed, fmt.Errorf("%s: %w", program, readErr))
	case exited:
		return exitFailed
	case err != nil:
		return fail(exitFailed, fmt.Errorf("%s: %w", program, err))
	default:
		return exitOK
	}
}

// firstWords keeps the beginning of what is written to it.
type firstWords []byte

// Write never fails.
func (w *firstWords) Write(p []byte) (int, error) {
	*w = append(*w, p[:min(len(p), maxWords-len(*w))]...)
	return len(p), nil
}

// maxWords bounds them, in bytes.
const maxWords = 4 << 10

// findDispatchd finds the daemon's program: beside this one, else in PATH.
func findDispatchd() (string, error) {
	const name = "nix-dispatchd"
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 {
			return beside, nil
		}
	}
	program, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s, which tries machines that are not in the daemon's list, is neither beside nix-dispatch nor in PATH", name)
	}
	return program, nil
}
