package nix

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// A NarHash is the SHA-256 of a NAR.
type NarHash [sha256.Size]byte

// base32Len is the length of a SHA-256 in Nix's base-32.
const base32Len = (sha256.Size*8-1)/5 + 1

// ParseNarHash reads any spelling that Nix uses for a SHA-256: hexadecimal,
// Nix's base-32 or base-64, bare or with "sha256:" before it, or SRI
// ("sha256-" and base-64, whose padding may be missing).
//
// See Hash::parseAny in src/libutil/hash.cc.
func ParseNarHash(s string) (NarHash, error) {
	h, err := parseNarHash(s)
	if err != nil {
		return NarHash{}, fmt.Errorf("parse SHA-256 %q: %w", clip(s), err)
	}
	return h, nil
}

func parseNarHash(s string) (h NarHash, err error) {
	if text, ok := strings.CutPrefix(s, "sha256-"); ok {
		return h, decodeBase64(&h, text)
	}
	text := strings.TrimPrefix(s, "sha256:")
	switch len(text) {
	case hex.EncodedLen(sha256.Size):
		_, err = hex.Decode(h[:], []byte(text))
	case base32Len:
		err = decodeBase32(&h, text)
	case base64.StdEncoding.EncodedLen(sha256.Size):
		err = decodeBase64(&h, text)
	default:
		err = errors.New("wrong length, or not a SHA-256")
	}
	return h, err
}

func decodeBase64(h *NarHash, s string) error {
	b, err := nixBase64(s)
	if err == nil && len(b) != len(h) {
		err = fmt.Errorf("%d bytes instead of %d", len(b), len(h))
	}
	copy(h[:], b)
	return err
}

// decodeBase32 reads Nix's base-32, whose first character holds the highest
// bits of the number that the bytes make in little-endian order
// (src/libutil/base-nix-32.cc).
func decodeBase32(h *NarHash, s string) error {
	for n := range len(s) {
		digit := strings.IndexByte(Base32Alphabet, s[len(s)-n-1])
		if digit < 0 {
			return fmt.Errorf("illegal base-32 character %q", s[len(s)-n-1])
		}
		i, j := n*5/8, n*5%8
		h[i] |= byte(digit << j)
		carry := byte(digit >> (8 - j))
		if i+1 < len(h) {
			h[i+1] |= carry
		} else if carry != 0 {
			return fmt.Errorf("base-32 number too large")
		}
	}
	return nil
}

// Hex is the 64 hexadecimal digits, the form of the worker protocol.
func (h NarHash) Hex() string { return hex.EncodeToString(h[:]) }

// Base32 is the hash in Nix's base-32, without a prefix.
func (h NarHash) Base32() string {
	out := make([]byte, base32Len)
	for n := range base32Len {
		i, j := n*5/8, n*5%8
		c := h[i] >> j
		if i+1 < len(h) && j > 3 {
			c |= h[i+1] << (8 - j)
		}
		out[base32Len-n-1] = Base32Alphabet[c&31]
	}
	return string(out)
}

// String is the hash as Nix prints it: "sha256:" and base-32.
func (h NarHash) String() string { return "sha256:" + h.Base32() }
