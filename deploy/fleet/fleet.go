package fleet

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"

	"golang.org/x/crypto/ssh"
)

// Options say how a fleet is made. The zero value is ready to use.
type Options struct {
	// Name is the fleet's directory below CacheDir()/run: lower-case letters,
	// digits and dashes. Empty: a name nobody else has.
	Name string

	// Detached leaves the hosts running when this process ends; Open finds the
	// fleet again. Otherwise everything in it is killed with this process, however
	// that ends.
	Detached bool

	// Log gets progress. Nil: nothing is logged.
	Log *slog.Logger
}

// A Fleet is some hosts on one network. Its methods and those of its hosts may be
// called concurrently. The owner closes it.
type Fleet struct {
	name     string
	dir      string
	detached bool
	log      *slog.Logger
	unlock   func() // releases the lock that says the fleet has an owner
	starter  *starter

	clientKey keyPair // of root and alice on every host
	network   process // holds the network namespace with the bridge

	proxiesMu sync.Mutex // guards proxies
	proxies   []*Proxy

	hostsMu sync.Mutex // guards the fields below
	hosts   map[string]*Host
	far     map[string]farName // further names in /etc/hosts
}

// A keyPair is an Ed25519 key in the files' own forms.
type keyPair struct {
	Private string // OpenSSH PEM
	Public  string // "ssh-ed25519 AAAA..."
}

// farName is a name whose address leads to Host through a proxy.
type farName struct {
	Index int
	Host  string
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

var nameForm = regexp.MustCompile(`^[a-z][a-z0-9-]{0,40}$`)

// New makes a fleet with no hosts. It needs root. What fleets of dead owners left
// behind is removed first.
func New(ctx context.Context, opts Options) (*Fleet, error) {
	if err := Available(); err != nil {
		return nil, fmt.Errorf("make a fleet: %w", err)
	}
	log := opts.Log
	if log == nil {
		log = discard()
	}
	err := ensureTools(ctx, log, runTools)
	if err != nil {
		return nil, fmt.Errorf("make a fleet: %w", err)
	}
	if err := Reap(ctx, log); err != nil {
		log.Warn("a dead fleet could not be removed", "err", err)
	}
	f := &Fleet{
		detached: opts.Detached, log: log,
		hosts: map[string]*Host{}, far: map[string]farName{},
	}
	if f.clientKey, err = newKeyPair(); err != nil {
		return nil, err
	}
	if err := f.makeDir(ctx, opts.Name); err != nil {
		return nil, fmt.Errorf("make a fleet: %w", err)
	}
	f.starter = newStarter(opts.Detached)
	if err := f.makeNetwork(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("make fleet %s: %w", f.name, err), f.Close())
	}
	if err := f.save(); err != nil {
		return nil, errors.Join(fmt.Errorf("make fleet %s: %w", f.name, err), f.Close())
	}
	return f, nil
}

// makeDir makes the fleet's directory and takes its owner's lock, as one step
// for other processes' Reap.
func (f *Fleet) makeDir(ctx context.Context, name string) error {
	if name != "" && !nameForm.MatchString(name) {
		return fmt.Errorf("fleet name %q: want lower-case letters, digits and dashes", name)
	}
	run := runDir()
	if err := os.MkdirAll(run, 0o700); err != nil {
		return err
	}
	unlock, err := lockFile(ctx, run+".lock")
	if err != nil {
		return err
	}
	defer unlock()
	if name == "" {
		f.dir, err = os.MkdirTemp(run, fmt.Sprintf("p%d-", os.Getpid()))
	} else {
		f.dir = filepath.Join(run, name)
		err = os.Mkdir(f.dir, 0o700)
	}
	if err != nil {
		return err
	}
	f.name = filepath.Base(f.dir)
	f.unlock, err = tryLockFile(filepath.Join(f.dir, lockName))
	return err
}

func newKeyPair() (keyPair, error) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return keyPair{}, fmt.Errorf("make an SSH key: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		return keyPair{}, fmt.Errorf("make an SSH key: %w", err)
	}
	sshPublic, err := ssh.NewPublicKey(public)
	if err != nil {
		return keyPair{}, fmt.Errorf("make an SSH key: %w", err)
	}
	line := ssh.MarshalAuthorizedKey(sshPublic)
	return keyPair{Private: string(pem.EncodeToMemory(block)), Public: string(line[:len(line)-1])}, nil
}

// Name is the fleet's name, unique on this machine.
func (f *Fleet) Name() string { return f.name }

// Dir is the fleet's directory; it goes away with the fleet.
func (f *Fleet) Dir() string { return f.dir }

// ClientKey is the private SSH key, in OpenSSH's form, that root, alice and nix
// of every host accept. It is ~/.ssh/id_ed25519 of root and alice on every host.
func (f *Fleet) ClientKey() string { return f.clientKey.Private }

// Hosts are the fleet's hosts in the order of their addresses.
func (f *Fleet) Hosts() []*Host {
	f.hostsMu.Lock()
	defer f.hostsMu.Unlock()
	return slices.SortedFunc(maps.Values(f.hosts), func(a, b *Host) int { return cmp.Compare(a.index, b.index) })
}

// Lookup returns the host with this name, nil if there is none.
func (f *Fleet) Lookup(name string) *Host {
	f.hostsMu.Lock()
	defer f.hostsMu.Unlock()
	return f.hosts[name]
}

// Close kills every process of the fleet and removes all it made: hosts, proxies,
// namespaces, mounts, directories. Calling it again does nothing.
func (f *Fleet) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	f.proxiesMu.Lock()
	proxies := f.proxies
	f.proxies = nil
	f.proxiesMu.Unlock()
	var errs []error
	for _, p := range proxies {
		errs = append(errs, p.Close())
	}
	var wg sync.WaitGroup
	var errsMu sync.Mutex
	for _, h := range f.Hosts() {
		wg.Go(func() {
			err := h.Remove(ctx)
			errsMu.Lock()
			errs = append(errs, err)
			errsMu.Unlock()
		})
	}
	wg.Wait()
	errs = append(errs, killNetwork(ctx, f.network), os.RemoveAll(f.dir))
	if f.starter != nil {
		f.starter.close()
	}
	if f.unlock != nil {
		f.unlock()
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close fleet %s: %w", f.name, err)
	}
	return nil
}
