// Package nix holds Nix's vocabulary: store paths, derivations, path infos,
// build results, store references and machines, with their parsers.
//
// It imports only the standard library, does no I/O of its own and holds no
// state. Names follow Nix's source (version 2.34.8 unless a comment says
// otherwise). The protocols that carry these values are in the packages below
// this one.
package nix
