package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	lockName  = "lock"       // held by the fleet's owner, or by whoever changes a detached fleet
	stateName = "fleet.json" // a fleetState
)

func runDir() string { return filepath.Join(CacheDir(), "run") }

// fleetState is what Open needs to find a fleet again and Reap to remove it.
type fleetState struct {
	Detached  bool
	Owner     int // pid of the process that made it
	ClientKey keyPair
	Network   process
	Far       map[string]farName
	Hosts     []hostState
}

type hostState struct {
	Config  HostConfig
	Index   int
	Base    string
	Layer   string
	HostKey keyPair
	Init    process // zero when off
	Cut     bool
	Frozen  bool
}

// save writes the state next to the hosts, whole or not at all.
func (f *Fleet) save() error {
	f.hostsMu.Lock()
	defer f.hostsMu.Unlock()
	s := fleetState{
		Detached: f.detached, Owner: os.Getpid(), ClientKey: f.clientKey, Network: f.network,
		Far: f.far,
	}
	for _, h := range f.hosts {
		s.Hosts = append(s.Hosts, h.snapshot())
	}
	slices.SortFunc(s.Hosts, func(a, b hostState) int { return a.Index - b.Index })
	text, err := json.MarshalIndent(s, "", "\t")
	if err != nil {
		return fmt.Errorf("save the state of fleet %s: %w", f.name, err)
	}
	name := filepath.Join(f.dir, stateName)
	if err := os.WriteFile(name+".new", text, 0o600); err != nil {
		return fmt.Errorf("save the state of fleet %s: %w", f.name, err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		return fmt.Errorf("save the state of fleet %s: %w", f.name, err)
	}
	return nil
}

func readState(dir string) (fleetState, error) {
	var s fleetState
	text, err := os.ReadFile(filepath.Join(dir, stateName))
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, fmt.Errorf("%s: %w", filepath.Join(dir, stateName), err)
	}
	return s, nil
}

// ErrNoFleet says that no fleet has the name asked for.
var ErrNoFleet = errors.New("no such fleet")

// Open finds a detached fleet again. Until Release or Close nobody else can open
// it: Open waits for them until ctx ends.
func Open(ctx context.Context, name string, log *slog.Logger) (*Fleet, error) {
	f, err := load(name, log)
	if err != nil {
		return nil, err
	}
	unlock, err := lockFile(ctx, filepath.Join(f.dir, lockName))
	if err != nil {
		return nil, fmt.Errorf("open fleet %s: %w", name, err)
	}
	// It may have changed, or gone, while another had it.
	if f, err = load(name, log); err != nil {
		unlock()
		return nil, err
	}
	f.unlock = unlock
	f.starter = newStarter(true)
	return f, nil
}

// Peek finds any fleet, detached or not, to look at it and to run commands in its
// hosts. Only the owner may change it: a Fleet from Peek must not be closed and
// its hosts not be started, stopped or cut off.
func Peek(name string) (*Fleet, error) { return load(name, nil) }

func load(name string, log *slog.Logger) (*Fleet, error) {
	if !nameForm.MatchString(name) {
		return nil, fmt.Errorf("fleet %q: %w", name, ErrNoFleet)
	}
	dir := filepath.Join(runDir(), name)
	s, err := readState(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("fleet %q: %w", name, ErrNoFleet)
	}
	if err != nil {
		return nil, fmt.Errorf("open fleet %s: %w", name, err)
	}
	if log == nil {
		log = discard()
	}
	f := &Fleet{
		name: name, dir: dir, detached: s.Detached, log: log,
		clientKey: s.ClientKey, network: s.Network,
		hosts: map[string]*Host{}, far: s.Far,
	}
	if f.far == nil {
		f.far = map[string]farName{}
	}
	for _, hs := range s.Hosts {
		f.hosts[hs.Config.Name] = &Host{
			fleet: f, name: hs.Config.Name, index: hs.Index, base: hs.Base, layer: hs.Layer, key: hs.HostKey,
			dir:    f.hostDir(hs.Config.Name),
			config: hs.Config, init: hs.Init, cut: hs.Cut, frozen: hs.Frozen,
		}
	}
	return f, nil
}

// Release lets others open a detached fleet; its hosts keep running. The Fleet
// must not be used any more.
func (f *Fleet) Release() error {
	err := f.save()
	f.starter.close()
	f.unlock()
	return err
}

// List names the fleets of this machine.
func List() ([]string, error) {
	entries, err := os.ReadDir(runDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list fleets: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Reap removes what fleets left behind whose owner is dead, and detached fleets
// whose processes are (after a restart of this machine). New does it too.
func Reap(ctx context.Context, log *slog.Logger) error {
	names, err := List()
	if err != nil || len(names) == 0 {
		return err
	}
	unlock, err := lockFile(ctx, runDir()+".lock")
	if err != nil {
		return fmt.Errorf("remove dead fleets: %w", err)
	}
	defer unlock()
	var errs []error
	for _, name := range names {
		if err := reapOne(ctx, log, filepath.Join(runDir(), name)); err != nil {
			errs = append(errs, fmt.Errorf("remove dead fleet %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

func reapOne(ctx context.Context, log *slog.Logger, dir string) error {
	unlock, err := tryLockFile(filepath.Join(dir, lockName))
	if errors.Is(err, fs.ErrNotExist) || (err == nil && unlock == nil) {
		return nil // closed meanwhile, or its owner lives
	}
	if err != nil {
		return err
	}
	defer unlock()
	s, err := readState(dir)
	if err == nil && s.Detached && s.Network.alive() {
		return nil
	}
	log.Info("removing a dead fleet", "dir", dir)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, h := range s.Hosts {
		if err := killHost(ctx, h.Init); err != nil {
			return err
		}
	}
	if err := s.Network.signal(unix.SIGKILL); err != nil {
		return err
	}
	return errors.Join(removeTree(ctx, dir), removeCgroups(cgroupPrefix(dir)+"*"))
}

// removeTree removes a directory whose last users may just be dying.
func removeTree(ctx context.Context, dir string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var last error
	err := poll(ctx, "processes to let go of "+dir, func() (bool, error) {
		last = os.RemoveAll(dir)
		return last == nil, nil
	})
	return errors.Join(err, last)
}

// Available says why this process cannot make fleets, nil if it can.
func Available() error { return available() }

var available = sync.OnceValue(func() error {
	if os.Geteuid() != 0 {
		return errors.New("this needs root, for namespaces and mounts")
	}
	for _, ns := range []string{"mnt", "pid", "uts", "ipc", "net"} {
		if _, err := os.Stat("/proc/self/ns/" + ns); err != nil {
			return fmt.Errorf("this kernel has no %s namespaces", ns)
		}
	}
	if text, err := os.ReadFile("/proc/filesystems"); err != nil || !strings.Contains(string(text), "\toverlay\n") {
		return errors.New("this kernel has no overlay file system")
	}
	if err := checkCache(); err != nil {
		return err
	}
	return tryNamespaces()
})
