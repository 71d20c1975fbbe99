package nix

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
)

// A StoreReference is a parsed store URI: where a store is and how to reach it.
//
//	user@host:22?compress=true   (after CompleteStoreURI)   Scheme ssh, User, Host, Port, Params
//	ssh-ng://[fe80::1%25eth0]                               Host "fe80::1%eth0"
//	/path, local:///path, unix:///socket                    Scheme local or unix, Path
//	auto, daemon, local                                     Scheme and Word
//
// The zero value stands for no store.
type StoreReference struct {
	// Scheme is what stands before "://", or one of the words "auto", "daemon" and "local".
	Scheme string
	// Word is set where the reference is one of these words and not a URI.
	Word bool
	// User, Password and Host are decoded; "" where absent. Nix ignores the password.
	// An IPv6 address stands without brackets, its zone after a bare '%'.
	User, Password, Host string
	// Port is 0 where none is given.
	Port int
	// Path is decoded and begins with a slash; "" where absent.
	Path string
	// Params are the decoded query parameters; nil where there are none.
	Params map[string]string
}

// CompleteStoreURI puts "ssh://" before the first column of a machines file
// where Nix does: unless it is a URI, holds a slash anywhere (even in its
// query), or is one of the words that name a local store.
//
// See Machine::Machine in src/libstore/machines.cc.
func CompleteStoreURI(s string) string {
	if strings.Contains(s, "/") || strings.HasPrefix(s, "?") {
		return s
	}
	word, _, _ := strings.Cut(s, "?")
	switch word {
	case "auto", "daemon", "local":
		return s
	}
	return "ssh://" + s
}

// ParseStoreReference reads a store URI as Nix does. The first of several
// parameters with one key wins, a parameter without '=' is dropped, and a
// relative path is taken from the root directory, where Nix's hook runs.
// For ssh and ssh-ng it also checks what Nix checks on connecting: a host, no
// path, and no user or host that ssh could take for an option.
//
// See StoreReference::parse in src/libstore/store-reference.cc and
// checkValidAuthority in src/libstore/ssh.cc.
func ParseStoreReference(s string) (StoreReference, error) {
	return ParseStoreReferenceWarn(s, func(string) {})
}

// ParseStoreReferenceWarn is [ParseStoreReference] and calls warn for what Nix
// would only warn about.
func ParseStoreReferenceWarn(s string, warn func(message string)) (StoreReference, error) {
	ref, err := parseURI(s)
	if err != nil {
		var shimErr error
		if ref, shimErr = parseShorthand(s); errors.Is(shimErr, errNoShorthand) {
			return StoreReference{}, fmt.Errorf("parse store URI %q: %w", clip(s), err)
		} else if shimErr != nil {
			return StoreReference{}, fmt.Errorf("parse store URI %q: %w", clip(s), shimErr)
		}
	}
	if ref.Scheme == "ssh" || ref.Scheme == "ssh-ng" {
		if err := ref.checkSSH(); err != nil {
			return StoreReference{}, fmt.Errorf("parse store URI %q: %w", clip(s), err)
		}
	}
	for _, key := range keysWithoutValue(s) {
		warn(fmt.Sprintf("parameter %q has no '=' and is ignored", clip(key)))
	}
	return ref, nil
}

var errNoShorthand = errors.New("not a store URI")

// parseShorthand reads the forms of store references that are no URIs.
func parseShorthand(s string) (StoreReference, error) {
	base, query, _ := strings.Cut(s, "?")
	params, err := decodeQuery(query)
	if err != nil {
		return StoreReference{}, err
	}
	switch {
	case base == "" || base == "auto":
		return StoreReference{Scheme: "auto", Word: true, Params: params}, nil
	case base == "daemon" && params != nil:
		return StoreReference{Scheme: "unix", Params: params}, nil
	case base == "local" && params != nil:
		return StoreReference{Scheme: "local", Params: params}, nil
	case base == "daemon" || base == "local":
		return StoreReference{Scheme: base, Word: true}, nil
	case strings.Contains(base, "/") && !strings.Contains(base, "://"):
		// Any byte may stand in a file name, but for NUL.
		if strings.Contains(base, "\x00") {
			return StoreReference{}, errors.New("NUL in a path")
		}
		return StoreReference{Scheme: "local", Path: path.Clean("/" + base), Params: params}, nil
	}
	ref, err := parseBareIPv6(base)
	ref.Params = params
	return ref, err
}

// parseBareIPv6 accepts what older versions of Nix did: an IPv6 address without
// brackets, or in brackets with a zone after a bare '%'. All of the text is the
// address: a port can't be told from it.
func parseBareIPv6(base string) (StoreReference, error) {
	scheme, rest, ok := strings.Cut(base, ":")
	if !ok || !validScheme(scheme) {
		return StoreReference{}, errNoShorthand
	}
	rest = strings.TrimPrefix(rest, "//")
	user, host, hasUser := strings.Cut(rest, "@")
	if !hasUser {
		user, host = "", rest
	}
	if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		host = host[1 : len(host)-1]
	}
	address, zone, hasZone := strings.Cut(host, "%")
	if !isIPv6(address) {
		return StoreReference{}, errNoShorthand
	}
	authority := "[" + address + "]"
	if hasZone {
		authority = "[" + address + "%25" + zone + "]"
	}
	if hasUser {
		authority = user + "@" + authority
	}
	return parseURI(scheme + "://" + authority)
}

// isIPv6 tells whether s is an IPv6 address without a zone.
func isIPv6(s string) bool {
	addr, err := netip.ParseAddr(s)
	return err == nil && addr.Is6() && addr.Zone() == ""
}

// checkSSH refuses an authority that must not reach ssh's command line.
func (r StoreReference) checkSSH() error {
	switch {
	case r.Host == "":
		return errors.New("no host name")
	case strings.HasPrefix(r.Host, "-"):
		return fmt.Errorf("host name %q begins with '-'", r.Host)
	case strings.HasPrefix(r.User, "-"):
		return fmt.Errorf("user name %q begins with '-'", r.User)
	case strings.ContainsFunc(r.User+r.Host, isControl):
		return errors.New("control character in the user or host name")
	case r.Path != "":
		return fmt.Errorf("unexpected path %q after the host name", clip(r.Path))
	}
	return nil
}

func isControl(c rune) bool { return c < ' ' || c == 0x7f }

// FakeSSH tells whether Nix would run this store's command directly instead of
// over ssh: the authority is exactly "localhost".
//
// See SSHMaster in src/libstore/ssh.cc.
func (r StoreReference) FakeSSH() bool {
	return (r.Scheme == "ssh" || r.Scheme == "ssh-ng") && r.authority() == "localhost"
}

// String renders the reference as Nix does, parameters sorted by key. It
// parses to the same reference; that of the zero value is "".
//
// See StoreReference::render in src/libstore/store-reference.cc.
func (r StoreReference) String() string {
	var b strings.Builder
	b.WriteString(r.Scheme)
	if r.Scheme != "" && !r.Word {
		b.WriteString("://")
		b.WriteString(r.authority())
		b.WriteString(percentEncode(r.Path, ":@/"))
	}
	sep := byte('?')
	for _, key := range slices.Sorted(maps.Keys(r.Params)) {
		b.WriteByte(sep)
		b.WriteString(percentEncode(key, ":@/?"))
		b.WriteByte('=')
		b.WriteString(percentEncode(r.Params[key], ":@/?"))
		sep = '&'
	}
	return b.String()
}

// authority renders user, host and port.
func (r StoreReference) authority() string {
	var b strings.Builder
	if r.User != "" || r.Password != "" {
		b.WriteString(percentEncode(r.User, ""))
		if r.Password != "" {
			b.WriteString(":" + percentEncode(r.Password, ""))
		}
		b.WriteByte('@')
	}
	if address, _, _ := strings.Cut(r.Host, "%"); isIPv6(address) {
		b.WriteString("[" + percentEncode(r.Host, ":") + "]")
	} else {
		b.WriteString(percentEncode(r.Host, ""))
	}
	if r.Port != 0 {
		b.WriteString(":" + strconv.Itoa(r.Port))
	}
	return b.String()
}
