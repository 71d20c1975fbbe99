package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"nixdispatch/proto/nix"
)

// This file compares what a machine's lines claim with what its own Nix says.

// maxConfig bounds what a machine says of its configuration, in bytes: Nix's own
// is below 100 KiB, with all descriptions.
const maxConfig = 1 << 20

// claims asks the machine's Nix for its systems and features. Where it does not
// say, as behind a forced command, they are not known.
func (p *probe) claims(ctx context.Context) {
	own, ok := p.askConfig(ctx)
	if !ok {
		p.done(stepClaims, "not known: the machine's Nix does not tell its systems and features")
		return
	}
	systems, features := claimed(p.lines)
	systems, features = lacking(systems, own.systems), lacking(features, own.features)
	warn := func(detail, fix string) {
		p.tell(ProbeStep{Name: stepClaims, Verdict: ProbeWarning, Took: p.took(), Cause: string(causeClaims), Detail: detail, Fix: fix})
	}
	if len(systems) > 0 {
		warn(fmt.Sprintf("its own Nix does not build for %s, which the list says (it does for %s)", list(systems), list(own.systems)),
			"take that out of the machine's line, or add it to extra-platforms in nix.conf there")
	}
	if len(features) > 0 {
		warn(fmt.Sprintf("its own Nix has no feature %s, which the list says, and fails such builds (it has %s)", list(features), list(own.features)),
			"take that out of the machine's line, or add it to system-features in nix.conf there")
	}
	if len(systems)+len(features) == 0 {
		p.done(stepClaims, "for %s, with %s: no less than the list says", list(own.systems), list(own.features))
	}
}

// list is words for a message.
func list(words []string) string {
	if len(words) == 0 {
		return "none"
	}
	return strings.Join(words, ", ")
}

// claimed is what lines say of a machine, together.
func claimed(lines []nix.Machine) (systems, features []string) {
	for _, line := range lines {
		systems = append(systems, line.SystemTypes...)
		features = append(features, line.SupportedFeatures...)
		features = append(features, line.MandatoryFeatures...)
	}
	return systems, features
}

// lacking are the words of claims that are not in own, each once.
func lacking(claims, own []string) []string {
	var missing []string
	for _, c := range claims {
		if !slices.Contains(own, c) && !slices.Contains(missing, c) {
			missing = append(missing, c)
		}
	}
	return missing
}

// An ownConfig is what a machine's Nix says it builds.
type ownConfig struct{ systems, features []string }

// askConfig runs "nix config show" on the machine, which is "nix show-config"
// before 2.20.
func (p *probe) askConfig(ctx context.Context) (ownConfig, bool) {
	program := "nix"
	if dir, _ := path.Split(p.m.program()); dir != "" {
		program = dir + "nix"
	}
	for _, words := range []string{"config show", "show-config"} {
		text, err := p.output(ctx, program+" --extra-experimental-features nix-command "+words+" --json")
		if err != nil {
			continue
		}
		if own, err := parseConfig(text); err == nil {
			return own, true
		}
	}
	return ownConfig{}, false
}

// output runs a command on the machine, with nothing to read, and returns what it
// prints if it ends well.
func (p *probe) output(ctx context.Context, command string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, min(p.limit(), askLimit))
	defer cancel()
	s, err := p.check.Session(ctx, command)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	defer context.AfterFunc(ctx, func() { _ = s.Close() })()
	_ = s.Stdin.Close()
	go io.Copy(io.Discard, s.Stderr) //nolint:errcheck // ends with the session
	text, err := io.ReadAll(io.LimitReader(s.Stdout, maxConfig+1))
	switch {
	case err != nil:
		return nil, err
	case len(text) > maxConfig:
		return nil, fmt.Errorf("more than %d bytes", maxConfig)
	default:
		return text, s.Wait()
	}
}

// parseConfig reads what "nix config show --json" prints. It is foreign text: what
// is not as expected is an error, and words are those that a machines file can have.
func parseConfig(text []byte) (ownConfig, error) {
	var settings struct {
		System         struct{ Value string }
		ExtraPlatforms struct{ Value []string } `json:"extra-platforms"`
		SystemFeatures struct{ Value []string } `json:"system-features"`
	}
	if err := json.Unmarshal(text, &settings); err != nil {
		return ownConfig{}, err
	}
	own := ownConfig{append([]string{settings.System.Value}, settings.ExtraPlatforms.Value...), settings.SystemFeatures.Value}
	for _, word := range slices.Concat(own.systems, own.features) {
		if word == "" || len(word) > 100 || strings.ContainsFunc(word, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return ownConfig{}, errors.New("a name in it is none")
		}
	}
	return own, nil
}
