// Package hook speaks the build-hook protocol from the hook's side: it reads
// what Nix says on the hook's standard input ([Reader]) and writes replies and
// log messages for the hook's standard error ([Log]).
//
// One conversation is: settings, then any number of try, each answered by
// exactly one reply; after an accepting reply the inputs and wanted outputs,
// then the end of the input.
//
// It follows src/libstore/unix/build/hook-instance.cc, tryBuildHook in
// src/libstore/build/derivation-building-goal.cc and src/libutil/logging.cc of
// Nix 2.34.8; 2.8.0 and 2.26.3 speak the same.
package hook
