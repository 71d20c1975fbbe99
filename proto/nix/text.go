package nix

import (
	"encoding/base64"
	"fmt"
	"strings"
)

// maxQuoted is how much foreign text an error message repeats, in bytes.
const maxQuoted = 200

// clip shortens foreign text for an error message.
func clip(s string) string {
	if len(s) > maxQuoted {
		return s[:maxQuoted] + "..."
	}
	return s
}

const base64Alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

// nixBase64 reads base-64 the way Nix does: '=' ends the text, line feeds are
// skipped, neither the length nor spare bits matter.
//
// See base64::decode in src/libutil/base-n.cc.
func nixBase64(s string) ([]byte, error) {
	s, _, _ = strings.Cut(s, "=")
	s = strings.ReplaceAll(s, "\n", "")
	for i := range len(s) {
		if strings.IndexByte(base64Alphabet, s[i]) < 0 {
			return nil, fmt.Errorf("illegal base-64 character %q", s[i])
		}
	}
	if len(s)%4 == 1 {
		s = s[:len(s)-1] // six bits make no byte
	}
	return base64.RawStdEncoding.DecodeString(s)
}

// SizeText is a number of bytes for people, such as "1.5 GiB".
func SizeText(n uint64) string {
	units := []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	size := float64(n) / 1024
	for size >= 1023.95 && len(units) > 1 {
		size, units = size/1024, units[1:]
	}
	return fmt.Sprintf("%.1f %s", size, units[0])
}
