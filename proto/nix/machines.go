package nix

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A Machine is one entry of a machines file or of the "builders" setting
// (src/libstore/include/nix/store/machines.hh).
type Machine struct {
	// StoreURI is Ref as Nix renders it. It names the machine to people.
	StoreURI string
	// SystemTypes, SupportedFeatures and MandatoryFeatures are sorted and hold
	// nothing twice.
	SystemTypes []string
	// SSHKey is the path of an identity file; "" if unset.
	SSHKey string
	// MaxJobs is the number of slots. 0 is legal: the machine never builds.
	MaxJobs int
	// SpeedFactor is finite and above zero.
	SpeedFactor                          float64
	SupportedFeatures, MandatoryFeatures []string
	// SSHPublicHostKey is base-64 as given, "" if unset; see [DecodeHostKey].
	SSHPublicHostKey string
	// Ref is StoreURI parsed.
	Ref StoreReference
	// Source is where the entry stands.
	Source Position
}

// SystemSupported tells whether the machine builds for the system. Every
// machine runs "builtin" derivations.
func (m *Machine) SystemSupported(system string) bool {
	return system == "builtin" || slices.Contains(m.SystemTypes, system)
}

// AllSupported tells whether the machine has all these features. A mandatory
// feature counts as supported.
func (m *Machine) AllSupported(features []string) bool {
	return !slices.ContainsFunc(features, func(f string) bool {
		return !slices.Contains(m.SupportedFeatures, f) && !slices.Contains(m.MandatoryFeatures, f)
	})
}

// MandatoryMet tells whether these features include all that the machine
// insists on.
func (m *Machine) MandatoryMet(features []string) bool {
	return !slices.ContainsFunc(m.MandatoryFeatures, func(f string) bool {
		return !slices.Contains(features, f)
	})
}

// IdentityFile is the path of the private key to log in with: the column, else
// the parameter "ssh-key", else "".
func (m *Machine) IdentityFile() string {
	if m.SSHKey != "" {
		return m.SSHKey
	}
	return m.Ref.Params["ssh-key"]
}

// HostKey is the machine's public host key, still in base-64: the column, else
// the parameter "base64-ssh-public-host-key", else "".
func (m *Machine) HostKey() string {
	if m.SSHPublicHostKey != "" {
		return m.SSHPublicHostKey
	}
	return m.Ref.Params["base64-ssh-public-host-key"]
}

// DecodeHostKey decodes [Machine.HostKey] into what stands after the host name
// in a known_hosts file, "ssh-ed25519 AAAA... comment", and checks that it has
// this form and that the key names its own type.
func DecodeHostKey(key string) (string, error) {
	line, err := nixBase64(key)
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(line))
	if len(fields) < 2 || strings.ContainsAny(strings.TrimSpace(string(line)), "\r\n\x00") {
		return "", errors.New(`it does not decode to one line like "ssh-ed25519 AAAA... comment"`)
	}
	blob, err := nixBase64(fields[1])
	if err != nil {
		return "", fmt.Errorf("second word of the decoded key: %w", err)
	}
	// A public key begins with its type, after a length of four bytes (RFC 4253 6.6).
	prefix := []byte{0, 0, byte(len(fields[0]) >> 8), byte(len(fields[0]))}
	if !strings.HasPrefix(string(blob), string(prefix)+fields[0]) {
		return "", fmt.Errorf("the decoded key is not of the type %q it claims", clip(fields[0]))
	}
	return strings.TrimSpace(string(line)), nil
}

// A Position is a place in a file.
type Position struct {
	// File is a path, or stands for a text that comes from no file.
	File string
	// Line counts from 1; 0 means the file as a whole.
	Line int
}

func (p Position) String() string {
	file := p.File
	if q := strconv.Quote(file); q[1:len(q)-1] != file {
		file = q
	}
	switch {
	case p.Line == 0:
		return file
	case file == "":
		return "line " + strconv.Itoa(p.Line)
	default:
		return file + ":" + strconv.Itoa(p.Line)
	}
}

// columnNames are the columns of a machines file in order.
var columnNames = [...]string{
	"store URI", "systems", "ssh key", "max jobs", "speed factor",
	"supported features", "mandatory features", "public host key",
}

// A MachineError is something wrong, or merely odd, in a machines file.
type MachineError struct {
	Source Position
	// Column counts from 0 as in Nix's messages; it is -1, and Name "", where
	// the trouble is not with one column.
	Column int
	// Name is the column's name, such as "max jobs".
	Name string
	// Found is the text of the column, include or entry.
	Found string
	// Expected says what should stand there.
	Expected string
	// Err is the cause; nil where Found and Expected say it all.
	Err error
}

// Error has the form "file:line: column #3 (max jobs): found "x", expected y: cause".
func (e *MachineError) Error() string {
	var b strings.Builder
	b.WriteString(e.Source.String())
	if e.Column >= 0 {
		fmt.Fprintf(&b, ": column #%d (%s)", e.Column, e.Name)
	}
	fmt.Fprintf(&b, ": found %q, expected %s", clip(e.Found), e.Expected)
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	return b.String()
}

// Unwrap is the cause.
func (e *MachineError) Unwrap() error { return e.Err }
