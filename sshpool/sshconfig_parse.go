package sshpool

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// sshOptions are what ssh -G prints: the values of each option in their order,
// by its name in lower case.
type sshOptions map[string][]string

// parseSSHOptions reads the output of ssh -G: lines of a name, a blank and a
// value. What has no value is left out.
func parseSSHOptions(text []byte) (sshOptions, error) {
	opts := make(sshOptions)
	for line := range bytes.Lines(text) {
		name, value, ok := strings.Cut(strings.TrimRight(string(line), "\r\n"), " ")
		if !ok || name == "" {
			continue
		}
		name = strings.ToLower(name)
		opts[name] = append(opts[name], value)
	}
	for _, name := range []string{"hostname", "port", "user"} {
		if opts.one(name) == "" {
			return nil, fmt.Errorf("ssh -G told no %s", name)
		}
	}
	return opts, nil
}

// one is the value of an option that has one, "" if it has none.
func (o sshOptions) one(name string) string {
	if len(o[name]) == 0 {
		return ""
	}
	return o[name][0]
}

// flag tells whether an option that is on or off is on.
func (o sshOptions) flag(name string) bool {
	switch strings.ToLower(o.one(name)) {
	case "yes", "true", "always":
		return true
	default:
		return false
	}
}

// number is the value of a numeric option, 0 for "none" and what is no number.
func (o sshOptions) number(name string) int {
	n, err := strconv.Atoi(o.one(name))
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// names are the values of an option for file names with one a line, without
// "none".
func (o sshOptions) names(name string) []string {
	return slices.DeleteFunc(slices.Clone(o[name]), isNone)
}

// line are the file names of an option that has them all in one line. ssh does
// not quote: a name with blanks is taken for one if what follows them cannot
// begin one. All names are absolute by then, unless somebody wrote a relative one.
func (o sshOptions) line(name string) []string {
	var out []string
	for word := range strings.SplitSeq(o.one(name), " ") {
		switch {
		case len(out) > 0 && !strings.HasPrefix(word, "/") && !strings.HasPrefix(word, "~"):
			out[len(out)-1] += " " + word
		case word != "" && !isNone(word):
			out = append(out, word)
		}
	}
	return out
}

func isNone(s string) bool { return strings.EqualFold(s, "none") }

// list is the value of an option with a list of algorithms; nil if nobody set it.
func (o sshOptions) list(name string, defaults sshOptions) []string {
	if !o.isSet(name, defaults) || o.one(name) == "" {
		return nil
	}
	return strings.Split(o.one(name), ",")
}

// isSet tells whether somebody set an option to something else than the default.
func (o sshOptions) isSet(name string, defaults sshOptions) bool {
	return defaults != nil && !slices.Equal(o[name], defaults[name])
}

// targetOf makes of ssh's options for a host what this package goes by. defaults
// are ssh's own; nil: not known.
func targetOf(o, defaults sshOptions, cfg Config, me *localUser) (*Target, error) {
	t := &Target{
		Given: cfg.Host, Host: o.one("hostname"), User: o.one("user"), Port: o.number("port"),
		AddressFamily:   strings.ToLower(o.one("addressfamily")),
		BindAddress:     o.one("bindaddress"),
		ConnectTimeout:  seconds(o.number("connecttimeout")),
		IdentitiesOnly:  o.flag("identitiesonly"),
		DefaultFiles:    defaults != nil && !o.isSet("identityfile", defaults),
		HostKeyAlias:    strings.ToLower(o.one("hostkeyalias")),
		HashKnownHosts:  o.flag("hashknownhosts"),
		TrustLocalhost:  o.flag("nohostauthenticationforlocalhost"),
		RequiredRSASize: o.number("requiredrsasize"),

		Ciphers:           o.list("ciphers", defaults),
		KexAlgorithms:     o.list("kexalgorithms", defaults),
		MACs:              o.list("macs", defaults),
		HostKeyAlgorithms: o.list("hostkeyalgorithms", defaults),
		PublicKeyAccepted: o.list("pubkeyacceptedalgorithms", defaults),
		CASignatures:      o.list("casignaturealgorithms", defaults),
		Env:               sessionEnv(o, me.environ()),
		given:             cfg.HostKey,
	}
	if t.Port < 1 || t.Port > 65535 {
		return nil, fmt.Errorf("ssh -G told the port %q", o.one("port"))
	}
	if n := o.number("serveraliveinterval"); n > 0 {
		t.ServerAliveInterval, t.ServerAliveCountMax = seconds(n), o.number("serveralivecountmax")
	}
	if len(t.CASignatures) == 0 && o.one("casignaturealgorithms") != "" {
		t.CASignatures = strings.Split(o.one("casignaturealgorithms"), ",")
	}
	limit, _, _ := strings.Cut(o.one("rekeylimit"), " ")
	t.RekeyBytes, _ = strconv.ParseUint(limit, 10, 64)
	var err error
	if t.Strict, err = parseStrictness(o.one("stricthostkeychecking")); err != nil {
		return nil, err
	}
	t.NoPublicKeys = noPublicKeys(o)
	if o.isSet("gssapiauthentication", defaults) && o.flag("gssapiauthentication") {
		t.Untried = append(t.Untried, "GSSAPIAuthentication")
	}
	if err := t.expand(o, me); err != nil {
		return nil, err
	}
	if err := t.checkAlgorithms(); err != nil {
		return nil, err
	}
	t.Warnings = unfollowed(o, defaults)
	return t, nil
}

// parseStrictness reads StrictHostKeyChecking as ssh -G prints it.
func parseStrictness(s string) (Strictness, error) {
	switch strings.ToLower(s) {
	case "yes", "true":
		return StrictYes, nil
	case "no", "off", "false":
		return StrictOff, nil
	case "accept-new":
		return StrictNew, nil
	case "ask", "":
		return StrictAsk, nil
	default:
		return 0, fmt.Errorf("StrictHostKeyChecking %q is not known here", s)
	}
}

// noPublicKeys names the option that rules out the one way to log in that there
// is here, or nothing.
func noPublicKeys(o sshOptions) string {
	if s := o.one("pubkeyauthentication"); s == "no" || s == "false" {
		return "PubkeyAuthentication " + s
	}
	methods := o.one("preferredauthentications")
	if methods == "" || slices.Contains(strings.Split(methods, ","), "publickey") {
		return ""
	}
	return "PreferredAuthentications " + methods
}

// expand sets what has tokens in it. Some of that ssh -G has expanded already, and
// it must not be done twice: UserKnownHostsFile, HostName, and IdentityAgent but
// for a variable's name.
func (t *Target) expand(o sshOptions, me *localUser) (err error) {
	jump := o.one("proxyjump")
	if isNone(jump) {
		jump = ""
	}
	jumpHost := ""
	if jump != "" {
		_, jumpHost, _ = splitJump(lastJump(jump))
	}
	tok := newTokens(t, me, jumpHost)
	paths := func(names []string) (out []string) {
		for _, name := range names {
			p, e := tok.path(name, me)
			if e != nil {
				err = errors.Join(err, e)
				continue
			}
			out = append(out, p)
		}
		return out
	}
	homes := func(names []string) (out []string) {
		for _, name := range names {
			p, e := me.expandTilde(name)
			if e != nil {
				err = errors.Join(err, e)
				continue
			}
			out = append(out, p)
		}
		return out
	}
	if command := o.one("knownhostscommand"); command != "" && !isNone(command) {
		t.KnownHostsCommand, t.tokens = command, tok
	}
	t.IdentityFiles = paths(o.names("identityfile"))
	t.Certificates = paths(o.names("certificatefile"))
	t.UserKnownHosts = homes(o.line("userknownhostsfile"))
	t.OtherKnownHosts = homes(o.line("globalknownhostsfile"))
	t.RevokedHostKeys = homes(o.line("revokedhostkeys"))
	t.AgentSocket = me.agentSocket(o.one("identityagent"), homes)
	if command := o.one("proxycommand"); command != "" && !isNone(command) {
		var e error
		t.ProxyCommand, e = tok.only("hknpr").expand(command, nil)
		err = errors.Join(err, e)
		t.ProxyUseFdpass = o.flag("proxyusefdpass")
	}
	t.ProxyJump = jump
	return err
}

// agentSocket is the socket that IdentityAgent means.
func (me *localUser) agentSocket(value string, homes func([]string) []string) string {
	switch {
	case value == "" || value == agentVariable:
		return me.getenv(agentVariable)
	case isNone(value):
		return ""
	case strings.HasPrefix(value, "$"):
		return me.getenv(strings.TrimPrefix(value, "$"))
	}
	if names := homes([]string{value}); len(names) == 1 {
		return names[0]
	}
	return ""
}

// sessionEnv is what SendEnv and SetEnv give to the commands, in ssh's order: of
// two with the same name, sshd takes the later.
func sessionEnv(o sshOptions, environ []string) []string {
	var env []string
	for _, v := range environ {
		name, _, _ := strings.Cut(v, "=")
		if slices.ContainsFunc(o["sendenv"], func(pattern string) bool { return matchPattern(pattern, name) }) {
			env = append(env, v)
		}
	}
	return append(env, slices.DeleteFunc(slices.Clone(o["setenv"]), func(v string) bool {
		name, _, ok := strings.Cut(v, "=")
		return !ok || name == ""
	})...)
}
