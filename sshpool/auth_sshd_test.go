package sshpool

import (
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"nixdispatch/sshpool/sshtest"
)

// sign makes name-cert.pub for the public key name.pub with ssh-keygen.
func sign(t *testing.T, authority, name string, args ...string) string {
	t.Helper()
	args = append([]string{"-q", "-s", authority, "-I", "test"}, append(args, name+".pub")...)
	if out, err := exec.Command("ssh-keygen", args...).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen %v: %v\n%s", args, err, out)
	}
	return name + "-cert.pub"
}

// rawKey reads a private key that may have the passphrase "secret".
func rawKey(t *testing.T, name string) any {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParseRawPrivateKey(text)
	if err != nil {
		key, err = ssh.ParseRawPrivateKeyWithPassphrase(text, []byte("secret"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func mustCertificate(t *testing.T, name string) *ssh.Certificate {
	t.Helper()
	cert, err := readCertificate(name)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// Only a certificate, or a key that is in an agent alone, lets in here.
func TestCertificatesAndAgentsWithSSHD(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	authority := file("authority")
	sshtest.Keygen(t, authority, "-t", "ed25519")
	d := sshtest.StartSSHD(t, "TrustedUserCAKeys "+authority+".pub")
	signed := func(name, keyType string, more ...string) string {
		sshtest.Keygen(t, file(name), append(more, "-t", keyType)...)
		return sign(t, authority, file(name), "-n", d.User)
	}
	for _, keyType := range []string{"ed25519", "ecdsa", "rsa"} {
		signed(keyType, keyType)
	}
	locked := signed("locked", "ed25519", "-N", "secret", "-a", "1")
	elsewhere := file("elsewhere-cert.pub")
	if err := os.Rename(signed("apart", "ed25519"), elsewhere); err != nil {
		t.Fatal(err)
	}
	lockedAgent := startAgent(t, agent.AddedKey{PrivateKey: rawKey(t, file("locked")), Comment: "locked"})
	certAgent := startAgent(t, agent.AddedKey{PrivateKey: rawKey(t, file("rsa")), Certificate: mustCertificate(t, file("rsa-cert.pub"))})
	sshtest.Keygen(t, file("plain"), "-t", "rsa")
	plain, err := os.ReadFile(file("plain.pub"))
	if err != nil {
		t.Fatal(err)
	}
	d.Authorize(t, string(plain))
	strangers := startAgent(t, newAgentKey(t, "1"), newAgentKey(t, "2"), newAgentKey(t, "3"), newAgentKey(t, "4"),
		newAgentKey(t, "5"), newAgentKey(t, "6"), newAgentKey(t, "7"))
	plainAgent := startAgent(t, newAgentKey(t, "x"), agent.AddedKey{PrivateKey: rawKey(t, file("plain")), Comment: "plain"})
	if err := os.Remove(file("plain")); err != nil {
		t.Fatal(err)
	}

	for _, tt := range []struct {
		name    string
		options []string
		cause   Cause
		words   []string
	}{
		{"ed25519 with the certificate beside it", []string{"IdentityFile " + file("ed25519")}, "", nil},
		{"ecdsa with the certificate beside it", []string{"IdentityFile " + file("ecdsa")}, "", nil},
		{"rsa with the certificate beside it", []string{"IdentityFile " + file("rsa")}, "", nil},
		{"CertificateFile", []string{"IdentityFile " + file("apart"), "CertificateFile " + elsewhere}, "", nil},
		{"CertificateFile with a token", []string{"IdentityFile " + file("apart"), "CertificateFile " + dir + "/%n-cert.pub"}, "", nil},
		{"certificate elsewhere and not named", []string{"IdentityFile " + file("apart")}, CauseKeyRefused, []string{"offered " + file("apart")}},
		{"certificate of another key", []string{"IdentityFile " + file("apart"), "CertificateFile " + locked}, CauseKeyRefused,
			[]string{"certificate " + locked + ": its key is neither in a file nor in an agent"}},
		{"certificate's key in the agent", []string{"IdentityFile " + file("apart"), "CertificateFile " + locked, "IdentityAgent " + lockedAgent}, "", nil},
		{"key with passphrase in the agent, certificate beside it", []string{"IdentityFile " + file("locked"), "IdentitiesOnly yes", "IdentityAgent " + lockedAgent}, "", nil},
		{"key with passphrase in no agent", []string{"IdentityFile " + file("locked")}, CauseNoKey,
			[]string{"no identity to offer", "has a passphrase: load it into an agent (ssh-add " + file("locked") + ")"}},
		{"certificate in the agent", []string{"IdentityFile none", "IdentityAgent " + certAgent}, "", nil},
		{"key in the agent alone", []string{"IdentityFile none", "IdentityAgent " + plainAgent}, "", nil},
		{"public key's file", []string{"IdentityFile " + file("plain.pub"), "IdentitiesOnly yes", "IdentityAgent " + plainAgent}, "", nil},
		{"only the files' keys of the agent", []string{"IdentityFile " + file("apart"), "IdentitiesOnly yes", "IdentityAgent " + plainAgent}, CauseKeyRefused, nil},
		{"too many keys in the agent", []string{"IdentityFile " + file("ed25519"), "IdentityAgent " + strangers}, CauseKeyRefused, []string{"set IdentitiesOnly"}},
		{"which IdentitiesOnly helps against", []string{"IdentityFile " + file("ed25519"), "IdentitiesOnly yes", "IdentityAgent " + strangers}, "", nil},
		{"type of key not accepted", []string{"IdentityFile " + file("rsa"), "PubkeyAcceptedAlgorithms ssh-ed25519"}, CauseNoKey, []string{"is among PubkeyAcceptedAlgorithms"}},
		{"one algorithm of rsa", []string{"IdentityFile none", "IdentityAgent " + plainAgent, "PubkeyAcceptedAlgorithms rsa-sha2-256"}, "", nil},
		{"rsa key too short", []string{"IdentityFile " + file("rsa"), "RequiredRSASize 4096"}, CauseNoKey, []string{"bits, RequiredRSASize is 4096"}},
		{"no public keys", []string{"PubkeyAuthentication no"}, CauseNoKey, []string{"PubkeyAuthentication"}},
		{"no agent at the socket", []string{"IdentityFile none", "IdentityAgent /no/such/agent"}, CauseNoKey, []string{"agent: dial unix /no/such/agent"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// The key that hostBlock names would let in as well.
			block := strings.Replace(hostBlock(t, "elsewhere", d, tt.options...), "IdentityFile "+d.Identity, "", 1)
			cfg := configured(t, block)
			cfg.Host = "elsewhere"
			sshAgrees(t, cfg, tt.cause == "")
			if tt.cause == "" {
				mustRun(t, Options{}, cfg)
				return
			}
			mustFail(t, cfg, StepAuthenticate, tt.cause, tt.words...)
		})
	}
}

// A refusingAgent has keys and does not sign with the first.
type refusingAgent struct{ agent.ExtendedAgent }

func (a refusingAgent) SignWithFlags(key ssh.PublicKey, data []byte, flags agent.SignatureFlags) (*ssh.Signature, error) {
	if keys, err := a.List(); err != nil || sameKey(keys[0], key) {
		return nil, errors.New("not today")
	}
	return a.ExtendedAgent.SignWithFlags(key, data, flags)
}

// An agent that refuses to use a key does not keep the others from being tried.
func TestAgentThatRefusesToSignWithSSHD(t *testing.T) {
	t.Parallel()
	d := sshtest.StartSSHD(t)
	refused, taken := newAgentKey(t, "refused"), newAgentKey(t, "taken")
	d.Authorize(t, authorizedLine(t, refused))
	ring := agent.NewKeyring().(agent.ExtendedAgent)
	if err := ring.Add(refused); err != nil {
		t.Fatal(err)
	}
	block := hostBlock(t, "mac", d, "IdentityFile none", "IdentityAgent "+serveAgent(t, refusingAgent{ring}))
	cfg := configured(t, strings.Replace(block, "IdentityFile "+d.Identity, "", 1))
	sshAgrees(t, cfg, false)
	mustFail(t, cfg, StepAuthenticate, CauseNoKey, `agent key "refused"`, "does not sign")
	if err := ring.Add(taken); err != nil {
		t.Fatal(err)
	}
	d.Authorize(t, authorizedLine(t, taken))
	sshAgrees(t, cfg, true)
	mustRun(t, Options{}, cfg)
}

// A host that has a certificate is known by its authority.
func TestHostCertificateWithSSHD(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	authority, key := filepath.Join(dir, "authority"), filepath.Join(dir, "host")
	public := sshtest.Keygen(t, authority, "-t", "ecdsa")
	certified := sshtest.Keygen(t, key, "-t", "rsa")
	cert := sign(t, authority, key, "-h", "-n", "big,*.example.org")
	d := sshtest.StartSSHD(t, "HostKey "+key, "HostCertificate "+cert)
	other := sshtest.Keygen(t, filepath.Join(dir, "other"), "-t", "ed25519")
	n := 0
	known := func(lines ...string) string {
		n++
		name := filepath.Join(dir, fmt.Sprintf("known_hosts%d", n))
		writeFile(t, name, strings.Join(lines, "\n")+"\n")
		return "UserKnownHostsFile " + name
	}
	for _, tt := range []struct {
		name    string
		options []string
		cause   Cause
		words   []string
	}{
		{"alias", []string{"HostKeyAlias big", known("@cert-authority big " + public)}, "", nil},
		{"pattern in the certificate", []string{"HostKeyAlias a.example.org", known("@cert-authority *.example.org " + public)}, "", nil},
		{"one of two authorities", []string{"HostKeyAlias big", known("@cert-authority * "+other, "@cert-authority * "+public)}, "", nil},
		{"not for this name", []string{"HostKeyAlias small", known("@cert-authority * " + public)}, CauseHostKeyUnknown, []string{`it is not for "small" but for ["big" "*.example.org"]`}},
		{"other authority", []string{"HostKeyAlias big", known("@cert-authority * " + other)}, CauseHostKeyUnknown, []string{"its authority ecdsa-sha2-nistp256 SHA256:", "is not known for this host"}},
		{"other authority, plain key known", []string{"HostKeyAlias big", known("@cert-authority * "+other, "big "+d.HostKeys()[0])}, CauseHostKeyChanged, nil},
		{"other authority, certified key known", []string{"HostKeyAlias big", known("@cert-authority * "+other, "big "+certified)}, "", nil},
		{"authority revoked", []string{"HostKeyAlias big", known("@cert-authority * "+public, "@revoked * "+public)}, CauseHostKeyRevoked, nil},
		{"signature not allowed", []string{"HostKeyAlias big", "CASignatureAlgorithms ssh-ed25519", known("@cert-authority * " + public)}, CauseHostKeyUnknown, []string{"CASignatureAlgorithms does not allow"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := configured(t, hostBlock(t, "mac", d, tt.options...))
			if tt.name != "pattern in the certificate" { // which only later versions of ssh allow
				sshAgrees(t, cfg, tt.cause == "")
			}
			if tt.cause == "" {
				mustRun(t, Options{}, cfg)
				return
			}
			mustFail(t, cfg, StepHostKey, tt.cause, tt.words...)
		})
	}
}

// A key on a token cannot be used without an agent: the file has no private half
// that the library can read.
func TestKeyOnToken(t *testing.T) {
	t.Parallel()
	const keyType = "sk-ssh-ed25519@openssh.com"
	public := ssh.Marshal(struct {
		Type string
		Key  []byte
		App  string
	}{keyType, make([]byte, 32), "ssh:"})
	private := ssh.Marshal(struct {
		Cipher, KDF, KDFOptions string
		Keys                    uint32
		Public, Private         []byte
	}{"none", "none", "", 1, public, ssh.Marshal(struct {
		Check1, Check2 uint32
		Type           string
		Key            []byte
		App            string
		Flags          byte
		Handle         []byte
	}{1, 1, keyType, make([]byte, 32), "ssh:", 1, make([]byte, 64)})})
	block := &pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: append([]byte("openssh-key-v1\x00"), private...)}
	name := filepath.Join(t.TempDir(), "id_ed25519_sk")
	writeFile(t, name, string(pem.EncodeToMemory(block)))
	offered, unused := offers(t, Config{IdentityFiles: []string{name}, AgentSocket: "none"})
	if want := name + ": is on a hardware token: load it into an agent (ssh-add " + name + ")"; offered != "" || unused != want {
		t.Errorf("offered %q, cannot use %q, want %q", offered, unused, want)
	}
}

// OpenSSH's order, in which an agent that lacks a file's key does not hold it up.
func TestOrderOfCertificates(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	authority, one, two := filepath.Join(dir, "authority"), filepath.Join(dir, "one"), filepath.Join(dir, "two")
	for _, name := range []string{authority, one, two} {
		sshtest.Keygen(t, name, "-t", "ed25519")
	}
	beside, named := sign(t, authority, one), filepath.Join(dir, "named")
	if err := os.Rename(sign(t, authority, two), named); err != nil {
		t.Fatal(err)
	}
	socket := startAgent(t, newAgentKey(t, "laptop"), agent.AddedKey{PrivateKey: rawKey(t, two), Comment: "two"})
	target := &Target{IdentityFiles: []string{one, two}, AgentSocket: socket}
	if got, want := first(offersOf(target)), two+` from the agent; agent key "laptop"; `+one+"; "+beside; got != want {
		t.Errorf("offers %s, want %s", got, want)
	}
	target.Certificates = []string{named}
	if got, want := first(offersOf(target)), named+"; "+two+` from the agent; agent key "laptop"; `+one; got != want {
		t.Errorf("offers %s, want %s", got, want)
	}
}

func first(a, _ string) string { return a }
