package main

import (
	"cmp"
	"fmt"
	"io"
	"path"
	"strings"
	"sync"
	"time"

	"nixdispatch/cmd/internal/buildhook"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/hookcall"
	"nixdispatch/proto/nix"
)

// progress shows a realisation: lines that stay, and on a terminal below them a
// few that are painted anew as things move.
//
// It is safe for concurrent use.
type progress struct {
	printLogs bool

	mu sync.Mutex
	w  io.Writer
	// screen is nil where there is no terminal.
	screen  *screen
	builds  map[string]*buildView
	order   []*buildView // those in progress, first come first
	planned int
	built   int
	failed  int
}

// A buildView is one build in progress as the user sees it.
type buildView struct {
	drvPath  string
	machine  string
	phase    string
	running  bool // not waiting for a machine
	transfer *dispatchv1.Transfer
	since    time.Time // of the phase
	log      buildLog
}

// newProgress shows on w; the caller must close it.
func newProgress(w io.Writer, printLogs bool) *progress {
	p := &progress{printLogs: printLogs, w: w, builds: make(map[string]*buildView)}
	if p.screen = newScreen(w); p.screen != nil {
		p.screen.start(&p.mu, p.paint)
	}
	return p
}

// close takes the painted lines away and stops painting.
func (p *progress) close() {
	if p.screen != nil {
		p.screen.stop()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.print()
}

// print writes lines that stay.
func (p *progress) print(lines ...string) {
	var b strings.Builder
	if p.screen != nil {
		b.WriteString(p.screen.erase())
	}
	for _, line := range lines {
		b.WriteString(line)
		b.WriteByte('\n')
	}
	if b.Len() > 0 {
		io.WriteString(p.w, b.String()) //nolint:errcheck // nobody is left to tell
	}
}

func (p *progress) plan(plan *dispatchv1.Plan) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.planned = len(plan.GetWillBuild())
	if n := len(plan.GetWillBuild()); n > 0 {
		p.print(fmt.Sprintf("%s to build", count(n, "derivation")))
	}
	if n := len(plan.GetWillSubstitute()); n > 0 {
		p.print(fmt.Sprintf("%s to fetch from substituters", count(n, "path")))
	}
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

func (p *progress) event(ev *dispatchv1.BuildEvent) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.view(ev.GetDrvPath())
	switch e := ev.GetEvent().(type) {
	case *dispatchv1.BuildEvent_Queued:
		b.enter("queued", false)
	case *dispatchv1.BuildEvent_Placed:
		b.machine = nix.PlainText(e.Placed.GetMachine())
		b.enter("starting", true)
		p.print("building " + b.title())
	case *dispatchv1.BuildEvent_Copying:
		b.enter("copying", true)
		b.transfer = e.Copying.GetTransfer()
	case *dispatchv1.BuildEvent_Building:
		b.enter("building", true)
	case *dispatchv1.BuildEvent_Log:
		p.showLog(b, b.log.write(e.Log.GetData()))
	case *dispatchv1.BuildEvent_Fetching:
		b.enter("fetching", true)
		b.transfer = e.Fetching.GetTransfer()
	case *dispatchv1.BuildEvent_Finished:
		p.showLog(b, b.log.end())
		p.finish(b, e.Finished)
	}
}

func (p *progress) view(drvPath string) *buildView {
	b := p.builds[drvPath]
	if b == nil {
		b = &buildView{drvPath: drvPath, phase: "queued"}
		p.builds[drvPath] = b
		p.order = append(p.order, b)
	}
	return b
}

func (b *buildView) enter(phase string, running bool) {
	if b.phase != phase {
		b.phase, b.since, b.transfer = phase, time.Now(), nil
	}
	b.running = running
}

// title names the build and where it runs.
func (b *buildView) title() string {
	if b.machine == "" {
		return fmt.Sprintf("'%s' locally", nix.PlainText(b.drvPath))
	}
	return fmt.Sprintf("'%s' on '%s'", nix.PlainText(b.drvPath), b.machine)
}

func (p *progress) showLog(b *buildView, lines []string) {
	if !p.printLogs || len(lines) == 0 {
		return
	}
	prefix := drvName(b.drvPath) + "> "
	for i, line := range lines {
		lines[i] = prefix + line
	}
	p.print(lines...)
}

func (p *progress) finish(b *buildView, f *dispatchv1.Finished) {
	delete(p.builds, b.drvPath)
	for i := range p.order {
		if p.order[i] == b {
			p.order = append(p.order[:i], p.order[i+1:]...)
			break
		}
	}
	if f.GetStatus().Succeeded() {
		p.built++
		return
	}
	p.failed++
	lines := []string{"error: " + buildhook.FailureText(b.drvPath, cmp.Or(f.GetMachine(), b.machine),
		hookcall.BuildStatus(f.GetStatus()), f.GetError())}
	if len(b.log.tail) > 0 {
		lines = append(lines, fmt.Sprintf("last %s of its log:", count(len(b.log.tail), "line")))
		for _, line := range b.log.tail {
			lines = append(lines, "> "+line)
		}
	}
	p.print(lines...)
}

// drvName is the name of a derivation for a person, "hello-2.12".
func drvName(drvPath string) string {
	name := path.Base(drvPath)
	if p, err := nix.ParseStorePath(drvPath); err == nil {
		name = p.Name()
	}
	return nix.PlainText(strings.TrimSuffix(name, ".drv"))
}

// paint gives the lines that show the state now, at most rows.
func (p *progress) paint(rows int) []string {
	running := 0
	for _, b := range p.order {
		if b.running {
			running++
		}
	}
	total := max(p.planned, p.built+p.failed+len(p.order))
	head := fmt.Sprintf("[%d of %d built, %d running, %d queued", p.built, total, running, len(p.order)-running)
	if p.failed > 0 {
		head += fmt.Sprintf(", %d failed", p.failed)
	}
	lines := []string{head + "]"}
	for _, b := range p.order {
		if !b.running {
			continue
		}
		if len(lines) == rows {
			lines[rows-1] = fmt.Sprintf("  and %d more", running-rows+2)
			break
		}
		lines = append(lines, "  "+b.line(time.Now()))
	}
	return lines
}

// line is one line of the painted ones.
func (b *buildView) line(now time.Time) string {
	text := drvName(b.drvPath)
	if b.machine != "" {
		text += " on " + b.machine
	}
	text += ": " + b.phase
	switch t := b.transfer; {
	case t != nil:
		text += fmt.Sprintf(" %d of %d paths, %s of %s", t.GetPathsDone(), t.GetPaths(), nix.SizeText(t.GetBytesDone()), nix.SizeText(t.GetBytes()))
	case b.log.phase != "" && b.phase == "building":
		text += " (" + b.log.phase + ")"
	}
	if !b.since.IsZero() {
		text += fmt.Sprintf(" %v", now.Sub(b.since).Truncate(time.Second))
	}
	if n := len(b.log.tail); n > 0 && b.phase == "building" {
		text += "  " + b.log.tail[n-1]
	}
	return text
}
