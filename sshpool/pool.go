// Package sshpool keeps SSH connections to hosts open and runs commands over
// them. It knows nothing of what the commands mean.
//
// Each [Host] has one owner: a goroutine that connects, keeps the connection
// alive, notices its death, waits, and connects again. It alone changes the
// host's state. Nobody who wants a session ever waits for a connection to be
// made: [Host.Session] fails at once with [ErrNotUp] when there is none.
//
// The one rule for callers: Close every [Session], and read its Stderr as long
// as its Stdout is read.
//
// golang.org/x/crypto/ssh takes no contexts, so every wait for the peer is
// bounded here: when the peer does not answer in time the connection is closed,
// which is the only thing that ends the wait.
package sshpool

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Options say how a [Pool] behaves. The zero value is useful.
type Options struct {
	// Logger gets connections gained (Info) and lost (Warn). Nil discards.
	Logger *slog.Logger

	// OnChange is told of every change of a host other than its number of
	// sessions. It is called by the host's owner: in order, never twice at
	// once for one host, and the owner waits for it. It must not call
	// [Host.Close] or [Pool.Close].
	OnChange func(Status)

	// Dial makes the transport of a connection, unless a proxy does. Nil uses a
	// [net.Dialer]. network is "tcp", "tcp4" or "tcp6", addr is host:port. It
	// must return soon after its context ends.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)

	// ConnectTimeout bounds resolving and connecting. Default 15 s.
	ConnectTimeout time.Duration
	// HandshakeTimeout bounds key exchange and authentication. Default 30 s.
	HandshakeTimeout time.Duration
	// ProbeTimeout bounds opening and running [Config.Probe]. Default 60 s.
	ProbeTimeout time.Duration
	// OpenTimeout is how long the peer may take to open a session. While more
	// than a few bytes keep coming from it, it gets up to four times as long.
	// Then the connection is given up. Default 30 s.
	OpenTimeout time.Duration

	// KeepaliveInterval is how often silence is looked for, and broken by a
	// request if there was any. A connection is dead when KeepaliveCount
	// intervals passed without one byte received. Defaults 15 s and 3.
	KeepaliveInterval time.Duration
	KeepaliveCount    int

	// BackoffMin and BackoffMax bound the pause before connecting again. It
	// doubles with every failure, and each pause is varied by half up or down.
	// Defaults 1 s and 60 s.
	BackoffMin, BackoffMax time.Duration

	// IdleTimeout is how long a connection beyond the first is kept without
	// sessions. Default 2 min.
	IdleTimeout time.Duration
	// MaxConnections bounds the connections to one host. Default 64.
	MaxConnections int

	resolver  *resolver
	noProgram *sync.Once // for the one warning that there is no ssh program
}

func (o Options) withDefaults() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.resolver, o.noProgram = newResolver(), new(sync.Once)
	setDefault(&o.ConnectTimeout, 15*time.Second)
	setDefault(&o.HandshakeTimeout, 30*time.Second)
	setDefault(&o.ProbeTimeout, 60*time.Second)
	setDefault(&o.OpenTimeout, 30*time.Second)
	setDefault(&o.KeepaliveInterval, 15*time.Second)
	setDefault(&o.KeepaliveCount, 3)
	setDefault(&o.BackoffMin, time.Second)
	setDefault(&o.BackoffMax, 60*time.Second)
	setDefault(&o.IdleTimeout, 2*time.Minute)
	setDefault(&o.MaxConnections, 64)
	return o
}

func setDefault[T int | time.Duration](field *T, value T) {
	if *field <= 0 {
		*field = value
	}
}

// A Config names a host and says how to reach it. It is not changed after
// [Pool.Add]; a host whose Config changes is closed and added anew.
type Config struct {
	// Name is what the host is called in errors, logs and [Status].
	Name string

	// Host is a name or an address (IPv6 without brackets). Port 0 means 22,
	// an empty User the user this process runs as.
	Host string
	Port int
	User string

	// Local runs commands as children of this process instead, with no ssh; of
	// the fields below only the probe counts then.
	Local bool

	// SSHConfig makes OpenSSH's configuration count: Host may be an alias, and
	// whatever "ssh -G" says is followed as far as it can be; see [Resolve]. It
	// is asked before the first connection, and again whenever there is none and
	// one is to be made. Where there is no ssh program the host is as without
	// SSHConfig, with a warning.
	SSHConfig bool
	// SSHOptions are arguments for that ssh. What they say goes before Port and
	// IdentityFiles.
	SSHOptions []string

	// IdentityFiles are private key files. They are offered after the keys of
	// the agent, of which those come first that are among the files. Empty
	// means ~/.ssh/id_ed25519, id_ecdsa and id_rsa, or with SSHConfig what that
	// says. All are read anew for each connection.
	IdentityFiles []string
	// AgentSocket is the ssh agent's socket. Empty means $SSH_AUTH_SOCK,
	// "none" no agent. With SSHConfig, IdentityAgent decides instead.
	AgentSocket string

	// HostKey holds the only keys the host may have, one a line, in the form
	// "ssh-ed25519 AAAA... comment". Empty means known_hosts files decide.
	HostKey []byte
	// KnownHostsFiles are known_hosts files; missing ones are skipped. Empty
	// means ~/.ssh/known_hosts and /etc/ssh/ssh_known_hosts. With SSHConfig,
	// UserKnownHostsFile and GlobalKnownHostsFile decide instead.
	KnownHostsFiles []string

	// Probe decides whether the host is up. It gets a session running
	// ProbeCommand on each connection made while there is no other; no other
	// session exists on the host then. It need not Close the session. Nil
	// means that a connection is enough.
	Probe        func(ctx context.Context, s *Session) error
	ProbeCommand string
}

// A Pool is a set of hosts with shared [Options]. Its methods are safe for
// concurrent use.
type Pool struct {
	opts Options

	mu     sync.Mutex // protects following fields
	hosts  map[*Host]struct{}
	closed bool
}

// New returns a Pool without hosts. The caller must Close it.
func New(opts Options) *Pool {
	return &Pool{opts: opts.withDefaults(), hosts: make(map[*Host]struct{})}
}

// Add begins to connect to a host, and returns without waiting. It does not
// look whether the pool knows the host already. A host added to a closed pool
// is closed.
func (p *Pool) Add(cfg Config) *Host {
	p.mu.Lock()
	defer p.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	h := newHost(cfg, p.opts, cancel)
	h.forget = func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.hosts, h)
	}
	if p.closed {
		cancel()
	} else {
		p.hosts[h] = struct{}{}
	}
	go h.run(ctx)
	return h
}

// Close closes all hosts at once, and returns when everything the pool started
// has ended.
func (p *Pool) Close() {
	p.mu.Lock()
	p.closed = true
	hosts := make([]*Host, 0, len(p.hosts))
	for h := range p.hosts {
		hosts = append(hosts, h)
	}
	p.mu.Unlock()
	for _, h := range hosts {
		h.cancel()
	}
	for _, h := range hosts {
		h.Close()
	}
}
