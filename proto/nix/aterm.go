package nix

import (
	"errors"
	"fmt"
	"strings"
)

// MaxDerivationSize is the largest .drv file that [ParseDerivation] reads, in
// bytes. The largest ones in practice carry scripts and are a few megabytes.
const MaxDerivationSize = 64 << 20

// ErrDynamicDerivation is returned for derivations in the format of Nix's
// experimental dynamic derivations, DrvWithVersion("xp-dyn-drv",...).
var ErrDynamicDerivation = errors.New("dynamic derivations are not supported")

// ParseDerivation reads the contents of a .drv file. It is stricter than Nix
// only where Nix never writes such a file: commas must be there, nothing may
// follow the end, no name may come twice. The result shares no memory with data.
//
// The error is [ErrDynamicDerivation] for that kind of derivation. Anything
// else wrong is an error that tells the offset.
//
// See parseDerivation in src/libstore/derivations.cc.
func ParseDerivation(data []byte) (*Derivation, error) {
	if len(data) > MaxDerivationSize {
		return nil, fmt.Errorf("parse derivation: %d bytes are more than the %d allowed", len(data), MaxDerivationSize)
	}
	p := atermParser{text: string(data)}
	d := p.derivation()
	if p.err != nil {
		return nil, fmt.Errorf("parse derivation at byte %d: %w", p.pos, p.err)
	}
	if err := d.checkStructuredAttrs(); err != nil {
		return nil, fmt.Errorf("parse derivation: %w", err)
	}
	return d, nil
}

// An atermParser reads ATerm text. After the first error it reads nothing more,
// every method returns zero values, and pos stays where the error is.
type atermParser struct {
	text string
	pos  int
	err  error
}

func (p *atermParser) fail(format string, args ...any) {
	if p.err == nil {
		p.err = fmt.Errorf(format, args...)
	}
}

func (p *atermParser) rest() string { return p.text[p.pos:] }

func (p *atermParser) expect(s string) {
	if p.err != nil {
		return
	}
	if !strings.HasPrefix(p.rest(), s) {
		p.fail("expected %q, found %q", s, p.rest()[:min(len(s), len(p.rest()))])
		return
	}
	p.pos += len(s)
}

func (p *atermParser) derivation() *Derivation {
	if strings.HasPrefix(p.text, "DrvWithVersion(") {
		p.expect("DrvWithVersion(")
		if version := p.str(); version == "xp-dyn-drv" {
			p.err = ErrDynamicDerivation
		} else {
			p.fail("unknown format version %q", clip(version))
		}
		return nil
	}
	d := &Derivation{InputDrvs: map[StorePath][]string{}}
	d.Outputs, d.Env = map[string]DerivationOutput{}, map[string]string{}
	p.expect("Derive(")
	p.list(func() { p.output(d) })
	p.expect(",")
	p.list(func() { p.inputDrv(d) })
	p.expect(",")
	p.list(func() { d.InputSrcs = append(d.InputSrcs, p.path()) })
	p.expect(",")
	d.Platform = p.str()
	p.expect(",")
	d.Builder = p.str()
	p.expect(",")
	d.Args = p.strs()
	p.expect(",")
	p.list(func() { p.variable(d) })
	p.expect(")")
	if p.err == nil && p.rest() != "" {
		p.fail("%d bytes after the end", len(p.rest()))
	}
	return d
}

// list reads "[item,item]".
func (p *atermParser) list(item func()) {
	p.expect("[")
	if strings.HasPrefix(p.rest(), "]") {
		p.expect("]")
		return
	}
	for p.err == nil {
		item()
		if !strings.HasPrefix(p.rest(), ",") {
			break
		}
		p.expect(",")
	}
	p.expect("]")
}

func (p *atermParser) strs() []string {
	var s []string
	p.list(func() { s = append(s, p.str()) })
	return s
}

// str reads a string in double quotes. A backslash before n, r and t makes a
// control character and leaves any other byte as it is.
func (p *atermParser) str() string {
	p.expect(`"`)
	rest := p.rest()
	end := strings.IndexAny(rest, `"\`)
	if p.err == nil && end >= 0 && rest[end] == '"' {
		p.pos += end + 1
		return rest[:end] // nothing to unescape
	}
	var b strings.Builder
	for i := 0; i < len(rest) && p.err == nil; i++ {
		c := rest[i]
		if c == '"' {
			p.pos += i + 1
			return b.String()
		}
		if c == '\\' {
			if i++; i == len(rest) {
				break
			}
			c = unescape(rest[i])
		}
		b.WriteByte(c)
	}
	p.fail("string without end")
	return ""
}

func unescape(c byte) byte {
	switch c {
	case 'n':
		return '\n'
	case 'r':
		return '\r'
	case 't':
		return '\t'
	}
	return c
}

func (p *atermParser) path() StorePath {
	text := p.str()
	if p.err != nil {
		return ""
	}
	path, err := ParseStorePath(text)
	if err != nil {
		p.fail("%w", err)
	}
	return path
}

func (p *atermParser) output(d *Derivation) {
	p.expect("(")
	name := p.str()
	p.expect(",")
	path := p.str()
	p.expect(",")
	algo := p.str()
	p.expect(",")
	hash := p.str()
	p.expect(")")
	if p.err != nil {
		return
	}
	o, err := newOutput(path, algo, hash)
	if err == nil {
		err = checkOutputName(name)
	}
	if _, twice := d.Outputs[name]; err == nil && twice {
		err = errors.New("declared twice")
	}
	if err != nil {
		p.fail("output %q: %w", clip(name), err)
	}
	d.Outputs[name] = o
}

// newOutput checks that path, algorithm and hash make one of the kinds.
func newOutput(path, algo, hash string) (o DerivationOutput, err error) {
	o = DerivationOutput{HashAlgo: algo, Hash: hash}
	if path != "" {
		if o.Path, err = ParseStorePath(path); err != nil {
			return o, err
		}
	}
	switch {
	case algo == "" && hash != "":
		err = errors.New("hash without an algorithm")
	case algo != "" && (hash == "" || hash == "impure") && path != "":
		err = errors.New("path of an output whose path is not known before the build")
	case algo != "" && hash != "" && hash != "impure" && path == "":
		err = errors.New("fixed output without a path")
	}
	return o, err
}

// checkOutputName refuses what Nix's evaluator would: the name becomes a part
// of the output's store path.
func checkOutputName(name string) error {
	if name == "" {
		return errors.New("empty name")
	}
	return checkName(name)
}

func (p *atermParser) inputDrv(d *Derivation) {
	p.expect("(")
	path := p.path()
	p.expect(",")
	names := p.strs()
	p.expect(")")
	if p.err != nil {
		return
	}
	if _, twice := d.InputDrvs[path]; twice {
		p.fail("input derivation %q listed twice", path)
	}
	for _, name := range names {
		if err := checkOutputName(name); err != nil {
			p.fail("output %q of input derivation %q: %w", clip(name), path, err)
		}
	}
	d.InputDrvs[path] = names
}

func (p *atermParser) variable(d *Derivation) {
	p.expect("(")
	name := p.str()
	p.expect(",")
	value := p.str()
	p.expect(")")
	if p.err != nil {
		return
	}
	if _, twice := d.Env[name]; twice {
		p.fail("environment variable %q set twice", clip(name))
	}
	d.Env[name] = value
}
