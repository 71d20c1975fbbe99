package sshpool

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"golang.org/x/crypto/ssh"

	"nixdispatch/sshpool/plainfile"
)

// maxKeyFile bounds a file with a key or certificate.
const maxKeyFile = 1 << 20

// An identityFile is what there is at an IdentityFile's name.
type identityFile struct {
	name      string
	signer    ssh.Signer // nil if the private key cannot be used
	fromAgent bool       // signer is the agent's
	public    ssh.PublicKey
	missing   bool
	err       error // why signer is nil

	certName string
	cert     *ssh.Certificate // of the file beside it, if that was asked for
}

// readIdentity reads a private key, and the certificate beside it.
func readIdentity(name string, withCert bool) *identityFile {
	f := &identityFile{name: name}
	text, err := plainfile.Read(name, maxKeyFile)
	if err == nil {
		f.signer, err = ssh.ParsePrivateKey(text)
	}
	if err == nil {
		f.public = f.signer.PublicKey()
	} else {
		f.err, f.missing = err, errors.Is(err, fs.ErrNotExist)
		f.public = publicHalf(name, text, err)
	}
	if !withCert {
		return f
	}
	f.certName = name + "-cert.pub"
	if cert, err := readCertificate(f.certName); err == nil {
		f.cert = cert
	}
	return f
}

// useAgent takes the agent's key where it is this file's, which cannot be used.
func (f *identityFile) useAgent(keys []agentKey) {
	if f.signer != nil || f.public == nil {
		return
	}
	for _, k := range keys {
		if sameKey(k.signer.PublicKey(), f.public) {
			f.signer, f.fromAgent = k.signer, true
			return
		}
	}
}

// is tells whether a key is that of the file, or the certificate beside it.
func (f *identityFile) is(key ssh.PublicKey) bool {
	return f.public != nil && sameKey(key, f.public) || f.cert != nil && sameKey(key, f.cert)
}

// problem says why the private key cannot be used, and what to do.
func (f *identityFile) problem() error {
	if _, ok := errors.AsType[*ssh.PassphraseMissingError](f.err); ok {
		return fmt.Errorf("has a passphrase: load it into an agent (ssh-add %s)", f.name)
	}
	if f.public != nil && strings.HasPrefix(f.public.Type(), "sk-") {
		return fmt.Errorf("is on a hardware token: load it into an agent (ssh-add %s)", f.name)
	}
	if f.public != nil && !f.missing {
		return fmt.Errorf("its private key is neither here nor in an agent: %w", f.err)
	}
	return f.err
}

// publicHalf returns the public half of a private key file that could not be
// used, or nil: from the file itself, which may be a public key's, or from the
// .pub file beside it.
func publicHalf(name string, text []byte, err error) ssh.PublicKey {
	if missing, ok := errors.AsType[*ssh.PassphraseMissingError](err); ok && missing.PublicKey != nil {
		return missing.PublicKey
	}
	if key := publicOfPrivate(text); key != nil {
		return key
	}
	if key, _, _, _, err := ssh.ParseAuthorizedKey(text); err == nil {
		return key
	}
	text, err = plainfile.Read(name+".pub", maxKeyFile)
	if err != nil {
		return nil
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return nil
	}
	return key
}

// publicOfPrivate reads the public key in front of a private one of a type that
// the library cannot read, such as one on a token. See PROTOCOL.key of OpenSSH.
func publicOfPrivate(text []byte) ssh.PublicKey {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "OPENSSH PRIVATE KEY" {
		return nil
	}
	rest, ok := strings.CutPrefix(string(block.Bytes), "openssh-key-v1\x00")
	if !ok {
		return nil
	}
	var head struct {
		Cipher, KDF, KDFOptions string
		Keys                    uint32
		Public                  []byte
		Rest                    []byte `ssh:"rest"`
	}
	if ssh.Unmarshal([]byte(rest), &head) != nil {
		return nil
	}
	key, err := ssh.ParsePublicKey(head.Public)
	if err != nil {
		return nil
	}
	return key
}

// readCertificate reads a user's certificate.
func readCertificate(name string) (*ssh.Certificate, error) {
	text, err := plainfile.Read(name, maxKeyFile)
	if err != nil {
		return nil, err
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		return nil, err
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, errors.New("is no certificate")
	}
	if cert.CertType != ssh.UserCert {
		return nil, errors.New("is not a user's certificate")
	}
	return cert, nil
}
