package sshpool

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/skeema/knownhosts"
	"golang.org/x/crypto/ssh"
	xknownhosts "golang.org/x/crypto/ssh/knownhosts"
)

// hostKeys are the keys a host may have.
type hostKeys struct {
	addr     string          // host:port
	fixed    []ssh.PublicKey // from Config.HostKey; nil: db decides
	db       *knownhosts.HostKeyDB
	files    []string          // that were read or found missing, for messages
	warnings []error           // lines that were ignored
	names    map[string]string // of files db knows as copies

	// algorithms are what to ask the host for: first those of its known keys,
	// then all others, so that a host that now has a key of another type is
	// recognised as changed. See ssh_config(5), HostKeyAlgorithms.
	algorithms []string
}

// loadHostKeys finds what the host at addr may identify itself with.
func loadHostKeys(cfg Config, addr string) (*hostKeys, error) {
	k := &hostKeys{addr: addr}
	var known []string
	if len(cfg.HostKey) > 0 {
		var err error
		if k.fixed, err = parseHostKeys(cfg.HostKey); err != nil {
			return nil, err
		}
		for _, key := range k.fixed {
			known = append(known, algorithmsOf(key.Type())...)
		}
	} else {
		if err := k.readKnownHosts(cfg.KnownHostsFiles); err != nil {
			return nil, err
		}
		known = k.db.HostKeyAlgorithms(addr)
		if other, ok := withoutPort(addr); ok && len(known) == 0 {
			known = k.db.HostKeyAlgorithms(other)
		}
	}
	supported := ssh.SupportedAlgorithms().HostKeys
	for _, alg := range known {
		if slices.Contains(supported, alg) && !slices.Contains(k.algorithms, alg) {
			k.algorithms = append(k.algorithms, alg)
		}
	}
	for _, alg := range supported {
		// A certificate of an authority not known here would be refused,
		// where the key itself may be known.
		if !strings.Contains(alg, "-cert-") && !slices.Contains(k.algorithms, alg) {
			k.algorithms = append(k.algorithms, alg)
		}
	}
	return k, nil
}

func algorithmsOf(keyType string) []string {
	if keyType == ssh.KeyAlgoRSA {
		return []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256}
	}
	return []string{keyType}
}

// parseHostKeys reads lines of the form "ssh-ed25519 AAAA... comment". What
// precedes a key in other files, such as host names, options or the markers
// @revoked and @cert-authority, is an error.
func parseHostKeys(text []byte) ([]ssh.PublicKey, error) {
	var keys []ssh.PublicKey
	for line := range bytes.Lines(text) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		fields := bytes.Fields(line)
		if len(fields) < 2 {
			return nil, fmt.Errorf("given host key %q: expected a type and a key in base64", line)
		}
		blob, err := base64.StdEncoding.DecodeString(string(fields[1]))
		if err != nil {
			return nil, fmt.Errorf("given host key %q: %w", line, err)
		}
		key, err := ssh.ParsePublicKey(blob)
		if err != nil {
			return nil, fmt.Errorf("given host key %q: %w", line, err)
		}
		if key.Type() != string(fields[0]) {
			return nil, fmt.Errorf("given host key %q: it is of type %q", line, key.Type())
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("given host key %q: no key in it", text)
	}
	return keys, nil
}

func (k *hostKeys) readKnownHosts(files []string) error {
	if len(files) == 0 {
		files = []string{"/etc/ssh/ssh_known_hosts"}
		if _, home, err := currentUser(); err == nil {
			files = slices.Insert(files, 0, filepath.Join(home, ".ssh", "known_hosts"))
		}
	}
	k.files = files
	var present []string
	for _, name := range files {
		if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		present = append(present, name)
	}
	var err error
	if k.db, err = knownhosts.NewDB(present...); err == nil {
		return nil
	}
	return k.readDamaged(present)
}

// readDamaged reads known_hosts files with lines the library cannot read, for
// which it gives up the whole file: keys of types it does not know, for example.
// Like OpenSSH, it ignores them. It does so by giving the library copies in which
// they are empty, so that the numbers of the other lines stay.
func (k *hostKeys) readDamaged(files []string) error {
	dir, err := os.MkdirTemp("", "known_hosts-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	k.names = make(map[string]string)
	var copies []string
	for i, name := range files {
		clean := filepath.Join(dir, strconv.Itoa(i))
		if err := k.copyReadable(name, clean); err != nil {
			return err
		}
		copies = append(copies, clean)
		k.names[clean] = name
	}
	k.db, err = knownhosts.NewDB(copies...)
	return err
}

// copyReadable copies a known_hosts file without the lines the library refuses.
func (k *hostKeys) copyReadable(name, clean string) error {
	text, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	lines := bytes.Split(text, []byte("\n"))
	drop := func(n int, problem string) {
		lines[n] = nil
		k.warnings = append(k.warnings, fmt.Errorf("%s:%d: %s", name, n+1, problem))
	}
	for n, line := range lines {
		if problem := damage(line); problem != nil {
			drop(n, problem.Error())
		}
	}
	// What damage overlooks, such as odd host patterns, the library tells one
	// line at a time.
	for range maxOddLines {
		if err := os.WriteFile(clean, bytes.Join(lines, []byte("\n")), 0o600); err != nil {
			return err
		}
		_, err := xknownhosts.New(clean)
		if err == nil {
			return nil
		}
		n, problem := damagedLine(err, clean)
		if n < 1 || n > len(lines) || len(lines[n-1]) == 0 {
			return fmt.Errorf("%s: %w", name, err)
		}
		drop(n-1, problem)
	}
	return fmt.Errorf("%s: more than %d lines cannot be understood", name, maxOddLines)
}

const (
	// maxKnownHostsLine is less than what the library's line reader can take.
	maxKnownHostsLine = 60 << 10
	// maxOddLines bounds how often a file is read.
	maxOddLines = 100
)

// damage returns why a line of a known_hosts file cannot be understood, or nil.
func damage(line []byte) error {
	line = bytes.TrimSpace(line)
	if len(line) == 0 || line[0] == '#' {
		return nil
	}
	if len(line) > maxKnownHostsLine {
		return errors.New("line too long")
	}
	marker, _, _, _, _, err := ssh.ParseKnownHosts(line)
	if err == nil && marker != "" && marker != "cert-authority" && marker != "revoked" {
		err = fmt.Errorf("unknown marker %q", "@"+marker)
	}
	return err
}

// damagedLine finds the line's number in an error of the library, which is
// "knownhosts: FILE:LINE: PROBLEM".
func damagedLine(err error, file string) (int, string) {
	rest, ok := strings.CutPrefix(err.Error(), "knownhosts: "+file+":")
	if !ok {
		return 0, ""
	}
	number, problem, ok := strings.Cut(rest, ": ")
	if !ok {
		return 0, ""
	}
	n, err := strconv.Atoi(number)
	if err != nil {
		return 0, ""
	}
	return n, problem
}

// withoutPort returns the address OpenSSH also looks up when a host on another
// port than 22 is not known: the host alone.
func withoutPort(addr string) (string, bool) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || port == "22" {
		return "", false
	}
	return net.JoinHostPort(host, "22"), true
}

// check returns nil if key is one the host may have.
func (k *hostKeys) check(remote net.Addr, key ssh.PublicKey) error {
	print := key.Type() + " " + ssh.FingerprintSHA256(key)
	if k.fixed != nil {
		for _, want := range k.fixed {
			if bytes.Equal(want.Marshal(), key.Marshal()) {
				return nil
			}
		}
		return fmt.Errorf("the host has the key %s, which is not the one given for it (%s %s)",
			print, k.fixed[0].Type(), ssh.FingerprintSHA256(k.fixed[0]))
	}
	if _, ok := remote.(*net.TCPAddr); !ok {
		// A transport that is no TCP connection: the library insists on an
		// address, though it looks up the name only.
		remote = &net.TCPAddr{IP: net.IPv4zero, Port: 22}
	}
	check := k.db.HostKeyCallback()
	err := check(k.addr, remote, key)
	if knownhosts.IsHostUnknown(err) {
		if other, ok := withoutPort(k.addr); ok && check(other, remote, key) == nil {
			return nil
		}
	}
	return k.explain(err, print)
}

// explain says what a check found out, in words that help to put it right.
func (k *hostKeys) explain(err error, print string) error {
	if revoked, ok := errors.AsType[*xknownhosts.RevokedError](err); ok {
		return fmt.Errorf("the host's key %s is marked @revoked at %s: %w", print, k.place(revoked.Revoked), err)
	}
	keyErr, ok := errors.AsType[*xknownhosts.KeyError](err)
	switch {
	case err == nil:
		return nil
	case !ok:
		return fmt.Errorf("the host's key %s is refused: %w", print, err)
	case len(keyErr.Want) == 0:
		return fmt.Errorf("the host's key %s is not known: %q is not in %s",
			print, xknownhosts.Normalize(k.addr), strings.Join(k.files, ", "))
	}
	var places []string
	for _, want := range keyErr.Want {
		places = append(places, k.place(want))
	}
	return fmt.Errorf("the host's key has changed: it is now %s; expected the key at %s: %w",
		print, strings.Join(places, ", "), err)
}

func (k *hostKeys) place(known xknownhosts.KnownKey) string {
	name := known.Filename
	if original, ok := k.names[name]; ok {
		name = original
	}
	return fmt.Sprintf("%s:%d", name, known.Line)
}
