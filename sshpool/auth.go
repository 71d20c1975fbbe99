package sshpool

import (
	"bytes"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// identities are the keys to authenticate with, in the order to offer them.
type identities struct {
	signers []ssh.Signer
	offered []string // what each signer is, for messages
	unused  []string // what could not be used, and why
	missing []string // default files that do not exist
	agent   net.Conn // nil if there is none
	untried []string // Target.Untried
	used    string   // of offered, what was last signed with
	broken  badKeys  // those that could not sign
}

// loadIdentities reads a target's identities from files and agent. What cannot be
// read is left out and told if it should be missed. The caller must close the
// result after authentication; the agent gets no longer than until deadline.
//
// The order is OpenSSH's (pubkey_prepare in sshconnect2.c): certificates named by
// CertificateFile, keys of the agent that are among the files, what else the agent
// has unless IdentitiesOnly is set, then the files, each with the certificate
// beside it. The agent stands in for a file it holds the key of, which is how a
// key with a passphrase or on a token is used.
func loadIdentities(t *Target, deadline time.Time) *identities {
	ids := &identities{untried: t.Untried}
	if t.NoPublicKeys != "" {
		ids.unused = append(ids.unused, t.NoPublicKeys+" is set, and nothing but public keys is offered here")
		return ids
	}
	keys := ids.askAgent(t.AgentSocket, deadline)
	ids.unused = append(ids.unused, t.lost...)
	var files []*identityFile
	for _, name := range t.IdentityFiles {
		f := readIdentity(name, len(t.Certificates) == 0)
		f.useAgent(keys)
		files = append(files, f)
	}
	for _, name := range t.Certificates {
		ids.addCertificate(name, files, keys)
	}
	for _, k := range keys {
		for _, f := range files {
			if f.is(k.signer.PublicKey()) {
				ids.add(k.signer, f.name+" from the agent")
			}
		}
	}
	if !t.IdentitiesOnly {
		for _, k := range keys {
			ids.add(k.signer, k.name)
		}
	}
	for _, f := range files {
		ids.addFile(f, t.DefaultFiles)
	}
	ids.restrict(t)
	return ids
}

func (ids *identities) close() {
	if ids.agent != nil {
		ids.agent.Close()
	}
}

// An agentKey is a key held by the agent.
type agentKey struct {
	signer ssh.Signer
	name   string
}

func (ids *identities) askAgent(socket string, deadline time.Time) []agentKey {
	if socket == "" {
		return nil
	}
	var err error
	if ids.agent, err = net.DialTimeout("unix", socket, time.Until(deadline)); err != nil {
		ids.unused = append(ids.unused, fmt.Sprintf("agent: %v", err))
		return nil
	}
	ids.agent.SetDeadline(deadline)
	client := agent.NewClient(ids.agent)
	signers, err := client.Signers()
	if err != nil {
		ids.unused = append(ids.unused, fmt.Sprintf("agent %s: %v", socket, err))
		return nil
	}
	keys := make([]agentKey, len(signers))
	for i, s := range signers {
		name := "agent key"
		if k, ok := s.PublicKey().(*agent.Key); ok && k.Comment != "" {
			name = fmt.Sprintf("agent key %q", k.Comment)
		}
		keys[i] = agentKey{s, name}
	}
	return keys
}

// add adds a signer unless its key is there already.
func (ids *identities) add(s ssh.Signer, name string) {
	for _, other := range ids.signers {
		if sameKey(other.PublicKey(), s.PublicKey()) {
			return
		}
	}
	ids.signers = append(ids.signers, s)
	ids.offered = append(ids.offered, fmt.Sprintf("%s (%s)", name, ssh.FingerprintSHA256(s.PublicKey())))
}

func (ids *identities) addFile(f *identityFile, isDefault bool) {
	if f.signer != nil && !f.fromAgent {
		ids.add(f.signer, f.name)
	}
	if f.signer == nil {
		switch {
		case f.missing && isDefault:
			ids.missing = append(ids.missing, f.name)
		default:
			ids.unused = append(ids.unused, fmt.Sprintf("%s: %v", f.name, f.problem()))
		}
		return
	}
	if f.cert == nil {
		return
	}
	s, err := ssh.NewCertSigner(f.cert, f.signer)
	if err != nil {
		ids.unused = append(ids.unused, fmt.Sprintf("%s: %v", f.certName, err))
		return
	}
	ids.add(s, f.certName)
}

// addCertificate adds a certificate of CertificateFile, whose private key is in a
// file or the agent.
func (ids *identities) addCertificate(name string, files []*identityFile, keys []agentKey) {
	cert, err := readCertificate(name)
	if err != nil {
		ids.unused = append(ids.unused, fmt.Sprintf("certificate %s: %v", name, err))
		return
	}
	var candidates []ssh.Signer
	for _, k := range keys {
		candidates = append(candidates, k.signer)
	}
	for _, f := range files {
		if f.signer != nil {
			candidates = append(candidates, f.signer)
		}
	}
	for _, s := range candidates {
		if !sameKey(s.PublicKey(), cert.Key) {
			continue
		}
		if s, err = ssh.NewCertSigner(cert, s); err == nil {
			ids.add(s, name)
			return
		}
	}
	ids.unused = append(ids.unused, fmt.Sprintf("certificate %s: its key is neither in a file nor in an agent", name))
}

// restrict applies PubkeyAcceptedAlgorithms and RequiredRSASize.
func (ids *identities) restrict(t *Target) {
	var signers []ssh.Signer
	var offered []string
	for i, s := range ids.signers {
		s, err := restrictSigner(s, t)
		if err != nil {
			ids.unused = append(ids.unused, fmt.Sprintf("%s: %v", ids.offered[i], err))
			continue
		}
		signers, offered = append(signers, s), append(offered, ids.offered[i])
	}
	ids.signers, ids.offered = signers, offered
}

func restrictSigner(s ssh.Signer, t *Target) (ssh.Signer, error) {
	key := s.PublicKey()
	if bits := rsaBits(key); bits > 0 && bits < t.RequiredRSASize {
		return nil, fmt.Errorf("has %d bits, RequiredRSASize is %d", bits, t.RequiredRSASize)
	}
	if t.PublicKeyAccepted == nil {
		return s, nil
	}
	format := key.Type()
	cert := strings.Contains(format, "-cert-")
	if format != ssh.KeyAlgoRSA && format != ssh.CertAlgoRSAv01 {
		if !slices.Contains(t.PublicKeyAccepted, format) {
			return nil, fmt.Errorf("%s is not among PubkeyAcceptedAlgorithms", format)
		}
		return s, nil
	}
	var algorithms []string
	for _, a := range []string{ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256, ssh.KeyAlgoRSA} {
		name := a
		if cert {
			name += "-cert-v01@openssh.com"
		}
		if slices.Contains(t.PublicKeyAccepted, name) {
			algorithms = append(algorithms, a)
		}
	}
	as, ok := s.(ssh.AlgorithmSigner)
	if len(algorithms) == 0 || !ok {
		return nil, fmt.Errorf("no algorithm for RSA keys is among PubkeyAcceptedAlgorithms")
	}
	return ssh.NewSignerWithAlgorithms(as, algorithms)
}

// rsaBits is the length of an RSA key, 0 for other keys.
func rsaBits(key ssh.PublicKey) int {
	if cert, ok := key.(*ssh.Certificate); ok {
		key = cert.Key
	}
	if key.Type() != ssh.KeyAlgoRSA {
		return 0
	}
	var k struct {
		Type string
		E, N []byte
	}
	if ssh.Unmarshal(key.Marshal(), &k) != nil {
		return 0
	}
	n := bytes.TrimLeft(k.N, "\x00")
	if len(n) == 0 {
		return 0
	}
	bits := 8 * len(n)
	for top := n[0]; top < 0x80; top <<= 1 {
		bits--
	}
	return bits
}

func sameKey(a, b ssh.PublicKey) bool { return bytes.Equal(a.Marshal(), b.Marshal()) }

// explain makes of a failure to authenticate what was tried, and what to do.
func (ids *identities) explain(user string, err error) (_ Cause, fix string, _ error) {
	var b strings.Builder
	fmt.Fprintf(&b, "as user %q: ", user)
	cause := CauseKeyRefused
	fix = fmt.Sprintf("add one of these public keys to %s's authorized_keys there, or name another with IdentityFile", user)
	if len(ids.offered) > 0 {
		fmt.Fprintf(&b, "offered %s; ", strings.Join(ids.offered, ", "))
	} else {
		b.WriteString("no identity to offer; ")
		cause, fix = CauseNoKey, "name a private key without a passphrase with IdentityFile, or load one into an agent"
	}
	if len(ids.unused) > 0 {
		fmt.Fprintf(&b, "not usable: %s; ", strings.Join(ids.unused, ", "))
	}
	if len(ids.offered) == 0 && len(ids.missing) > 0 {
		fmt.Fprintf(&b, "not there: %s; ", strings.Join(ids.missing, ", "))
	}
	if len(ids.untried) > 0 {
		fmt.Fprintf(&b, "%s is set, and not tried here; ", strings.Join(ids.untried, ", "))
	}
	if len(ids.offered) > 1 && strings.Contains(err.Error(), "Too many authentication failures") {
		fix = "the machine takes no more tries: name the right key with IdentityFile and set IdentitiesOnly"
	}
	return cause, fix, fmt.Errorf("%s%w", b.String(), err)
}
