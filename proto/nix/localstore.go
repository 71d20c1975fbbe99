package nix

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path"
	"syscall"
)

// DefaultStateDir is the state directory of practically every Nix installation.
const DefaultStateDir = "/nix/var/nix"

// StoreVariables are the environment variables that say where a store is and how
// it is configured. None of them holds anything secret.
var StoreVariables = []string{
	"NIX_STORE_DIR", "NIX_STORE", "NIX_STATE_DIR", "NIX_LOG_DIR", "NIX_CONF_DIR", "NIX_USER_CONF_FILES",
	"NIX_DAEMON_SOCKET_PATH", "NIX_DATA_HOME", "XDG_DATA_HOME",
}

// A LocalStore is where a store of this host is, as a Nix process finds it from
// the store setting and its environment.
type LocalStore struct {
	// Dir is the store directory as store paths have it.
	Dir string
	// RealDir is that directory in the file system.
	RealDir string
	// StateDir holds the store's database.
	StateDir string
	// Socket is the nix-daemon's through which the store is used; "" if Nix opens
	// it itself.
	Socket string
}

// A StoreHost is what of a host and a process tells where a store is.
type StoreHost struct {
	Getenv func(string) string
	// Exists tells whether there is a file, Writable whether it can be changed.
	Exists, Writable func(name string) bool
	Root             bool
	Home             string
}

// ThisStoreHost is this host as a process of this user with some environment sees
// it.
func ThisStoreHost(getenv func(string) string) StoreHost {
	home, _ := os.UserHomeDir() // without one, nothing is in it
	const readWrite = 4 | 2     // R_OK and W_OK of access(2)
	return StoreHost{
		Getenv:   getenv,
		Exists:   func(name string) bool { _, err := os.Stat(name); return err == nil },
		Writable: func(name string) bool { return syscall.Access(name, readWrite) == nil },
		Root:     os.Geteuid() == 0,
		Home:     home,
	}
}

// StoreEnvironment are those of the variables that are set, each as NAME=VALUE.
func StoreEnvironment(getenv func(string) string) []string {
	var vars []string
	for _, name := range StoreVariables {
		if value := getenv(name); value != "" {
			vars = append(vars, name+"="+value)
		}
	}
	return vars
}

// ErrNotLocal says that a store is not one of this host, or of a kind that only
// Nix itself can find.
var ErrNotLocal = errors.New("not a store of this host")

// FindLocalStore says where the store is that the store setting, a URI, means; ""
// is "auto". It returns [ErrNotLocal]
// for stores of other kinds.
//
// See LocalFSStoreConfig in src/libstore/include/nix/store/local-fs-store.hh and
// resolveStoreConfig in src/libstore/store-registration.cc (Nix 2.34.8).
func FindLocalStore(uri string, h StoreHost) (LocalStore, error) {
	ref, err := ParseStoreReference(cmp.Or(uri, "auto"))
	if err != nil {
		return LocalStore{}, err
	}
	state := path.Clean(cmp.Or(h.Getenv("NIX_STATE_DIR"), DefaultStateDir))
	socket := cmp.Or(h.Getenv("NIX_DAEMON_SOCKET_PATH"), state+"/daemon-socket/socket")
	switch ref.Scheme {
	case "local":
		return h.at(ref, cmp.Or(ref.Params["root"], ref.Path)), nil
	case "daemon":
		s := h.at(ref, "")
		s.Socket = socket
		return s, nil
	case "unix":
		s := h.at(ref, ref.Params["root"])
		s.Socket = cmp.Or(ref.Path, socket)
		return s, nil
	case "auto":
		return h.auto(ref, socket), nil
	default:
		return LocalStore{}, fmt.Errorf("store %q: %w", ref, ErrNotLocal)
	}
}

// at is a store below a directory; "" is the root directory, but for the places
// that the environment names.
func (h StoreHost) at(ref StoreReference, root string) LocalStore {
	p := ref.Params
	var s LocalStore
	s.Dir = path.Clean(cmp.Or(p["store"], h.Getenv("NIX_STORE_DIR"), h.Getenv("NIX_STORE"), DefaultStoreDir))
	s.RealDir, s.StateDir = s.Dir, cmp.Or(h.Getenv("NIX_STATE_DIR"), DefaultStateDir)
	if root != "" {
		s.RealDir, s.StateDir = root+DefaultStoreDir, root+DefaultStateDir
	}
	s.RealDir = path.Clean(cmp.Or(p["real"], s.RealDir))
	s.StateDir = path.Clean(cmp.Or(p["state"], s.StateDir))
	return s
}

// auto is the store that Nix uses when it is told of none: the usual one if it
// can be written to, else nix-daemon's, else one in the user's home.
func (h StoreHost) auto(ref StoreReference, socket string) LocalStore {
	s := h.at(ref, ref.Params["root"])
	switch {
	case h.Writable(s.StateDir):
	case h.Exists(socket):
		s.Socket = socket
	case !h.Exists(s.StateDir) && len(ref.Params) == 0 && !h.Root &&
		h.Getenv("NIX_STORE_DIR") == "" && h.Getenv("NIX_STATE_DIR") == "":
		data := cmp.Or(h.Getenv("NIX_DATA_HOME"), cmp.Or(h.Getenv("XDG_DATA_HOME"), h.Home+"/.local/share")+"/nix")
		return h.at(ref, data+"/root")
	}
	return s
}

// Real is where a path of the store is in the file system.
func (s LocalStore) Real(p StorePath) string { return s.RealDir + "/" + p.Base() }

// Same tells whether both are one store, whichever way it is used.
func (s LocalStore) Same(other LocalStore) bool {
	if s.Socket != "" && other.Socket != "" {
		return s.Socket == other.Socket
	}
	s.Socket, other.Socket = "", ""
	return s == other
}
