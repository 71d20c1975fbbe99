// Package integration holds the tests of the whole program on real Nix machines:
// real nix-daemon, real sshd, real build hooks, each host in namespaces of its
// own (package fleet). They need root and are left out, or fail in CI, where
// there can be no fleet.
package integration
