package wire

// Limits on what a peer may send. They are far above anything real and small
// enough that a hostile peer cannot exhaust memory with one value.
const (
	// MaxStorePath is the longest store path in bytes: a store directory of
	// some 700 bytes and Nix's 33 + 211 bytes of hash and name.
	MaxStorePath = 1024

	// MaxPaths is the largest number of store paths in one list. The closure of
	// a large system is some ten thousand, all of a big binary cache's store
	// some hundred thousand.
	MaxPaths = 1 << 20

	// MaxReferences is the largest number of references of one path. The largest
	// seen are environments and system profiles with a few thousand.
	MaxReferences = 1 << 16

	// MaxToken is the longest signature, content address, hash, output name,
	// feature, system and the like, in bytes.
	MaxToken = 4096

	// MaxTokens is the largest number of signatures, outputs or features in one
	// list.
	MaxTokens = 4096

	// MaxRealisation is the longest realisation in JSON, in bytes; it lists the
	// realisations it depends on.
	MaxRealisation = 1 << 20

	// MaxText is how much of an error message or a log line is kept, in bytes.
	MaxText = 1 << 20

	// MaxSkipped is the longest error message or log line that is read at all, in
	// bytes. A builder may print anything, but a length beyond this is no text's.
	MaxSkipped = 1 << 30

	// MaxEnvironment is the longest argument or value of an environment variable
	// of a derivation, in bytes: "__json" and "passAsFile" variables can hold
	// whole files.
	MaxEnvironment = 64 << 20

	// MaxVariables is the largest number of arguments or environment variables
	// of a derivation.
	MaxVariables = 1 << 16
)
