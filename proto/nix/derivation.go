package nix

import "strings"

// A DerivationOutput is one output as the derivation declares it. The three
// fields are exactly those of the derivation's ATerm form and of the wire:
//
//	input-addressed   path    ""           ""
//	fixed             path    "r:sha256"   hexadecimal hash
//	floating          ""      "r:sha256"   ""
//	deferred          ""      ""           ""
//	impure            ""      "r:sha256"   "impure"
type DerivationOutput struct {
	Path     StorePath
	HashAlgo string
	Hash     string
}

// An OutputKind is the way an output gets its path.
type OutputKind int

// The kinds of outputs (src/libstore/derivations.cc).
const (
	InputAddressed OutputKind = iota
	Fixed
	Floating
	Deferred
	Impure
)

// Kind tells how the output gets its path.
func (o DerivationOutput) Kind() OutputKind {
	switch {
	case o.Hash == "impure":
		return Impure
	case o.Path != "" && o.HashAlgo != "":
		return Fixed
	case o.Path != "":
		return InputAddressed
	case o.HashAlgo != "":
		return Floating
	default:
		return Deferred
	}
}

// ContentAddress is the content address that a fixed output must have, as a store
// tells it, "" for other outputs. Hashes other than SHA-256 are in hexadecimal,
// which stores take as well.
func (o DerivationOutput) ContentAddress() string {
	if o.Kind() != Fixed {
		return ""
	}
	hash := o.Hash
	if h, err := ParseNarHash(hash); err == nil && strings.HasSuffix(o.HashAlgo, "sha256") {
		hash = h.Base32()
	}
	if strings.HasPrefix(o.HashAlgo, "text:") {
		return o.HashAlgo + ":" + hash
	}
	return "fixed:" + o.HashAlgo + ":" + hash
}

// A BasicDerivation is a derivation without its input derivations: all that a
// store needs to run the build once the inputs are valid.
type BasicDerivation struct {
	// Outputs are keyed by output name.
	Outputs   map[string]DerivationOutput
	InputSrcs []StorePath
	// Platform is the system the build needs, such as "x86_64-linux", or "builtin".
	Platform string
	Builder  string
	Args     []string
	// Env holds the environment; structured attributes travel in "__json".
	Env map[string]string
}

// A Derivation is a parsed .drv file.
type Derivation struct {
	BasicDerivation
	// InputDrvs maps input derivations to the names of the outputs needed.
	InputDrvs map[StorePath][]string
}
