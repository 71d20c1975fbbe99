package fleet

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// mirror is a place to install Debian from: the base URI of an archive and the
// keyring its Release files are checked with ("" for debootstrap's default).
type mirror struct {
	URI     string
	Keyring string
}

// hostMirror finds the Debian mirror this machine itself installs from. The
// environment variable NIX_DISPATCH_FLEET_MIRROR overrides it.
func hostMirror() (mirror, error) {
	if uri := os.Getenv("NIX_DISPATCH_FLEET_MIRROR"); uri != "" {
		return mirror{URI: uri, Keyring: defaultKeyring()}, nil
	}
	return mirrorFromSources("/etc/apt")
}

// mirrorFromSources reads sources.list and sources.list.d (one-line and deb822
// style, as sources.list(5) describes them) below dir.
func mirrorFromSources(dir string) (mirror, error) {
	names := []string{filepath.Join(dir, "sources.list")}
	for _, pattern := range []string{"*.sources", "*.list"} {
		more, err := filepath.Glob(filepath.Join(dir, "sources.list.d", pattern))
		if err != nil {
			return mirror{}, fmt.Errorf("list apt sources: %w", err)
		}
		names = append(names, more...)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		var found []aptSource
		if strings.HasSuffix(name, ".sources") {
			found = parseDeb822(string(text))
		} else {
			found = parseOneLine(string(text))
		}
		for _, s := range found {
			if s.isDebian() {
				keyring := s.SignedBy
				if keyring == "" {
					keyring = defaultKeyring()
				}
				return mirror{URI: s.URI, Keyring: keyring}, nil
			}
		}
	}
	return mirror{}, fmt.Errorf("the apt sources below %s have no Debian mirror: name one with NIX_DISPATCH_FLEET_MIRROR=URL", dir)
}

func defaultKeyring() string {
	const name = "/usr/share/keyrings/debian-archive-keyring.gpg"
	if _, err := os.Stat(name); err != nil {
		return ""
	}
	return name
}

// An aptSource is one URI with one suite, of one entry.
type aptSource struct {
	URI        string
	Suite      string
	Components []string
	SignedBy   string
}

// isDebian reports whether the source is the main archive of a Debian release,
// not its security or updates archive nor a third party's.
func (s aptSource) isDebian() bool {
	releases := []string{"bullseye", "bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable"}
	return slices.Contains(releases, s.Suite) && slices.Contains(s.Components, "main") &&
		(strings.HasPrefix(s.URI, "http://") || strings.HasPrefix(s.URI, "https://"))
}

func parseOneLine(text string) []aptSource {
	var out []aptSource
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		line, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok {
			continue
		}
		var s aptSource
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			options, rest, ok := strings.Cut(line[1:], "]")
			if !ok {
				continue
			}
			for option := range strings.FieldsSeq(options) {
				if v, ok := strings.CutPrefix(option, "signed-by="); ok && strings.HasPrefix(v, "/") {
					s.SignedBy = v
				}
			}
			line = rest
		}
		words := strings.Fields(line)
		if len(words) < 3 {
			continue
		}
		s.URI, s.Suite, s.Components = words[0], words[1], words[2:]
		out = append(out, s)
	}
	return out
}

func parseDeb822(text string) []aptSource {
	var out []aptSource
	fields := map[string]string{}
	end := func() {
		if fields["enabled"] != "no" && slices.Contains(strings.Fields(fields["types"]), "deb") {
			for uri := range strings.FieldsSeq(fields["uris"]) {
				for suite := range strings.FieldsSeq(fields["suites"]) {
					s := aptSource{URI: uri, Suite: suite, Components: strings.Fields(fields["components"])}
					if strings.HasPrefix(fields["signed-by"], "/") {
						s.SignedBy = fields["signed-by"]
					}
					out = append(out, s)
				}
			}
		}
		clear(fields)
	}
	last := ""
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		line := lines.Text()
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			end()
		case line[0] == ' ' || line[0] == '\t':
			fields[last] += " " + strings.TrimSpace(line)
		default:
			name, value, _ := strings.Cut(line, ":")
			last = strings.ToLower(name)
			fields[last] = strings.TrimSpace(value)
		}
	}
	end()
	return out
}
