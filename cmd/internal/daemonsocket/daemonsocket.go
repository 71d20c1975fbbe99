// Package daemonsocket says where clients find nix-dispatchd.
package daemonsocket

import (
	"os"
	"strconv"
	"syscall"
)

const (
	// Default is where the daemon listens unless told otherwise.
	Default = "/run/nix-dispatch/socket"
	// Env is the environment variable that names another socket.
	Env = "NIX_DISPATCH_SOCKET"
	// below is where a user's own daemon listens, in the user's runtime directory.
	below = "/nix-dispatch/socket"
)

// Path is the socket to use unless the command line names one: the one that the
// environment names, that of the user's own daemon if there is one, or the
// system's.
func Path() string {
	if path := os.Getenv(Env); path != "" {
		return path
	}
	if path := User(); path != "" && owned(path) {
		return path
	}
	return Default
}

// User is where this user's own daemon listens unless told otherwise; "" if the
// user has no runtime directory.
func User() string {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		dir = "/run/user/" + strconv.Itoa(os.Getuid())
	}
	if !owned(dir) {
		return ""
	}
	return dir + below
}

// owned tells whether a file is there and this user's: what another user has put
// there is nothing to go by.
func owned(path string) bool {
	var st syscall.Stat_t
	return syscall.Stat(path, &st) == nil && int(st.Uid) == os.Geteuid()
}
