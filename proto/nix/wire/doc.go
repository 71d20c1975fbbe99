// Package wire reads and writes the encoding that Nix's serve, worker and
// build-hook protocols share: 64-bit little-endian integers, padded strings,
// lists, store paths, the composite values made of them, and framed streams.
//
// A [Reader] trusts nothing: everything of variable length has a limit, and a
// length above it is an error before anything of that size is allocated. Below
// the limit memory grows with the bytes that arrive, not with the length that
// was announced. Data above its limit is refused with [ErrTooLong]; prose, such
// as log lines and error messages, is cut instead (see [Reader.Text]), because
// a long line is not the peer's fault.
//
// Both types keep their first error, like bufio.Writer: after it reads give
// zero values and writes do nothing, so a whole message is read or written
// first and the error asked for once ([Reader.Err], [Writer.Flush]). Every loop
// over a count from the wire must end when Err is not nil; the list readers here do.
// Neither type is safe for concurrent use.
//
// The encoding is that of Nix 2.34.8, src/libutil/serialise.cc, and of
// src/libstore/common-protocol.cc for composite values.
package wire
