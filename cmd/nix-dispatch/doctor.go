package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"nixdispatch/cmd/internal/pingtext"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

const doctorAbout = `Looks for what keeps builds from the machines: whether nix-dispatchd answers and is of
this version, who may use it, whether Nix asks it (build-hook), and the way to each
machine, as 'nix-dispatch ping' does, together with the systems and features that the
list claims and the machine's own Nix does not have. It changes nothing. As root it sees
more: the environment that nix-daemon runs with, and root's own configuration.

Each finding is one line: ok, next, warning or problem, what it is about, and what to
do; "next" is a step of the installation that has not been taken yet.

Examples:
  nix-dispatch doctor
  nix-dispatch doctor --timeout 5s --json

Exit status: 0 no problem was found, 1 one was, 2 wrong usage.`

// The levels of findings.
const (
	levelOK      = "ok"
	levelNext    = "next" // nothing is wrong, but nix-dispatch is not switched on yet
	levelWarning = "warning"
	levelProblem = "problem"
)

// A finding is one thing that the doctor found, in its JSON form.
type finding struct {
	Level   string `json:"level"`
	Subject string `json:"subject"` // what it is about
	Text    string `json:"text"`
	Fix     string `json:"fix,omitempty"` // what to do about it
}

func (f finding) write(w io.Writer) {
	text := f.Text
	if f.Fix != "" {
		text += "; " + f.Fix
	}
	fmt.Fprintf(w, "%-8s %s: %s\n", f.Level, pingtext.OneLine(f.Subject), pingtext.OneLine(text))
}

func fine(subject, format string, args ...any) finding {
	return finding{Level: levelOK, Subject: subject, Text: fmt.Sprintf(format, args...)}
}

func next(subject, fix, format string, args ...any) finding {
	return finding{Level: levelNext, Subject: subject, Text: fmt.Sprintf(format, args...), Fix: fix}
}

func warning(subject, fix, format string, args ...any) finding {
	return finding{Level: levelWarning, Subject: subject, Text: fmt.Sprintf(format, args...), Fix: fix}
}

func problem(subject, fix, format string, args ...any) finding {
	return finding{Level: levelProblem, Subject: subject, Text: fmt.Sprintf(format, args...), Fix: fix}
}

func doctorCommand() *command {
	c := newCommand("doctor", "", "look for what keeps builds from the machines", doctorAbout)
	socket := socketFlag(c.Flags)
	timeout := stepTimeoutFlag(c.Flags)
	asJSON := c.Flags.Bool("json", false, "print a JSON object")
	c.run = func(ctx context.Context, _ []string, std stdio) int {
		if *timeout < 0 {
			return usageError(std, c.Name, "--timeout must be positive")
		}
		ctx, stop := interruptible(ctx)
		defer stop()
		p := newPinger(ctx, *socket, *timeout)
		defer p.close()
		return p.examine(ctx, *socket, *asJSON, std)
	}
	return c
}

// examine looks at everything and prints what it finds; it returns the exit status.
func (p *pinger) examine(ctx context.Context, socket string, asJSON bool, std stdio) int {
	found := []finding{}
	tell := func(f finding) {
		found = append(found, f)
		if !asJSON {
			f.write(std.out)
		}
	}
	p.claims = true
	status := p.lookAtDaemon(ctx, socket, tell)
	thisHost().look(socket, p.served(ctx, status), tell)
	if status != nil {
		p.lookAtMachines(ctx, status, tell)
	}
	if ctx.Err() != nil {
		fmt.Fprintln(std.err, "nix-dispatch: interrupted")
		return exitInterrupted
	}
	return endDoctor(std, found, asJSON)
}

func endDoctor(std stdio, found []finding, asJSON bool) int {
	count := func(level string) (n int) {
		for _, f := range found {
			if f.Level == level {
				n++
			}
		}
		return n
	}
	problems, warnings := count(levelProblem), count(levelWarning)
	if asJSON {
		if code := printJSON(std, map[string]any{"ok": problems == 0, "findings": found}); code != exitOK {
			return code
		}
	} else {
		fmt.Fprintf(std.out, "problems: %d, warnings: %d\n", problems, warnings)
		for _, f := range found {
			if f.Level == levelNext && problems == 0 {
				fmt.Fprintf(std.out, "next: %s\n", pingtext.OneLine(f.Fix))
			}
		}
	}
	if problems > 0 {
		return exitFailed
	}
	return exitOK
}

// lookAtDaemon asks nix-dispatchd how it is; nil if it does not say.
func (p *pinger) lookAtDaemon(ctx context.Context, socket string, tell func(finding)) *dispatchv1.StatusResponse {
	const subject = "nix-dispatchd"
	var st *dispatchv1.StatusResponse
	err := p.connErr
	if err == nil {
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		st, err = p.conn.Status(callCtx, &dispatchv1.StatusRequest{})
	}
	if err != nil {
		fix := "start it, or name its socket with --socket; until then the machines are not looked at"
		message := grpcstatus.Convert(err).Message()
		if grpcstatus.Code(err) == codes.PermissionDenied || strings.Contains(message, "permission denied") {
			fix = "run this as root or as a member of the group nix-dispatch; until then the machines are not looked at"
		}
		tell(problem(subject, fix, "it cannot be asked: %s", message))
		return nil
	}
	if st.GetVersion() == version {
		tell(fine(subject, "version %s answers at %s", version, socket))
	} else {
		tell(warning(subject, "restart nix-dispatchd, or use the nix-dispatch that came with it",
			"version %q answers at %s, and this is nix-dispatch %q", st.GetVersion(), socket, version))
	}
	const mend = "mend it; 'nix-dispatch machines check' shows how the list is read"
	for _, e := range st.GetErrors() {
		tell(problem("list of machines", mend, "%s", e.GetMessage()))
	}
	if r := st.GetReload(); r != nil && !r.GetSuccess() {
		for _, e := range r.GetErrors() {
			tell(problem("list of machines", mend, "it was not read anew: %s", e.GetMessage()))
		}
	}
	if n := st.GetUnplaceable(); n > 0 {
		tell(warning("builds", "'nix-dispatch status' names them, 'nix-dispatch explain' says why", "%d wait though no machine can ever take them", n))
	}
	return st
}

// lookAtMachines pings the machines that the daemon serves.
func (p *pinger) lookAtMachines(ctx context.Context, st *dispatchv1.StatusResponse, tell func(finding)) {
	var uris []string
	for _, m := range st.GetMachines() {
		uri := m.GetUri()
		switch {
		case m.GetState() == dispatchv1.MachineState_MACHINE_STATE_UNSUPPORTED:
			tell(warning(uri, "", "%s", m.GetReason()))
			continue
		case m.GetDrained():
			tell(warning(uri, "'nix-dispatch undrain' gives it builds again", "it is drained, %s", m.GetReason()))
		}
		if !m.GetRemoved() && !slices.Contains(uris, uri) {
			uris = append(uris, uri)
		}
	}
	if len(st.GetMachines()) == 0 {
		tell(problem("list of machines", "add some to /etc/nix/machines, or see nix-dispatchd's --builders", "there are no machines"))
	}
	for _, ping := range p.all(ctx, uris) {
		r, _ := ping.follow(func(*pingtext.Report, pingtext.Step) {})
		for _, f := range findingsOf(r) {
			tell(f)
		}
	}
}

// wherefore is a step that something is wrong with, and what kind of thing it is where
// that is another word.
func wherefore(s pingtext.Step) string {
	if s.Cause == s.Name {
		return s.Name
	}
	return s.Name + ": " + s.Cause
}

// findingsOf is what a ping says of a machine.
func findingsOf(r *pingtext.Report) []finding {
	var found []finding
	var told []string
	total := 0.0
	for _, s := range r.Steps {
		total += s.Milliseconds
		switch {
		case s.Verdict == pingtext.Failed || s.Cause == "claims":
			found = append(found, problem(r.Machine, s.Fix, "%s: %s", wherefore(s), s.Detail))
		case s.Verdict == pingtext.Warning:
			found = append(found, warning(r.Machine, s.Fix, "%s: %s", wherefore(s), s.Detail))
		case s.Name == "protocol" || s.Name == "trust":
			told = append(told, s.Detail)
		case s.Name == "claims":
			told = append(told, "own systems and features "+s.Detail)
		}
	}
	switch {
	case r.Error != "":
		found = append(found, problem(r.Machine, "", "%s", r.Error))
	case r.OK:
		found = append([]finding{fine(r.Machine, "its Nix was reached in %.0f ms: %s", total, strings.Join(told, "; "))}, found...)
	}
	return found
}
