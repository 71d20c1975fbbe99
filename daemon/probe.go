package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"path"
	"strconv"
	"sync"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/sshpool"
)

// A ProbeVerdict is what became of a step of a probe.
type ProbeVerdict int

// The verdicts.
const (
	// ProbeOK: the step went well.
	ProbeOK ProbeVerdict = iota
	// ProbeWarning: builds can run, but not all that one would think.
	ProbeWarning
	// ProbeFailed: the probe ends here.
	ProbeFailed
)

// A ProbeStep is a step of the way to a machine's Nix.
type ProbeStep struct {
	// Name is the step in a word or two that do not change: one of sshpool's steps
	// or of those below.
	Name    string
	Verdict ProbeVerdict
	Took    time.Duration
	// Detail is what was found, or what is wrong. It may hold foreign text.
	Detail string
	// Cause is what kind of thing is wrong, in a few words that do not change.
	Cause string
	// Fix is what to do about it.
	Fix string
}

// The steps after those of sshpool.
const (
	stepFindNix  = "find nix"
	stepProtocol = "protocol"
	stepStore    = "store"
	stepTrust    = "trust"
	stepClaims   = "claims"
	stepMachine  = "machine" // in place of all others, for kinds that are not served
)

// ProbeOptions say how [Probe] goes about it. The zero value is useful.
type ProbeOptions struct {
	// Timeout is how long a step may take. Zero means what the daemon uses: from 15
	// seconds for a connection to a minute for the machine's Nix.
	Timeout time.Duration
	// Claims has the machine's Nix asked, too, for the systems and features that
	// the entry claims. That runs further commands there.
	Claims bool
	// Logger gets what goes on; nil discards it.
	Logger *slog.Logger
}

// Probe connects to a machine as this process's own user, asks its Nix who it is,
// and tells report of each step, in order. entry is a store URI, or an entry of a
// machines file. It tells whether no step failed. The error is for an entry that
// cannot be understood; then there are no steps.
func Probe(ctx context.Context, entry string, opts ProbeOptions, report func(ProbeStep)) (bool, error) {
	lines, errs := nix.ParseMachines(entry, nix.MachinesOptions{DefaultSystems: []string{nixSystem()}})
	switch {
	case len(errs) > 0:
		return false, errs[0]
	case len(lines) != 1:
		return false, fmt.Errorf("%q: expected one store URI, found %d", entry, len(lines))
	case unsupported(lines[0]) != "":
		return false, errors.New(unsupported(lines[0]))
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	local, err := callersStore()
	if err != nil {
		return false, err
	}
	defer local.idle.close()
	return probeMachine(ctx, newMachine(lines[0], local, opts.Logger), lines, sshpool.Options{Logger: opts.Logger}, opts, report), nil
}

// A probe is one way to a machine that is being tried, apart from what builds use.
type probe struct {
	m      *machine      // connected to by nobody else
	lines  []nix.Machine // that lead to it in this way
	opts   ProbeOptions
	ssh    sshpool.Options
	check  *sshpool.Check
	tell   func(ProbeStep)
	last   time.Time // when the last step ended
	failed bool
}

// probeMachine tries a way to a machine. m must not be in use.
func probeMachine(ctx context.Context, m *machine, lines []nix.Machine, ssh sshpool.Options, opts ProbeOptions, report func(ProbeStep)) bool {
	p := &probe{m: m, lines: lines, opts: opts, ssh: ssh, last: time.Now()}
	p.tell = func(s ProbeStep) {
		s.Detail = nix.PlainText(s.Detail) // versions and messages of the other side
		report(s)
	}
	if opts.Timeout > 0 {
		p.ssh.ConnectTimeout, p.ssh.HandshakeTimeout, p.ssh.OpenTimeout = opts.Timeout, opts.Timeout, opts.Timeout
		// The first word on an option counts: before ssh_config's.
		seconds := strconv.Itoa(int(max(opts.Timeout.Seconds(), 1)))
		m.config.SSHOptions = append([]string{"-o", "ConnectTimeout=" + seconds}, m.config.SSHOptions...)
	}
	p.run(ctx)
	return !p.failed
}

func (p *probe) run(ctx context.Context) {
	p.warnOfURI()
	check, err := sshpool.Connect(ctx, p.m.config, p.ssh, p.sshStep)
	if err != nil {
		p.fail(string(sshpool.StepConnect), err)
		return
	}
	defer check.Close()
	p.check = check
	r := p.start(ctx)
	if r == nil {
		return
	}
	stored := p.store(ctx, r)
	r.hangUp() // where one session is allowed, the next needs its place
	if stored {
		p.last = time.Now()
		p.trust(ctx, r)
	}
	if stored && p.opts.Claims {
		p.claims(ctx)
	}
}

// sshStep passes on a step of the connection.
func (p *probe) sshStep(r sshpool.StepReport) {
	p.last = time.Now()
	for _, w := range r.Warnings {
		p.tell(ProbeStep{Name: string(r.Step), Verdict: ProbeWarning, Detail: w, Cause: string(r.Step),
			Fix: "builds go on without it; see docs/ssh.md"})
	}
	p.tell(ProbeStep{Name: string(r.Step), Took: r.Took, Detail: r.Detail})
}

func (p *probe) warnOfURI() {
	if w := p.m.compressionIgnored(); w != "" {
		p.tell(ProbeStep{Name: string(sshpool.StepConfig), Verdict: ProbeWarning, Detail: w, Cause: string(sshpool.CauseConfig),
			Fix: "take compress out of the URI"})
	}
}

// took is the time since the last step ended, which this one does now.
func (p *probe) took() time.Duration {
	now := time.Now()
	defer func() { p.last = now }()
	return now.Sub(p.last)
}

func (p *probe) done(step, format string, args ...any) {
	p.tell(ProbeStep{Name: step, Took: p.took(), Detail: fmt.Sprintf(format, args...)})
}

// fail tells that a step failed: that of the error where it names one, else the
// one given.
func (p *probe) fail(step string, err error) {
	p.failed = true
	s := ProbeStep{Name: step, Verdict: ProbeFailed, Took: p.took(), Detail: err.Error(), Cause: string(sshpool.CauseCommandUnusable)}
	if connect, ok := errors.AsType[*sshpool.ConnectError](err); ok {
		s.Name, s.Cause, s.Detail, s.Fix = string(connect.Step), string(connect.Cause), connect.Err.Error(), connect.Fix
	} else if lost, ok := errors.AsType[*sshpool.LostError](err); ok {
		s.Cause, s.Detail = "connection lost", lost.Err.Error()
	}
	if fault, ok := errors.AsType[*nixFault](err); ok {
		s.Cause, s.Detail, s.Fix = string(fault.cause), fault.err.Error(), fault.fix
	}
	if s.Fix == "" {
		s.Fix = "try by hand, as this user, what ssh does there"
	}
	p.tell(s)
}

// limit bounds a step that ssh's own timeouts do not.
func (p *probe) limit() time.Duration {
	if p.opts.Timeout > 0 {
		return p.opts.Timeout
	}
	return handshakeTimeout
}

// start starts the machine's Nix and greets it; nil if that failed.
func (p *probe) start(ctx context.Context) *remote {
	ctx, cancel := context.WithTimeout(ctx, p.limit())
	defer cancel()
	s, err := p.check.Session(ctx, p.m.command)
	if err != nil {
		p.fail(string(sshpool.StepOpenSession), err)
		return nil
	}
	p.done(string(sshpool.StepOpenSession), "%s", p.m.command)
	first := &firstByte{Reader: s.Stdout}
	s.Stdout = first
	r, err := p.m.startRemote(ctx, s)
	if err != nil {
		step := stepFindNix
		if fault, ok := errors.AsType[*nixFault](err); ok && fault.greeted {
			p.found(first)
			step = stepProtocol
		}
		p.fail(step, err)
		_ = s.Close() // what it says has been heard
		return nil
	}
	p.found(first)
	p.done(stepProtocol, "%s", greetingOf(r.store))
	return r
}

// found tells that the machine's Nix has begun to speak.
func (p *probe) found(first *firstByte) {
	at := first.time()
	p.tell(ProbeStep{Name: stepFindNix, Took: at.Sub(p.last), Detail: p.m.program() + " answers"})
	p.last = at
}

// greetingOf says which protocol is spoken, and by which Nix as far as it tells.
func greetingOf(store remoteStore) string {
	switch s := store.(type) {
	case workerStore:
		return fmt.Sprintf("worker protocol %v, Nix %s", s.c.Version(), s.c.NixVersion())
	case serveStore:
		return fmt.Sprintf("serve protocol %v", s.c.Version())
	default:
		return "an unknown protocol"
	}
}

// store asks the machine's store for something that it does not have.
func (p *probe) store(ctx context.Context, r *remote) bool {
	ctx, cancel := context.WithTimeout(ctx, p.limit())
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = r.session.Close() })()
	if p.m.own == nil {
		return p.anyStore(r)
	}
	err := p.m.checkStore(ctx, r, p.m.own)
	switch {
	case err == nil && p.m.others.has(p.m.own.key):
		p.done(stepStore, "another than this host's")
	case err == nil:
		p.tell(ProbeStep{Name: stepStore, Verdict: ProbeWarning, Took: p.took(), Cause: string(causeOwnStore),
			Detail: "not known whether it is this host's own: the local Nix cannot be asked",
			Fix:    "look whether this host's nix-daemon runs, and whether this user may use it"})
	case errors.Is(err, context.DeadlineExceeded):
		p.fail(stepStore, &nixFault{
			cause: sshpool.CauseTimeout,
			err:   fmt.Errorf("its Nix was asked for a path, and did not answer within %v", p.limit()),
			fix:   "look whether its store, or its nix-daemon, is stuck",
		})
	default:
		p.fail(stepStore, err)
	}
	return err == nil
}

// anyStore asks the machine's store for something that no store has. Whose it is
// matters to single builds.
func (p *probe) anyStore(r *remote) bool {
	if _, err := r.missing([]nix.StorePath{newMark(nix.DefaultStoreDir).info.Path}, false); err != nil {
		p.fail(stepStore, explain(r.stderr, err))
		return false
	}
	p.done(stepStore, "answers")
	return true
}

// trust tells whether the machine's Nix trusts our user, and what follows.
func (p *probe) trust(ctx context.Context, r *remote) {
	trust, how := r.store.trust(), ""
	if _, ok := r.store.(serveStore); ok {
		trust, how = p.askDaemon(ctx)
	}
	switch trust {
	case worker.Trusted:
		p.done(stepTrust, "trusted%s", how)
	case worker.NotTrusted:
		p.tell(ProbeStep{Name: stepTrust, Verdict: ProbeWarning, Took: p.took(), Cause: string(causeUntrusted),
			Detail: "the user is not trusted there" + how + ": what follows from derivations is built, but inputs that are " +
				"neither content-addressed nor signed by a key that the machine trusts are built there again",
			Fix: "add the user to trusted-users in nix.conf there, and restart nix-daemon"})
	default:
		p.done(stepTrust, "not known whether the user is trusted there%s", how)
	}
}

// askDaemon is for the serve protocol, which tells neither the version of its Nix
// nor whether that trusts us. The nix-daemon beside it does, where the user may
// run it, too. Anything odd means that it is not known.
func (p *probe) askDaemon(ctx context.Context) (worker.Trust, string) {
	const unknown = ": its protocol does not tell, and nix-daemon beside it cannot be asked"
	line, ok := daemonBeside(p.m.line)
	if !ok {
		return worker.TrustUnknown, unknown
	}
	ctx, cancel := context.WithTimeout(ctx, min(p.limit(), askLimit))
	defer cancel()
	m := newMachine(line, p.m.own, p.m.log)
	s, err := p.check.Session(ctx, m.command)
	if err != nil {
		return worker.TrustUnknown, unknown
	}
	defer s.Close()
	r, err := m.startRemote(ctx, s)
	if err != nil {
		return worker.TrustUnknown, unknown
	}
	defer r.hangUp()
	how := fmt.Sprintf(" (says its nix-daemon, Nix %s)", r.store.(workerStore).c.NixVersion())
	return r.store.trust(), how
}

// askLimit bounds questions whose answer is nice to have.
const askLimit = 15 * time.Second

// daemonBeside is the line of the same machine and store by the worker protocol;
// ok is false if it is not known what to run for that.
func daemonBeside(line nix.Machine) (_ nix.Machine, ok bool) {
	line.Ref.Scheme = "ssh-ng"
	program := line.Ref.Params["remote-program"]
	if program == "" {
		return line, true
	}
	dir, base := path.Split(program)
	if base != "nix-store" {
		return line, false
	}
	line.Ref.Params = maps.Clone(line.Ref.Params)
	line.Ref.Params["remote-program"] = dir + "nix-daemon"
	return line, true
}

// A firstByte notes when something was read first.
type firstByte struct {
	io.Reader

	mu sync.Mutex
	at time.Time
}

func (f *firstByte) Read(p []byte) (int, error) {
	n, err := f.Reader.Read(p)
	f.mu.Lock()
	defer f.mu.Unlock()
	if n > 0 && f.at.IsZero() {
		f.at = time.Now()
	}
	return n, err
}

func (f *firstByte) time() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.at
}
