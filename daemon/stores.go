package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"

	"nixdispatch/proto/nix"
)

// maxStores bounds how many stores beside its own a daemon knows at a time.
const maxStores = 64

// errForeignStore says that a request is about a store that the daemon does not
// serve.
var errForeignStore = errors.New("is not a store that this daemon serves")

// stores are the stores of this host that the daemon serves: its own, and if it is
// a user's, whichever a request names. Safe for concurrent use.
type stores struct {
	own *localStore
	log *slog.Logger
	// any is set where requests may name other stores. socket is then the daemon's.
	any    bool
	socket string

	mu    sync.Mutex
	named []*localStore // the one used last comes last
}

// newStores makes the stores of a daemon. System-wide, its own store is the one
// behind nix-daemon's socket; a user's is that which Nix would take.
func newStores(opts Options) (*stores, error) {
	host := nix.ThisStoreHost(os.Getenv)
	uri := os.Getenv("NIX_REMOTE")
	if !opts.PerUser {
		uri = "auto" // root's NIX_REMOTE is for its other commands
		host.Writable = func(string) bool { return false }
		host.Exists = func(string) bool { return true } // it may come later
	}
	where, err := nix.FindLocalStore(uri, host)
	if err != nil {
		return nil, fmt.Errorf("NIX_REMOTE: %w", err)
	}
	s := &stores{own: newLocalStore(where), log: opts.Logger, any: opts.PerUser, socket: opts.Socket}
	return s, nil
}

// checkedStore is the store that no build may find on a machine; nil if builds may
// be about several, which are looked at one by one.
func (d *Daemon) checkedStore() *localStore {
	if d.opts.PerUser {
		return nil
	}
	return d.stores.own
}

// callersStore is the store that Nix takes in this process's environment.
func callersStore() (*localStore, error) {
	s, err := newStores(Options{PerUser: true})
	if err != nil {
		return nil, err
	}
	return s.own, nil
}

// find returns the store that a request means by the store setting and the
// nix.StoreVariables of its Nix; without either, the daemon's own. The error is
// errForeignStore.
func (s *stores) find(uri string, environment []string) (*localStore, error) {
	if uri == "" && len(environment) == 0 {
		return s.own, nil
	}
	vars := storeVariables(environment)
	where, err := nix.FindLocalStore(uri, nix.ThisStoreHost(func(name string) string { return vars[name] }))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%q %w: %w", uri, errForeignStore, err)
	case where.Same(s.own.LocalStore):
		return s.own, nil
	case !s.any:
		return nil, fmt.Errorf("the store at %s %w, which is the one at %s; a daemon of your own (nix-dispatchd --user) serves others",
			where.RealDir, errForeignStore, s.own.RealDir)
	}
	return s.other(uri, where, vars), nil
}

// storeVariables are those of the variables of a request's environment that say
// where its store is.
func storeVariables(environment []string) map[string]string {
	vars := make(map[string]string)
	for _, variable := range environment {
		name, value, _ := strings.Cut(variable, "=")
		if slices.Contains(nix.StoreVariables, name) && !strings.Contains(value, "\x00") {
			vars[name] = value
		}
	}
	return vars
}

// other returns a store that is not the daemon's own. The one that was used
// longest ago makes room: builds that go by it keep it to their end.
func (s *stores) other(uri string, where nix.LocalStore, vars map[string]string) *localStore {
	env := s.environment(vars)
	key := fmt.Sprintf("%q %q", where, env)
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.IndexFunc(s.named, func(l *localStore) bool { return l.key == key }); i >= 0 {
		l := s.named[i]
		s.named = append(slices.Delete(s.named, i, i+1), l)
		return l
	}
	if len(s.named) == maxStores {
		go s.named[0].idle.close() // ends children, which is soon done
		s.named = slices.Delete(s.named, 0, 1)
	}
	l := newLocalStore(where)
	l.key, l.env = key, env
	if uri != "" {
		l.daemonArgs = append(l.daemonArgs, "--store", uri)
	}
	s.named = append(s.named, l)
	s.log.Info("store named by a request", "store", where.RealDir)
	return l
}

// environment is that of a nix-daemon for a store. Its own hooks come to this
// daemon.
func (s *stores) environment(vars map[string]string) []string {
	env := slices.DeleteFunc(os.Environ(), func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		return slices.Contains(nix.StoreVariables, name) || name == "NIX_REMOTE"
	})
	for _, name := range nix.StoreVariables {
		if vars[name] != "" {
			env = append(env, name+"="+vars[name])
		}
	}
	return append(env, "NIX_DISPATCH_SOCKET="+s.socket)
}

// close ends idle connections, now and later.
func (s *stores) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range append(s.named, s.own) {
		l.idle.close()
	}
}
