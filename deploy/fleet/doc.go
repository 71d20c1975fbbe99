// Package fleet makes real Nix machines on one Linux host: for tests, for
// benchmarks and to try things out.
//
// A host has its own root (an overlay on a Debian base root, made once), its own
// mount, pid, uts, ipc and network namespaces, a real sshd and a real nix-daemon,
// and is up in about a second. Debian's bookworm, trixie and sid carry an old, a
// middle and a new Nix. The hosts of a fleet share a bridge in one more network
// namespace: nothing is on the network of this machine, and nothing in a fleet
// reaches outside, so there are no substituters.
//
// In a test:
//
//	fleet.Require(t)
//	f, err := fleet.New(t.Context(), fleet.Options{})
//	...
//	t.Cleanup(func() { f.Close() })
//	client, err := f.Host(t.Context(), fleet.HostConfig{Name: "client"})
//	mac, err := f.Host(t.Context(), fleet.HostConfig{Name: "mac", Suite: fleet.Bookworm})
//	out, err := client.Run(t.Context(), "ssh", "mac", "nix-store", "--version")
//
// There is no nixpkgs, but with sandbox = false (the default here) a derivation
// builds with what Debian has:
//
//	derivation {
//	  name = "x"; system = "x86_64-linux"; builder = "/bin/sh";
//	  PATH = "/usr/bin:/bin"; args = [ "-c" "date > $out" ];
//	}
//
// Everything dies with the process that made the fleet, even by SIGKILL; what it
// leaves on disk the next New removes. Detached fleets (the fleet command's) stay
// until they are closed. It needs root.
package fleet
