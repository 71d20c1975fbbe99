package sshpool

import (
	"crypto/sha1" //nolint:gosec // OpenSSH's %C is one
	"encoding/hex"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
)

// A localUser is who this process runs as, as far as ssh_config cares.
type localUser struct {
	name, home string
	uid        int
	getenv     func(string) string
	environ    func() []string
}

// currentUser asks the user database, like ssh: a daemon often has no $HOME.
func currentUser() (*localUser, error) {
	u, err := user.Current()
	if err != nil {
		return nil, fmt.Errorf("find the current user: %w", err)
	}
	return &localUser{name: u.Username, home: u.HomeDir, uid: os.Getuid(), getenv: os.Getenv, environ: childEnv}, nil
}

// expandTilde replaces a leading "~" or "~user" by the home directory, as
// tilde_expand in OpenSSH's misc.c does.
func (me *localUser) expandTilde(path string) (string, error) {
	rest, ok := strings.CutPrefix(path, "~")
	if !ok {
		return path, nil
	}
	name, rest, slash := strings.Cut(rest, "/")
	home := me.home
	if name != "" {
		u, err := user.Lookup(name)
		if err != nil {
			return "", fmt.Errorf("expand %q: %w", path, err)
		}
		home = u.HomeDir
	}
	if slash {
		home = strings.TrimSuffix(home, "/") + "/" + rest
	}
	return home, nil
}

// tokens are the percent tokens of ssh_config(5), by their letter.
type tokens map[byte]string

// newTokens makes those that most options accept, for a target whose names are
// settled.
func newTokens(t *Target, me *localUser, jumpHost string) tokens {
	host, _ := os.Hostname()
	short, _, _ := strings.Cut(host, ".")
	alias := t.Given
	if t.HostKeyAlias != "" {
		alias = t.HostKeyAlias
	}
	port := strconv.Itoa(t.Port)
	hash := sha1.Sum([]byte(host + t.Host + port + t.User + jumpHost)) //nolint:gosec // as OpenSSH
	return tokens{
		'C': hex.EncodeToString(hash[:]),
		'L': short, 'l': host,
		'd': me.home, 'u': me.name, 'i': strconv.Itoa(me.uid),
		'h': t.Host, 'n': t.Given, 'k': alias, 'p': port, 'r': t.User,
		'j': jumpHost,
	}
}

// only returns those of some letters.
func (tok tokens) only(letters string) tokens {
	out := make(tokens)
	for _, c := range []byte(letters) {
		out[c] = tok[c]
	}
	return out
}

// expand replaces "%x" and "%%", and with getenv "${NAME}" as well, as
// vdollar_percent_expand in OpenSSH's misc.c does. What is not known is an
// error there, and here.
func (tok tokens) expand(s string, getenv func(string) string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '%' && i+1 < len(s) && s[i+1] == '%':
			i++
			b.WriteByte('%')
		case s[i] == '%':
			i++
			if i == len(s) {
				return "", fmt.Errorf("%q ends with a lone %%", s)
			}
			value, ok := tok[s[i]]
			if !ok {
				return "", fmt.Errorf("unknown token %%%c in %q", s[i], s)
			}
			b.WriteString(value)
		case getenv != nil && strings.HasPrefix(s[i:], "${"):
			name, _, ok := strings.Cut(s[i+2:], "}")
			if !ok {
				return "", fmt.Errorf("unterminated ${ in %q", s)
			}
			value := getenv(name)
			if value == "" {
				return "", fmt.Errorf("%q: the environment has no %q", s, name)
			}
			b.WriteString(value)
			i += len("${}") + len(name) - 1
		default:
			b.WriteByte(s[i])
		}
	}
	return b.String(), nil
}

// path expands the name of a file: tilde, tokens and variables.
func (tok tokens) path(s string, me *localUser) (string, error) {
	s, err := me.expandTilde(s)
	if err != nil {
		return "", err
	}
	return tok.expand(s, me.getenv)
}
