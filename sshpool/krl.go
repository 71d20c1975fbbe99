package sshpool

import (
	"bytes"
	"crypto/sha1" //nolint:gosec // the format has such fingerprints, too
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"

	"golang.org/x/crypto/ssh"
)

// This file reads key revocation lists, which ssh-keygen -k makes and
// RevokedHostKeys may name. The format is in PROTOCOL.krl of OpenSSH, what it
// means in its krl.c.

const (
	krlMagic   = "SSHKRL\n\x00"
	krlVersion = 1

	krlCertificates      = 1
	krlExplicitKey       = 2
	krlFingerprintSHA1   = 3
	krlFingerprintSHA256 = 5
	krlExtension         = 255

	krlCertSerialList   = 0x20
	krlCertSerialRange  = 0x21
	krlCertSerialBitmap = 0x22
	krlCertKeyID        = 0x23
	krlCertExtension    = 0x39
)

// A revocationList tells of keys and certificates that must not be accepted any
// more. The zero value revokes nothing.
type revocationList struct {
	blobs        map[string]bool // of plain keys
	sha1, sha256 map[string]bool // fingerprints of plain keys
	certs        []revokedCerts
}

// revokedCerts are certificates of one authority.
type revokedCerts struct {
	authority string // its key's blob; "" for any
	keyIDs    map[string]bool
	ranges    []serialRange
	bitmaps   []serialBitmap
}

type serialRange struct{ first, last uint64 }

// A serialBitmap revokes the serial number offset + n for each bit n that is set.
type serialBitmap struct {
	offset uint64
	bits   *big.Int
}

func isRevocationList(text []byte) bool { return bytes.HasPrefix(text, []byte(krlMagic)) }

// parseRevocationList reads a list. What it does not know makes the list as good
// as unreadable, unless the list itself says that it may be passed over.
func parseRevocationList(text []byte) (*revocationList, error) {
	var head struct {
		Magic               uint64
		Version             uint32
		Number, Date, Flags uint64
		Reserved, Comment   string
		Rest                []byte `ssh:"rest"`
	}
	if err := ssh.Unmarshal(text, &head); err != nil {
		return nil, errTruncatedList
	}
	if head.Version != krlVersion {
		return nil, fmt.Errorf("version %d of the format is not known here", head.Version)
	}
	l := &revocationList{blobs: make(map[string]bool), sha1: make(map[string]bool), sha256: make(map[string]bool)}
	return l, eachSection(head.Rest, l.section)
}

var errTruncatedList = errors.New("the key revocation list is cut short")

// eachSection reads pairs of a byte and a string.
func eachSection(text []byte, read func(kind byte, data []byte) error) error {
	for len(text) > 0 {
		var s struct {
			Kind byte
			Data []byte
			Rest []byte `ssh:"rest"`
		}
		if err := ssh.Unmarshal(text, &s); err != nil {
			return errTruncatedList
		}
		if err := read(s.Kind, s.Data); err != nil {
			return err
		}
		text = s.Rest
	}
	return nil
}

func (l *revocationList) section(kind byte, data []byte) error {
	switch kind {
	case krlCertificates:
		return l.certificates(data)
	case krlExplicitKey:
		return eachString(data, l.blobs)
	case krlFingerprintSHA1:
		return eachString(data, l.sha1)
	case krlFingerprintSHA256:
		return eachString(data, l.sha256)
	case krlExtension:
		return extension(data)
	default:
		return fmt.Errorf("section %d of the key revocation list is not known here", kind)
	}
}

// eachString puts the strings of a section into a set.
func eachString(text []byte, set map[string]bool) error {
	for len(text) > 0 {
		var s struct {
			Word string
			Rest []byte `ssh:"rest"`
		}
		if err := ssh.Unmarshal(text, &s); err != nil {
			return errTruncatedList
		}
		set[s.Word] = true
		text = s.Rest
	}
	return nil
}

// extension passes over what may be passed over.
func extension(data []byte) error {
	var e struct {
		Name     string
		Critical bool
		Contents []byte
	}
	if err := ssh.Unmarshal(data, &e); err != nil {
		return errTruncatedList
	}
	if e.Critical {
		return fmt.Errorf("the extension %q of the key revocation list is not known here", e.Name)
	}
	return nil
}

func (l *revocationList) certificates(data []byte) error {
	var s struct {
		Authority, Reserved string
		Rest                []byte `ssh:"rest"`
	}
	if err := ssh.Unmarshal(data, &s); err != nil {
		return errTruncatedList
	}
	certs := revokedCerts{authority: s.Authority, keyIDs: make(map[string]bool)}
	if err := eachSection(s.Rest, certs.section); err != nil {
		return err
	}
	l.certs = append(l.certs, certs)
	return nil
}

func (c *revokedCerts) section(kind byte, data []byte) error {
	switch kind {
	case krlCertSerialList:
		for ; len(data) > 0; data = data[8:] {
			var s struct {
				Serial uint64
				Rest   []byte `ssh:"rest"`
			}
			if err := ssh.Unmarshal(data, &s); err != nil {
				return errTruncatedList
			}
			c.ranges = append(c.ranges, serialRange{s.Serial, s.Serial})
		}
		return nil
	case krlCertSerialRange:
		var s struct{ First, Last uint64 }
		if err := ssh.Unmarshal(data, &s); err != nil {
			return errTruncatedList
		}
		c.ranges = append(c.ranges, serialRange{s.First, s.Last})
		return nil
	case krlCertSerialBitmap:
		var s struct {
			Offset uint64
			Bits   *big.Int
		}
		if err := ssh.Unmarshal(data, &s); err != nil || s.Bits.Sign() < 0 {
			return errTruncatedList
		}
		c.bitmaps = append(c.bitmaps, serialBitmap{s.Offset, s.Bits})
		return nil
	case krlCertKeyID:
		return eachString(data, c.keyIDs)
	case krlCertExtension:
		return extension(data)
	default:
		return fmt.Errorf("section %#x about certificates of the key revocation list is not known here", kind)
	}
}

// revokes tells whether the list has a key, or of a certificate the key in it, its
// authority's, or itself.
func (l *revocationList) revokes(key ssh.PublicKey) bool {
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return l.revokesPlain(key)
	}
	if l.revokesPlain(cert.Key) || l.revokesPlain(cert.SignatureKey) {
		return true
	}
	authority := string(cert.SignatureKey.Marshal())
	for _, c := range l.certs {
		if (c.authority == "" || c.authority == authority) && c.revokes(cert) {
			return true
		}
	}
	return false
}

func (l *revocationList) revokesPlain(key ssh.PublicKey) bool {
	blob := key.Marshal()
	short, long := sha1.Sum(blob), sha256.Sum256(blob) //nolint:gosec // see above
	return l.blobs[string(blob)] || l.sha1[string(short[:])] || l.sha256[string(long[:])]
}

// revokes tells whether the authority has revoked its certificate. Those without a
// serial number are known by their key id only.
func (c *revokedCerts) revokes(cert *ssh.Certificate) bool {
	if c.keyIDs[cert.KeyId] {
		return true
	}
	if cert.Serial == 0 {
		return false
	}
	for _, r := range c.ranges {
		if r.first <= cert.Serial && cert.Serial <= r.last {
			return true
		}
	}
	for _, m := range c.bitmaps {
		n := cert.Serial - m.offset
		if cert.Serial >= m.offset && n < uint64(m.bits.BitLen()) && m.bits.Bit(int(n)) == 1 { //nolint:gosec // below a length
			return true
		}
	}
	return false
}
