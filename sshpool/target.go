package sshpool

import (
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A Target says how a host is reached, all questions answered: [Config], and
// where it asks for that, OpenSSH's configuration. Lists that are nil leave the
// choice to this package.
type Target struct {
	Host string // name or address to connect to (HostName)
	Port int
	User string

	// Given is the name as it stands in the Config, before any alias.
	Given string

	AddressFamily  string // "any", "inet" or "inet6"
	BindAddress    string
	ConnectTimeout time.Duration // 0: the pool's

	// ProxyCommand is run through /bin/sh, ProxyJump by ssh itself; at most one
	// is set, with its tokens expanded.
	ProxyCommand    string
	ProxyJump       string
	ProxyUseFdpass  bool
	SSHConfigFile   string // of ssh's option -F, for the jump host
	sshProgram      string
	IdentityFiles   []string
	DefaultFiles    bool // IdentityFiles were not asked for: missing ones are not missed
	Certificates    []string
	IdentitiesOnly  bool
	AgentSocket     string   // empty: no agent
	NoPublicKeys    string   // the option that forbids public keys, if one does
	Untried         []string // options that are set, for ways to log in that are not tried here
	UserKnownHosts  []string
	OtherKnownHosts []string // GlobalKnownHostsFile
	HostKeyAlias    string
	// KnownHostsCommand prints more known_hosts lines; its tokens are left in.
	KnownHostsCommand string
	Strict            Strictness
	HashKnownHosts    bool
	TrustLocalhost    bool // NoHostAuthenticationForLocalhost
	RevokedHostKeys   []string
	RequiredRSASize   int // bits; 0: any

	// ServerAliveInterval and ServerAliveCountMax are 0 for the pool's.
	ServerAliveInterval time.Duration
	ServerAliveCountMax int

	Ciphers           []string
	KexAlgorithms     []string
	MACs              []string
	HostKeyAlgorithms []string
	PublicKeyAccepted []string // PubkeyAcceptedAlgorithms
	CASignatures      []string // CASignatureAlgorithms
	RekeyBytes        uint64   // 0: the library's
	Env               []string // "NAME=value" to send with each session

	// Warnings are options that are set and cannot be followed, and keys that are
	// missing, each with what
	// that means.
	Warnings []string

	lost      []string // errors of Config.IdentityFiles that ssh left out
	tokens    tokens   // for KnownHostsCommand
	given     []byte   // Config.HostKey
	noProgram error    // why ssh was not asked, though it should have been
}

// Strictness is what is done about host keys that are not known:
// StrictHostKeyChecking of ssh_config(5).
type Strictness int

// The values of StrictHostKeyChecking.
const (
	// StrictAsk and StrictYes refuse what is not known: there is nobody to ask.
	StrictAsk Strictness = iota
	StrictYes
	// StrictNew takes the key of a host not known, and remembers it.
	StrictNew
	// StrictOff also lets the key of a known host be another one.
	StrictOff
)

// String returns the value's name in ssh_config(5).
func (s Strictness) String() string {
	switch s {
	case StrictYes:
		return "yes"
	case StrictNew:
		return "accept-new"
	case StrictOff:
		return "no"
	default:
		return "ask"
	}
}

// String is user@host:port, and through what.
func (t *Target) String() string {
	s := t.User + "@" + t.addr()
	if by := t.proxied(); by != "" {
		s += " " + by
	}
	return s
}

func (t *Target) addr() string { return net.JoinHostPort(t.Host, strconv.Itoa(t.Port)) }

// knownName is the host's name in known_hosts files, and the one without the
// port, which OpenSSH looks up next; "" if there is none.
func (t *Target) knownName() (name, bare string) {
	if t.HostKeyAlias != "" {
		return strings.ToLower(t.HostKeyAlias), ""
	}
	host := strings.ToLower(t.Host)
	if t.Port == 22 {
		return host, ""
	}
	return fmt.Sprintf("[%s]:%d", host, t.Port), host
}

// plainTarget is the target of a host without regard to OpenSSH's configuration.
func plainTarget(cfg Config, me *localUser) *Target {
	t := &Target{
		Host: cfg.Host, Port: cfg.Port, User: cfg.User, Given: cfg.Host,
		AddressFamily:  "any",
		IdentityFiles:  cfg.IdentityFiles,
		AgentSocket:    cfg.AgentSocket,
		UserKnownHosts: cfg.KnownHostsFiles,
		given:          cfg.HostKey,
	}
	if t.Port == 0 {
		t.Port = 22
	}
	if t.User == "" {
		t.User = me.name
	}
	dir := filepath.Join(me.home, ".ssh")
	if len(t.IdentityFiles) == 0 {
		t.DefaultFiles = true
		for _, name := range []string{"id_ed25519", "id_ecdsa", "id_rsa"} {
			t.IdentityFiles = append(t.IdentityFiles, filepath.Join(dir, name))
		}
	}
	switch t.AgentSocket {
	case "":
		t.AgentSocket = me.getenv(agentVariable)
	case "none":
		t.AgentSocket = ""
	}
	if len(t.UserKnownHosts) == 0 {
		t.UserKnownHosts = []string{filepath.Join(dir, "known_hosts")}
		t.OtherKnownHosts = []string{"/etc/ssh/ssh_known_hosts"}
	}
	return t
}

const agentVariable = "SSH_AUTH_SOCK"
