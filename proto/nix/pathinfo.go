package nix

import "time"

// A PathInfo is what a store knows of a valid path (ValidPathInfo in
// src/libstore/path-info.hh).
type PathInfo struct {
	Path StorePath
	// Deriver is the derivation that made the path; "" if none is known.
	Deriver StorePath
	// NarHash is the SHA-256 of the path's NAR.
	NarHash NarHash
	// References are the store paths it refers to, itself among them if it does.
	References []StorePath
	// RegistrationTime is zero where the store does not tell it (serve protocol).
	RegistrationTime time.Time
	// NarSize is the length of the NAR in bytes.
	NarSize uint64
	// Ultimate is set on paths that the asked store built itself.
	Ultimate bool
	// Sigs are signatures of the form "keyname:base64".
	Sigs []string
	// CA is the content address, such as "fixed:r:sha256:…"; "" for
	// input-addressed paths.
	CA string
}
