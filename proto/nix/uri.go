package nix

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// The character sets of RFC 3986, without '%'.
const (
	unreservedMarks = "-._~"
	subDelims       = "!$&'()*+,;="
)

func alnum(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

func unreserved(c byte) bool { return alnum(c) || strings.IndexByte(unreservedMarks, c) >= 0 }

// parseURI reads "scheme://authority/path?query#fragment" by RFC 3986, except
// that the query may hold bare blanks and double quotes. The fragment is
// dropped.
//
// See parseURL in src/libutil/url.cc.
func parseURI(s string) (StoreReference, error) {
	s, _, _ = strings.Cut(s, "#")
	base, query, _ := strings.Cut(s, "?")
	scheme, rest, ok := strings.Cut(base, ":")
	if !ok || !validScheme(scheme) {
		return StoreReference{}, errors.New("it has no scheme such as \"ssh://\"")
	}
	ref := StoreReference{Scheme: scheme}
	// Without "//" Nix prints "a:b" as "a://b" and on opening takes b for the
	// authority, so it is the same here.
	authority := strings.TrimPrefix(rest, "//")
	if i := strings.IndexByte(authority, '/'); i >= 0 {
		var err error
		if ref.Path, err = decodePath(authority[i:]); err != nil {
			return StoreReference{}, err
		}
		authority = authority[:i]
	}
	if err := ref.parseAuthority(authority); err != nil {
		return StoreReference{}, err
	}
	var err error
	ref.Params, err = decodeQuery(query)
	return ref, err
}

func validScheme(s string) bool {
	for i := range len(s) {
		if !alnum(s[i]) && (i == 0 || strings.IndexByte("+-.", s[i]) < 0) {
			return false
		}
	}
	return s != "" && (s[0] < '0' || s[0] > '9')
}

// parseAuthority reads "user:password@host:port" into r.
func (r *StoreReference) parseAuthority(s string) error {
	host := s
	if i := strings.IndexByte(s, '@'); i >= 0 {
		user, password, _ := strings.Cut(s[:i], ":")
		host = s[i+1:]
		var err error
		if r.User, err = decode(user, subDelims); err != nil {
			return fmt.Errorf("user name: %w", err)
		}
		if r.Password, err = decode(password, subDelims+":"); err != nil {
			return fmt.Errorf("password: %w", err)
		}
		if r.User == "" {
			return errors.New("empty user name before '@'")
		}
	}
	port := ""
	if strings.HasPrefix(host, "[") {
		end := strings.IndexByte(host, ']')
		if end < 0 {
			return errors.New("no ']' after '['")
		}
		if port = host[end+1:]; port != "" && port[0] != ':' {
			return errors.New("text after ']'")
		}
		if err := r.parseIPv6(host[1:end]); err != nil {
			return err
		}
	} else {
		if i := strings.IndexByte(host, ':'); i >= 0 {
			host, port = host[:i], host[i:]
		}
		var err error
		if r.Host, err = decode(host, subDelims); err != nil {
			return fmt.Errorf("host name: %w", err)
		}
	}
	return r.parsePort(strings.TrimPrefix(port, ":"))
}

// parseIPv6 reads what stands in brackets: an address and, after "%25", a zone.
func (r *StoreReference) parseIPv6(s string) error {
	address, zone, hasZone := strings.Cut(s, "%25")
	if !isIPv6(address) || hasZone && zone == "" {
		return fmt.Errorf("%q is not an IPv6 address", clip(s))
	}
	r.Host = address
	if hasZone {
		zone, err := decode(zone, "")
		if err != nil {
			return fmt.Errorf("zone of an IPv6 address: %w", err)
		}
		r.Host += "%" + zone
	}
	return nil
}

func (r *StoreReference) parsePort(s string) error {
	if s == "" {
		return nil
	}
	port, err := strconv.ParseUint(s, 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("port %q is not a number from 1 to 65535", clip(s))
	}
	r.Port = int(port)
	return nil
}

// decodePath decodes a path and refuses what could not be a file's name.
func decodePath(s string) (string, error) {
	p, err := decode(s, subDelims+":@/")
	if err != nil {
		return "", fmt.Errorf("path: %w", err)
	}
	if strings.Count(p, "/") != strings.Count(s, "/") || strings.Contains(p, "\x00") {
		return "", fmt.Errorf("path %q: encoded slash or NUL", clip(s))
	}
	return p, nil
}

// queryMarks may stand bare in a query; blank and double quote are Nix's addition.
const queryMarks = subDelims + ":@/?[] \""

// decodeQuery reads "key=value&key=value"; it returns nil where no parameter is set.
//
// See decodeQuery in src/libutil/url.cc.
func decodeQuery(query string) (map[string]string, error) {
	var params map[string]string
	for part := range strings.SplitSeq(query, "&") {
		k, v, hasValue := strings.Cut(part, "=")
		key, err := decode(k, queryMarks)
		if err != nil {
			return nil, fmt.Errorf("query: %w", err)
		}
		value, err := decode(v, queryMarks)
		if err != nil {
			return nil, fmt.Errorf("query parameter %q: %w", clip(key), err)
		}
		if _, seen := params[key]; seen || !hasValue {
			continue
		}
		if params == nil {
			params = make(map[string]string)
		}
		params[key] = value
	}
	return params, nil
}

// keysWithoutValue lists the parameters that decodeQuery drops.
func keysWithoutValue(uri string) []string {
	var keys []string
	uri, _, _ = strings.Cut(uri, "#")
	_, query, _ := strings.Cut(uri, "?")
	for part := range strings.SplitSeq(query, "&") {
		if part != "" && !strings.Contains(part, "=") {
			keys = append(keys, part)
		}
	}
	return keys
}

// decode undoes percent-encoding. Bare characters must be unreserved or in marks.
func decode(s, marks string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '%' {
			if i+2 >= len(s) {
				return "", errors.New("'%' without two hexadecimal digits")
			}
			n, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
			if err != nil {
				return "", errors.New("'%' without two hexadecimal digits")
			}
			c = byte(n)
			i += 2
		} else if !unreserved(c) && strings.IndexByte(marks, c) < 0 {
			return "", fmt.Errorf("illegal character %q", c)
		}
		b.WriteByte(c)
	}
	return b.String(), nil
}

// percentEncode encodes all but unreserved characters and those in keep.
func percentEncode(s, keep string) string {
	const digits = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; unreserved(c) || strings.IndexByte(keep, c) >= 0 {
			b.WriteByte(c)
		} else {
			b.Write([]byte{'%', digits[c>>4], digits[c&15]})
		}
	}
	return b.String()
}
