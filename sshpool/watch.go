package sshpool

import (
	"fmt"
	"io"

	"golang.org/x/crypto/ssh"
)

// badKeys are keys that a host would have taken and that could not sign, by their
// blob: an agent may refuse to use a key, or have to wait for somebody to touch it.
// The library gives up then; OpenSSH goes on with the next key.
type badKeys map[string]error

// leaveOut takes keys away that are known not to sign.
func (ids *identities) leaveOut(bad badKeys) {
	var signers []ssh.Signer
	var offered []string
	for i, s := range ids.signers {
		if err := bad[string(s.PublicKey().Marshal())]; err != nil {
			ids.unused = append(ids.unused, fmt.Sprintf("%s: does not sign: %v", ids.offered[i], err))
			continue
		}
		signers, offered = append(signers, s), append(offered, ids.offered[i])
	}
	ids.signers, ids.offered = signers, offered
}

// watched are the signers, each of which notes in used that it signed, and in
// broken that it could not. A host is asked first whether it would take a key, so
// the last to sign is what let us in.
func (ids *identities) watched() []ssh.Signer {
	ids.broken = make(badKeys)
	signers := make([]ssh.Signer, len(ids.signers))
	for i, s := range ids.signers {
		note := func(sig *ssh.Signature, err error) (*ssh.Signature, error) {
			ids.used = ids.offered[i]
			if err != nil {
				ids.broken[string(s.PublicKey().Marshal())] = err
			}
			return sig, err
		}
		// What a signer can do besides signing decides on the algorithm.
		switch s := s.(type) {
		case ssh.MultiAlgorithmSigner:
			signers[i] = watchedMulti{s, note}
		case ssh.AlgorithmSigner:
			signers[i] = watchedAlgorithm{s, note}
		default:
			signers[i] = watchedSigner{s, note}
		}
	}
	return signers
}

type noteFunc func(*ssh.Signature, error) (*ssh.Signature, error)

type watchedSigner struct {
	ssh.Signer
	note noteFunc
}

func (w watchedSigner) Sign(rand io.Reader, data []byte) (*ssh.Signature, error) {
	return w.note(w.Signer.Sign(rand, data))
}

type watchedAlgorithm struct {
	ssh.AlgorithmSigner
	note noteFunc
}

func (w watchedAlgorithm) SignWithAlgorithm(rand io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	return w.note(w.AlgorithmSigner.SignWithAlgorithm(rand, data, algorithm))
}

type watchedMulti struct {
	ssh.MultiAlgorithmSigner
	note noteFunc
}

func (w watchedMulti) SignWithAlgorithm(rand io.Reader, data []byte, algorithm string) (*ssh.Signature, error) {
	return w.note(w.MultiAlgorithmSigner.SignWithAlgorithm(rand, data, algorithm))
}

// accepted says what let us in.
func (ids *identities) accepted(user string) string {
	if ids.used == "" {
		return fmt.Sprintf("as user %q, without a key", user)
	}
	return fmt.Sprintf("as user %q with %s", user, ids.used)
}
