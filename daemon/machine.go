package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/sshpool"
)

// A machine is a way to a machine and what is known of it there. Several lines
// may lead to it.
type machine struct {
	// line is the first that did.
	line   nix.Machine
	config sshpool.Config
	// host is set when the machine is connected to, before others know of it.
	host *sshpool.Host
	// own is the store that none of the builds may find there; nil if they may be
	// about several.
	own       *localStore
	ng        bool // ssh-ng://, the worker protocol; else ssh://, the serve protocol
	command   string
	uploads   *claims
	turns     chan struct{} // has one for each large upload under way
	condition *condition
	keeper    *keeper // nil if nobody looks after the machine
	idle      *idlePool[*remote]
	absences  absences
	log       *slog.Logger
	copyStall time.Duration // copyStall, but in tests

	// untrusted is learned: from the worker protocol's handshake at each probe, or
	// from the words of a refusal where the protocol cannot tell.
	untrusted atomic.Bool
	// others are the stores of this host that the one there was found not to be.
	others knownOthers
	// storeUnknown tells that this could not be asked, and was complained of.
	storeUnknown atomic.Bool
}

// unsupported says why the daemon cannot serve a machine, "" if it can. Builds
// that only such machines can run are left to the stock hook.
func unsupported(m nix.Machine) string {
	if m.Ref.Scheme == "ssh" || m.Ref.Scheme == "ssh-ng" || isChroot(m.Ref) {
		return ""
	}
	return fmt.Sprintf("store URI %q is neither ssh:// nor ssh-ng:// nor a path; left to the stock hook", m.StoreURI)
}

// isChroot tells whether a machine is a store in a directory of this host, named
// by its path: a child process serves it, as it does ssh-ng://localhost.
func isChroot(ref nix.StoreReference) bool {
	return ref.Scheme == "local" && !ref.Word && ref.Path != "" && len(ref.Params) == 0
}

// newMachine makes the machine of a line, without connecting to it.
func newMachine(line nix.Machine, own *localStore, log *slog.Logger) *machine {
	m := &machine{
		line:      line,
		ng:        line.Ref.Scheme == "ssh-ng" || isChroot(line.Ref),
		command:   remoteCommand(line.Ref),
		own:       own,
		uploads:   newClaims(),
		turns:     make(chan struct{}, uploadTurns(line)),
		condition: newCondition(Gates{}),
		idle:      &idlePool[*remote]{ttl: maxRemoteIdle, end: func(r *remote) { r.hangUp() }},
		log:       log.With("machine", line.StoreURI),
		copyStall: copyStall,
	}
	m.config = m.sshConfig()
	return m
}

// maxUploads is the most large uploads to a machine at a time.
const maxUploads = 4

// uploadTurns is how many large uploads a machine gets at a time: fewer than the
// builds that are there, so that some build while the inputs of others travel, but
// not one alone where several build, for one stream may not fill a fast line, nor
// a long one (2 MiB for each round trip).
func uploadTurns(line nix.Machine) int { return min((line.MaxJobs+2)/2, maxUploads) }

// connect begins to connect, in the background.
func (m *machine) connect(pool *sshpool.Pool) {
	if w := m.compressionIgnored(); w != "" {
		m.log.Warn(w)
	}
	m.host = pool.Add(m.config)
	if m.keeper != nil {
		m.keeper.start()
	}
}

// compressionIgnored warns of a parameter of the URI; "" if there is no need.
func (m *machine) compressionIgnored() string {
	switch m.line.Ref.Params["compress"] {
	case "true", "yes", "1":
		return "compress=true in the machine's URI has no effect: data is sent uncompressed"
	default:
		return ""
	}
}

// sshConfig says how the machine is reached: as the ssh of stock Nix would, from
// the same arguments. The columns of the machine's line win over the URI's
// parameters (completeStoreReference in src/libstore/machines.cc).
func (m *machine) sshConfig() sshpool.Config {
	ref := m.line.Ref
	cfg := sshpool.Config{
		Name:  m.line.StoreURI,
		Host:  ref.Host,
		Port:  ref.Port,
		User:  ref.User,
		Local: ref.FakeSSH() || isChroot(ref),

		SSHConfig:  true,
		SSHOptions: sshOptions(m.log),

		Probe: m.probe, ProbeCommand: m.command,
	}
	if key := m.line.IdentityFile(); key != "" {
		cfg.IdentityFiles = []string{key}
	}
	if key := m.line.HostKey(); key != "" {
		// The parser has checked the column. A bad parameter becomes a key that
		// no host can have, so that nothing is trusted by mistake.
		decoded, err := nix.DecodeHostKey(key)
		if err != nil {
			decoded = "invalid base64-ssh-public-host-key"
		}
		cfg.HostKey = []byte(decoded)
	}
	return cfg
}

// remoteCommand is what is run on the machine. As in stock Nix since 2.20 the
// remote program is given to the remote shell as it is written, so that
// "~/bin/nix-store" works; the store is quoted, as it was until then.
func remoteCommand(ref nix.StoreReference) string {
	if isChroot(ref) {
		// This host's own settings may say that nothing is built here.
		return "nix-daemon --stdio --option max-jobs 1 --option builders '' --store " + shellQuote(ref.Path)
	}
	program, words := "nix-store", "--serve --write"
	if ref.Scheme == "ssh-ng" {
		program, words = "nix-daemon", "--stdio"
	}
	if p := ref.Params["remote-program"]; p != "" {
		program = p
	}
	command := program + " " + words
	if store := ref.Params["remote-store"]; store != "" {
		command += " --store " + shellQuote(store)
	}
	return command
}

// shellQuote makes s one word of a POSIX shell.
func shellQuote(s string) string {
	plain := func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("_-./:=@,+%", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// probe tells whether the machine is of use: it speaks Nix's protocol.
func (m *machine) probe(ctx context.Context, s *sshpool.Session) error {
	r, err := m.startRemote(ctx, s)
	if err != nil {
		return err
	}
	m.untrusted.Store(r.store.trust() == worker.NotTrusted)
	m.others.forget() // the host behind the name may be another now
	m.storeUnknown.Store(false)
	if m.own != nil {
		if err := m.checkStore(ctx, r, m.own); err != nil {
			return err
		}
	}
	m.condition.connected()
	if m.keeper != nil {
		m.keeper.connected(ctx, s.Connection())
	}
	return nil
}

// open finds or starts a remote process for one build. fresh says that it must
// not have served another build. The caller must close it. Cancelling ctx ends
// the remote process. local is the store that the build is for.
func (m *machine) open(ctx context.Context, fresh bool, local *localStore) (*remote, error) {
	if m.keeper != nil {
		m.keeper.use()
	}
	if !fresh {
		for r, ok := m.idle.take(); ok; r, ok = m.idle.take() {
			if r.alive() && m.others.has(local.key) {
				r.bind(ctx)
				return r, nil
			}
			r.hangUp()
		}
	}
	s, err := m.host.Session(ctx, m.command)
	if err != nil {
		return nil, m.fault(doingSession, contextCause(ctx, err))
	}
	r, err := m.startRemote(ctx, s)
	if err != nil {
		_ = s.Close() // the handshake's error says more
		return nil, m.fault("start "+m.command, contextCause(ctx, err))
	}
	stop := context.AfterFunc(ctx, func() { _ = s.Close() })
	err = m.checkStore(ctx, r, local)
	stop()
	if err != nil {
		_ = s.Close() // nothing is under way in it
		return nil, m.fault(doingStoreLook, contextCause(ctx, err))
	}
	r.bind(ctx)
	return r, nil
}

// suspectSince tells since when the machine has been connected to without answering;
// zero if it answers or is not connected.
func (m *machine) suspectSince() time.Time {
	if m.host == nil {
		return time.Time{}
	}
	return m.host.Status().SuspectSince
}

func (m *machine) fault(doing string, err error) error {
	return &machineError{machine: m.line.StoreURI, doing: doing, err: err}
}
