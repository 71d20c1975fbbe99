package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"nixdispatch/deploy/fleet"
)

// Where the client sees the programs, and Debian has the hook that Nix brings.
const (
	programs      = "/opt/nix-dispatch"
	ourHook       = programs + "/nix-dispatch-hook"
	stockHook     = "/usr/libexec/nix/build-remote"
	benchPrograms = "/opt/bench" // bare and barehook
	bareHook      = benchPrograms + "/barehook"
)

// A machineConfig is one machine of a site.
type machineConfig struct {
	fleet.HostConfig
	scheme  string // "" for ssh
	columns string // of its line; "" for x86_64-linux with 4 slots
	// names is the number of lines that the machine has, each with a name of its own
	// and so a connection; 0 for one line with the machine's.
	names int
	// far makes the machine's line lead through a proxy with such a delay.
	far *fleet.ProxyConfig
}

// name is that by which the client reaches the machine.
func (m machineConfig) name() string {
	if m.far != nil {
		return "far-" + m.Name
	}
	return m.Name
}

func (m machineConfig) uri() string { return cmp.Or(m.scheme, "ssh") + "://root@" + m.name() }

// A siteConfig says what hosts a row needs.
type siteConfig struct {
	client   fleet.HostConfig // its name is "client"; Suite "" means trixie
	machines []machineConfig
	daemon   []string // nix-dispatchd's arguments
}

// A site is a client with a running nix-dispatchd, and its machines.
type site struct {
	b        *bench
	lines    int // of machines
	fleet    *fleet.Fleet
	client   *fleet.Host
	machines []*fleet.Host // as configured
	names    []string      // by which the client reaches them
	daemon   *exec.Cmd
	log      syncBuffer // of the daemon
	gone     chan struct{}
}

// plainMachines are n machines mac0, mac1... with 4 slots each, as cheap to build
// on as Nix allows: build users cost a machine two more processes for each build,
// as much as the rest of a build that does nothing, whichever hook it came from.
func plainMachines(n int) []machineConfig {
	out := make([]machineConfig, n)
	for i := range out {
		out[i].HostConfig = fleet.HostConfig{Name: fmt.Sprintf("mac%d", i), NixConf: "build-users-group =\n"}
	}
	return out
}

// newSite brings a site up. The caller must close it.
func (b *bench) newSite(ctx context.Context, cfg siteConfig) (_ *site, err error) {
	s := &site{b: b, machines: make([]*fleet.Host, len(cfg.machines))}
	if s.fleet, err = fleet.New(ctx, fleet.Options{}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	hosts, hostCtx := errgroup.WithContext(ctx)
	var lines, aliases strings.Builder
	for n, m := range cfg.machines {
		columns := cmp.Or(m.columns, "x86_64-linux - 4")
		if m.names == 0 {
			fmt.Fprintf(&lines, "%s %s\n", m.uri(), columns)
		}
		for alias := range m.names {
			fmt.Fprintf(&lines, "%s-%d %s\n", m.uri(), alias, columns)
			fmt.Fprintf(&aliases, "Host %s-%d\nHostName %s\nHostKeyAlias %s\n", m.Name, alias, m.Name, m.Name)
		}
		s.lines += max(1, m.names)
		s.names = append(s.names, m.name())
		hosts.Go(func() (err error) {
			s.machines[n], err = s.fleet.Host(hostCtx, m.HostConfig)
			return err
		})
	}
	client := cfg.client
	client.Name = "client"
	client.NixConf = "max-jobs = 0\n" + client.NixConf
	client.Binds = map[string]string{programs: b.bin, benchPrograms: b.own}
	hosts.Go(func() (err error) {
		s.client, err = s.fleet.Host(hostCtx, client)
		return err
	})
	if err := hosts.Wait(); err != nil {
		return nil, err
	}
	for n, m := range cfg.machines {
		if m.far != nil {
			if _, err := s.fleet.Far(ctx, m.name(), s.machines[n], *m.far); err != nil {
				return nil, err
			}
		}
	}
	if err := s.client.WriteFile("/etc/nix/machines", []byte(lines.String()), 0o644); err != nil {
		return nil, err
	}
	if err := s.client.WriteFile("/root/.ssh/config", []byte(aliases.String()), 0o600); err != nil {
		return nil, err
	}
	return s, s.startDaemon(ctx, cfg.daemon)
}

// startDaemon starts nix-dispatchd and waits until all machines are up.
func (s *site) startDaemon(ctx context.Context, args []string) error {
	s.daemon = s.client.Command(context.WithoutCancel(ctx), "root",
		append([]string{programs + "/nix-dispatchd", "--drain-timeout", "0s"}, args...)...)
	s.daemon.Stdout, s.daemon.Stderr = &s.log, &s.log
	if err := s.daemon.Start(); err != nil {
		return fmt.Errorf("start nix-dispatchd: %w", err)
	}
	s.gone = make(chan struct{})
	go func() {
		_ = s.daemon.Wait() // how it ended is in its log
		close(s.gone)
	}()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		st, err := s.status(ctx)
		if err == nil && st.up() == s.lines {
			return nil
		}
		select {
		case <-s.gone:
			return fmt.Errorf("nix-dispatchd ended:\n%s", s.log.String())
		case <-ctx.Done():
			return fmt.Errorf("not all machines are up: %w (%+v)\n%s", errors.Join(ctx.Err(), err), st, s.log.String())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// close ends the daemon and removes the hosts.
func (s *site) close() error {
	var errs []error
	if s.gone != nil {
		select {
		case <-s.gone:
		default:
			errs = append(errs, s.client.Signal(s.daemon, syscall.SIGKILL))
			<-s.gone
		}
	}
	return errors.Join(append(errs, s.fleet.Close())...)
}

// A status is what nix-dispatch status --json prints.
type status struct {
	Machines []struct {
		URI, State     string
		Slots, Running int
	}
	Builds []struct{ Phase string }
}

func (st *status) up() (n int) {
	for _, m := range st.Machines {
		if m.State == "up" {
			n++
		}
	}
	return n
}

func (s *site) status(ctx context.Context) (status, error) {
	var st status
	out, err := s.client.Run(ctx, programs+"/nix-dispatch", "status", "--json")
	if err == nil {
		err = json.Unmarshal([]byte(out.Stdout), &st)
	}
	return st, err
}

// run runs a command on the client as root and returns what it printed, without
// white space around it.
func (s *site) run(ctx context.Context, argv ...string) (string, error) {
	out, err := s.client.Run(ctx, argv...)
	return strings.TrimSpace(out.Stdout), err
}

// hookOption makes a Nix command of root's use a hook, in a way that all versions
// heed.
func hookOption(hook string) []string { return []string{"--option", "build-hook", hook} }

// nixBuild builds an expression as root, without nix-daemon, and returns the time
// it took and the output paths.
func (s *site) nixBuild(ctx context.Context, expr string, args ...string) (time.Duration, []string, error) {
	return s.nixBuildAs(ctx, "root", expr, args...)
}

// nixBuildAs is nixBuild for a user; all but root need nix-daemon.
func (s *site) nixBuildAs(ctx context.Context, user, expr string, args ...string) (time.Duration, []string, error) {
	cmd := s.client.Command(ctx, user, append([]string{"nix-build", "--no-out-link", "-"}, args...)...)
	cmd.Stdin = strings.NewReader(expr)
	var stdout, stderr syncBuffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	started := time.Now()
	err := cmd.Run()
	took := time.Since(started)
	if err != nil {
		return took, nil, fmt.Errorf("nix-build: %w\n%s", err, tail(stderr.String(), 2000))
	}
	return took, strings.Fields(stdout.String()), nil
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// A syncBuffer may be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
