// Package daemonsocket says where clients find nix-dispatchd.
package daemonsocket

import "os"

const (
	// Default is where the daemon listens unless told otherwise.
	Default = "/run/nix-dispatch/socket"
	// Env is the environment variable that names another socket.
	Env = "NIX_DISPATCH_SOCKET"
)

// Path is the socket to use unless the command line names one.
func Path() string {
	if path := os.Getenv(Env); path != "" {
		return path
	}
	return Default
}
