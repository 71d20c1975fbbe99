package sshpool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"

	"nixdispatch/sshpool/plainfile"
)

// hostKeys are the keys a host may have, and what is done about others.
type hostKeys struct {
	target     *Target
	name, bare string          // in known_hosts; see Target.knownName
	fixed      []ssh.PublicKey // from Config.HostKey; nil: the files decide
	known      []knownKey      // about name
	knownBare  []knownKey      // about bare
	files      []string        // that were read or found missing, for messages
	warnings   []error         // lines that were ignored
	revoked    []knownKey      // of RevokedHostKeys
	revokedBy  []namedRevocations
	accepted   string // why the key was, for messages
	log        *slog.Logger

	// algorithms are what to ask the host for: first those of its known keys,
	// then all others, so that a host that now has a key of another type is
	// recognised as changed. See order_hostkeyalgs in OpenSSH's sshconnect2.c.
	algorithms []string
}

// namedRevocations are a list of RevokedHostKeys and its file.
type namedRevocations struct {
	file string
	list *revocationList
}

// loadHostKeys finds what the host may identify itself with.
func loadHostKeys(ctx context.Context, t *Target, log *slog.Logger) (*hostKeys, error) {
	k := &hostKeys{target: t, log: log}
	k.name, k.bare = t.knownName()
	var err error
	if len(t.given) > 0 {
		if k.fixed, err = parseHostKeys(t.given); err == nil {
			k.readRevocations()
		}
	} else {
		err = k.readFiles()
	}
	if err == nil {
		err = k.askCommand(ctx, nil)
	}
	if err != nil {
		return nil, err
	}
	for _, file := range t.RevokedHostKeys {
		if err := k.readRevoked(file); err != nil {
			return nil, err
		}
	}
	k.chooseAlgorithms()
	return k, nil
}

func (k *hostKeys) readFiles() error {
	k.files = slices.Concat(k.target.UserKnownHosts, k.target.OtherKnownHosts)
	r := &knownHostsReader{names: []string{k.name}}
	if k.bare != "" {
		r.names = append(r.names, k.bare)
	}
	r.found = make([][]knownKey, len(r.names))
	var failed error
	for _, name := range k.files {
		if err := r.readFile(name); err != nil && failed == nil {
			failed = err
		}
	}
	k.known, k.warnings = r.found[0], r.odd
	if k.bare != "" {
		k.knownBare = r.found[1]
	}
	return failed
}

// readRevocations reads the files for what they revoke only: which key the host has
// is known without them, so a file that cannot be read is no reason not to connect.
func (k *hostKeys) readRevocations() {
	if err := k.readFiles(); err != nil {
		k.warnings = append(k.warnings, err)
	}
	known := func(e knownKey) bool { return e.marker != markRevoked }
	k.known, k.knownBare = slices.DeleteFunc(k.known, known), slices.DeleteFunc(k.knownBare, known)
}

// maxRevoked bounds a file of RevokedHostKeys.
const maxRevoked = 16 << 20

// readRevoked reads a file of RevokedHostKeys: public keys, one a line, or a key
// revocation list. As in ssh, a file that cannot be read makes all keys refused.
func (k *hostKeys) readRevoked(name string) error {
	text, err := plainfile.Read(name, maxRevoked)
	if err != nil {
		return fmt.Errorf("RevokedHostKeys: %w", err)
	}
	if isRevocationList(text) {
		list, err := parseRevocationList(text)
		if err != nil {
			return fmt.Errorf("RevokedHostKeys %s: %w", name, err)
		}
		k.revokedBy = append(k.revokedBy, namedRevocations{name, list})
		return nil
	}
	n := 0
	for line := range bytes.Lines(text) {
		n++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		key, err := parseKeyFields(line)
		if err != nil {
			return fmt.Errorf("RevokedHostKeys %s:%d: %w", name, n, err)
		}
		k.revoked = append(k.revoked, knownKey{file: name, line: n, marker: markRevoked, key: key})
	}
	return nil
}

func (k *hostKeys) chooseAlgorithms() {
	allowed := k.target.HostKeyAlgorithms
	if allowed == nil {
		allowed = hostKeyOrder
	}
	var first []string
	authority := false // its own key says nothing about the type of certificates
	for _, e := range slices.Concat(k.known, k.knownBare) {
		switch e.marker {
		case markCA:
			authority = true
		case markNone:
			first = append(first, algorithmsOf(e.key.Type())...)
		}
	}
	for _, key := range k.fixed {
		first = append(first, algorithmsOf(key.Type())...)
	}
	var rest []string
	for _, alg := range allowed {
		switch {
		case strings.Contains(alg, "-cert-"):
			// A certificate of an authority not known here says no more than
			// the key in it.
			if authority {
				k.algorithms = append(k.algorithms, alg)
			}
		case !slices.Contains(first, alg):
			rest = append(rest, alg)
		}
	}
	for _, alg := range first {
		if slices.Contains(allowed, alg) && !slices.Contains(k.algorithms, alg) {
			k.algorithms = append(k.algorithms, alg)
		}
	}
	k.algorithms = append(k.algorithms, rest...)
}

// hostKeyOrder is OpenSSH's order of preference, as far as the library goes.
var hostKeyOrder = []string{
	ssh.CertAlgoED25519v01, ssh.CertAlgoECDSA256v01, ssh.CertAlgoECDSA384v01, ssh.CertAlgoECDSA521v01,
	ssh.CertAlgoRSASHA512v01, ssh.CertAlgoRSASHA256v01,
	ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256,
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
		key, err := parseKeyFields(line)
		if err != nil {
			return nil, fmt.Errorf("given host key %q: %w", line, err)
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("given host key %q: no key in it", text)
	}
	return keys, nil
}

// A keyVerdict is what the files say about a key.
type keyVerdict struct {
	cause Cause // "" if it is known
	at    []knownKey
	err   error
	fix   string
}

// A hostKeyError is why a key is refused.
type hostKeyError struct{ keyVerdict }

func (e *hostKeyError) Error() string { return e.err.Error() }
func (e *hostKeyError) Unwrap() error { return e.err }

// check returns nil if key is one the host may have, and remembers a new one if
// that is wanted. The error is a [*hostKeyError]. See check_host_key in OpenSSH's
// sshconnect.c.
func (k *hostKeys) check(remote net.Addr, key ssh.PublicKey) error {
	t := k.target
	// First, for nothing below may waive it. OpenSSH looks at @revoked later than at
	// RevokedHostKeys, after NoHostAuthenticationForLocalhost, and so accepts there what
	// is refused here.
	if e := k.findRevoked(key); e != nil {
		return &hostKeyError{keyVerdict{cause: CauseHostKeyRevoked, at: []knownKey{*e},
			err: fmt.Errorf("the host's key %s is revoked at %s", describe(key), e.place()),
			fix: "give the machine a new host key, and find out why this one was revoked"}}
	}
	if t.TrustLocalhost && t.HostKeyAlias == "" && isLoopback(remote) {
		k.accepted = "not looked at: NoHostAuthenticationForLocalhost"
		return nil
	}
	if size := rsaBits(key); size > 0 && size < t.RequiredRSASize {
		return &hostKeyError{keyVerdict{cause: CauseNoSSH, fix: "lower RequiredRSASize, or give the machine another key",
			err: fmt.Errorf("the host's RSA key has %d bits, RequiredRSASize is %d", size, t.RequiredRSASize)}}
	}
	if k.fixed != nil {
		return k.checkFixed(key)
	}
	var certErr error
	if cert, ok := key.(*ssh.Certificate); ok {
		if certErr = k.checkCertificate(cert); certErr == nil {
			return nil
		}
		// As in OpenSSH, the key in it is judged without the certificate then.
		key = cert.Key
	}
	v := k.lookUp(k.known, key)
	if v.cause == CauseHostKeyUnknown && k.bare != "" {
		if bare := k.lookUp(k.knownBare, key); bare.cause == "" {
			v = bare
		}
	}
	if v.cause == "" {
		k.accepted = "known from " + v.at[0].place()
		return nil
	}
	if k.tolerate(v, key) {
		k.accepted = fmt.Sprintf("%s, and taken all the same: StrictHostKeyChecking is %s", v.cause, t.Strict)
		return nil
	}
	if certErr != nil {
		v.err = fmt.Errorf("%w; its certificate is no help: %w", v.err, certErr)
	}
	return &hostKeyError{v}
}

func (k *hostKeys) checkFixed(key ssh.PublicKey) error {
	for _, want := range k.fixed {
		if bytes.Equal(want.Marshal(), key.Marshal()) {
			k.accepted = "the one given for it"
			return nil
		}
	}
	return &hostKeyError{keyVerdict{cause: CauseHostKeyChanged,
		err: fmt.Errorf("the host has the key %s, which is not the one given for it (%s)", describe(key), describe(k.fixed[0])),
		fix: "if the machine is meant to have this key, correct the one given"}}
}

// findRevoked finds the line that revokes a key, or the authority of a certificate.
func (k *hostKeys) findRevoked(key ssh.PublicKey) *knownKey {
	keys := [][]byte{key.Marshal()}
	if cert, ok := key.(*ssh.Certificate); ok {
		keys = append(keys, cert.Key.Marshal(), cert.SignatureKey.Marshal())
	}
	for _, e := range slices.Concat(k.known, k.knownBare, k.revoked) {
		blob := e.key.Marshal()
		if e.marker == markRevoked && slices.ContainsFunc(keys, func(b []byte) bool { return bytes.Equal(b, blob) }) {
			return &e
		}
	}
	for _, r := range k.revokedBy {
		if r.list.revokes(key) {
			return &knownKey{file: r.file, marker: markRevoked}
		}
	}
	return nil
}

// checkCertificate returns nil if a known authority says that this is the host.
func (k *hostKeys) checkCertificate(cert *ssh.Certificate) error {
	name := k.target.HostKeyAlias
	if name == "" {
		name = strings.ToLower(k.target.Host)
	}
	blob := cert.SignatureKey.Marshal()
	entries := slices.Concat(k.known, k.knownBare)
	authority := slices.IndexFunc(entries, func(e knownKey) bool {
		return e.marker == markCA && bytes.Equal(e.key.Marshal(), blob)
	})
	if authority < 0 {
		return fmt.Errorf("its authority %s is not known for this host", describe(cert.SignatureKey))
	}
	if cert.CertType != ssh.HostCert {
		return errors.New("it is no host certificate")
	}
	if allowed := k.target.CASignatures; allowed != nil && !slices.Contains(allowed, cert.Signature.Format) {
		return fmt.Errorf("it is signed with %q, which CASignatureAlgorithms does not allow", cert.Signature.Format)
	}
	i := slices.IndexFunc(cert.ValidPrincipals, func(p string) bool { return matchPattern(p, name) })
	if i < 0 {
		return fmt.Errorf("it is not for %q but for %q", name, cert.ValidPrincipals)
	}
	k.accepted = "its authority known from " + entries[authority].place()
	return new(ssh.CertChecker).CheckCert(cert.ValidPrincipals[i], cert)
}

// lookUp tells what entries about the host say about a plain key.
func (k *hostKeys) lookUp(entries []knownKey, key ssh.PublicKey) keyVerdict {
	var others []knownKey
	for _, e := range entries {
		if e.marker != markNone {
			continue
		}
		if bytes.Equal(e.key.Marshal(), key.Marshal()) {
			return keyVerdict{at: []knownKey{e}}
		}
		others = append(others, e)
	}
	if len(others) == 0 {
		return keyVerdict{cause: CauseHostKeyUnknown, fix: k.fixUnknown(),
			err: fmt.Errorf("the host's key %s is not known: %q is not in %s",
				describe(key), k.name, strings.Join(k.files, ", "))}
	}
	var places []string
	for _, e := range others {
		places = append(places, e.place())
	}
	return keyVerdict{cause: CauseHostKeyChanged, at: others,
		err: fmt.Errorf("the host's key has changed: it is now %s; expected the key at %s",
			describe(key), strings.Join(places, ", ")),
		fix: fmt.Sprintf("somebody may be in between; if not, forget the old key: ssh-keygen -R %q -f %s", k.name, others[0].file)}
}

func (k *hostKeys) fixUnknown() string {
	file := "a file named with UserKnownHostsFile"
	if len(k.target.UserKnownHosts) > 0 && k.target.UserKnownHosts[0] != os.DevNull {
		file = k.target.UserKnownHosts[0]
	}
	return fmt.Sprintf("compare the fingerprint with the machine's, then add the key to %s", file)
}

// tolerate tells whether StrictHostKeyChecking lets a key pass that is not known.
func (k *hostKeys) tolerate(v keyVerdict, key ssh.PublicKey) bool {
	t := k.target
	log := k.log.With("host", k.name, "key", describe(key), "StrictHostKeyChecking", t.Strict.String())
	switch {
	case v.cause == CauseHostKeyUnknown && t.Strict >= StrictNew:
		k.remember(log, key)
		return true
	case v.cause == CauseHostKeyChanged && t.Strict == StrictOff:
		log.Warn("host key has changed, and is taken all the same", "known_at", v.at[0].place())
		return true
	default:
		return false
	}
}

// remember writes a new key into the user's known_hosts file.
func (k *hostKeys) remember(log *slog.Logger, key ssh.PublicKey) {
	files := k.target.UserKnownHosts
	switch {
	case len(files) == 0:
		log.Warn("unknown host key is taken, and not remembered: there is no UserKnownHostsFile")
	case strings.ContainsAny(k.bareName(), "@?*#[]|'\"\\ ,"):
		log.Warn("unknown host key is taken, and not remembered: the name is not fit for a file")
	default:
		if err := addKnownHost(files[0], k.name, key, k.target.HashKnownHosts); err != nil {
			log.Warn("unknown host key is taken, but cannot be remembered", "err", err)
			return
		}
		log.Warn("unknown host key is taken and remembered", "file", files[0])
	}
}

// bareName is the name without what was added to it for known_hosts.
func (k *hostKeys) bareName() string {
	if k.bare != "" {
		return k.bare
	}
	return k.name
}

func isLoopback(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}

// describe is a key's type and fingerprint.
func describe(key ssh.PublicKey) string {
	if cert, ok := key.(*ssh.Certificate); ok {
		return fmt.Sprintf("%s %s, signed by %s", cert.Type(), ssh.FingerprintSHA256(cert.Key), ssh.FingerprintSHA256(cert.SignatureKey))
	}
	return key.Type() + " " + ssh.FingerprintSHA256(key)
}
