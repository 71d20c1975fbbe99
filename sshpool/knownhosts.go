package sshpool

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/sha1" //nolint:gosec // OpenSSH hashes names with it
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/ssh"
	xknownhosts "golang.org/x/crypto/ssh/knownhosts"

	"nixdispatch/sshpool/plainfile"
)

// This file reads known_hosts files, whose format is in sshd(8), section
// SSH_KNOWN_HOSTS FILE FORMAT. As in OpenSSH (hostkeys_foreach in hostfile.c), a
// line that cannot be understood is ignored, and the rest counts.

const (
	// maxKnownHostsLine bounds a line; longer ones are ignored.
	maxKnownHostsLine = 64 << 10
	// maxKnownHostsSize bounds how much of a file is read.
	maxKnownHostsSize = 64 << 20
	// maxOddLines bounds the complaints about one file.
	maxOddLines = 100
)

// The markers of a line.
const (
	markNone    = ""
	markCA      = "cert-authority"
	markRevoked = "revoked"
)

// A knownKey is a line of a known_hosts file that is about the host in question.
type knownKey struct {
	file   string
	line   int // 0: of a file that has none
	marker string
	key    ssh.PublicKey
}

func (k knownKey) place() string {
	if k.line == 0 {
		return k.file
	}
	return fmt.Sprintf("%s:%d", k.file, k.line)
}

// A knownHostsReader collects the lines about a host.
type knownHostsReader struct {
	names []string     // to look for
	found [][]knownKey // for each name
	odd   []error      // lines that cannot be understood
}

// readFile reads one file; a missing one is as good as an empty one.
func (r *knownHostsReader) readFile(name string) error {
	if name == os.DevNull {
		return nil
	}
	f, err := plainfile.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := r.read(name, io.LimitReader(f, maxKnownHostsSize)); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (r *knownHostsReader) read(name string, in io.Reader) error {
	lines := bufio.NewReaderSize(in, maxKnownHostsLine)
	odd := 0
	for n := 1; ; n++ {
		line, err := lines.ReadSlice('\n')
		long := errors.Is(err, bufio.ErrBufferFull)
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = lines.ReadSlice('\n')
		}
		if err != nil && err != io.EOF {
			return err
		}
		problem := errors.New("line too long")
		if !long {
			problem = r.readLine(name, n, line)
		}
		if problem != nil {
			if odd++; odd <= maxOddLines {
				r.odd = append(r.odd, fmt.Errorf("%s:%d: %w", name, n, problem))
			}
		}
		if err == io.EOF {
			return nil
		}
	}
}

func (r *knownHostsReader) readLine(file string, n int, line []byte) error {
	line = bytes.TrimSpace(line)
	if len(line) == 0 || line[0] == '#' {
		return nil
	}
	k := knownKey{file: file, line: n}
	if line[0] == '@' {
		var marker []byte
		marker, line = cutBlank(line[1:])
		k.marker = string(marker)
		if k.marker != markCA && k.marker != markRevoked {
			return fmt.Errorf("unknown marker %q", "@"+k.marker)
		}
	}
	hosts, rest := cutBlank(line)
	matched := -1
	for i, name := range r.names {
		ok, err := matchHosts(string(hosts), name)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if matched < 0 {
			var err error
			if k.key, err = parseKeyFields(rest); err != nil {
				return err
			}
		}
		matched = i
		r.found[i] = append(r.found[i], k)
	}
	if matched >= 0 {
		return nil
	}
	// What is about other hosts need not be understood, but a line with nothing
	// in it is worth a word.
	if len(rest) == 0 {
		return errors.New("no key in it")
	}
	return nil
}

func cutBlank(line []byte) (word, rest []byte) {
	i := bytes.IndexAny(line, " \t")
	if i < 0 {
		return line, nil
	}
	return line[:i], bytes.TrimLeft(line[i:], " \t")
}

// parseKeyFields reads "ssh-ed25519 AAAA... comment".
func parseKeyFields(text []byte) (ssh.PublicKey, error) {
	fields := bytes.Fields(text)
	if len(fields) < 2 {
		return nil, errors.New("expected a type and a key in base64")
	}
	blob, err := base64.StdEncoding.DecodeString(string(fields[1]))
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePublicKey(blob)
	if err != nil {
		return nil, err
	}
	if key.Type() != string(fields[0]) {
		return nil, fmt.Errorf("it is of type %q", key.Type())
	}
	return key, nil
}

// matchHosts tells whether the first field of a line is about a host: a hashed
// name or patterns (match_hostname in OpenSSH's match.c). name is in lower case.
func matchHosts(field, name string) (bool, error) {
	if hash, ok := strings.CutPrefix(field, "|1|"); ok {
		return matchHashed(hash, name)
	}
	if strings.HasPrefix(field, "|") {
		return false, errors.New("hashed in an unknown way")
	}
	found := false
	for pattern := range strings.SplitSeq(strings.ToLower(field), ",") {
		pattern, not := strings.CutPrefix(pattern, "!")
		if !matchPattern(pattern, name) {
			continue
		}
		if not {
			return false, nil
		}
		found = true
	}
	return found, nil
}

// matchHashed compares with "SALT|HASH".
func matchHashed(hash, name string) (bool, error) {
	saltText, sumText, ok := strings.Cut(hash, "|")
	if !ok {
		return false, errors.New("hashed name without a second half")
	}
	salt, err := base64.StdEncoding.DecodeString(saltText)
	if err != nil {
		return false, fmt.Errorf("salt of a hashed name: %w", err)
	}
	sum, err := base64.StdEncoding.DecodeString(sumText)
	if err != nil {
		return false, fmt.Errorf("hashed name: %w", err)
	}
	mac := hmac.New(sha1.New, salt)
	mac.Write([]byte(name))
	return hmac.Equal(mac.Sum(nil), sum), nil
}

// matchPattern matches with "*" and "?", in time proportional to the product of
// the lengths.
func matchPattern(pattern, s string) bool {
	star, mark := -1, 0
	p, i := 0, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// addKnownHost writes a line for a new key into a known_hosts file, as
// add_host_to_hostfile in OpenSSH's hostfile.c does.
func addKnownHost(file, name string, key ssh.PublicKey, hashed bool) error {
	if hashed {
		name = xknownhosts.HashHostname(name)
	}
	if dir := filepath.Dir(file); filepath.Base(dir) == ".ssh" {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	line := name + " " + key.Type() + " " + base64.StdEncoding.EncodeToString(key.Marshal()) + "\n"
	if st, err := f.Stat(); err == nil && st.Mode().IsRegular() && st.Size() > 0 {
		last := make([]byte, 1)
		if _, err := f.ReadAt(last, st.Size()-1); err == nil && last[0] != '\n' {
			line = "\n" + line
		}
	}
	// In one write, so that lines of others do not get mixed with it.
	_, err = f.WriteString(line)
	return errors.Join(err, f.Close())
}
