package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"nixdispatch/deploy/fleet"
)

func (in *invocation) prepare(ctx context.Context, args []string) error {
	systemd := in.flags.Bool("systemd", false, "also for hosts with systemd")
	suites, err := in.parseMixed(args, 0, "")
	if err != nil {
		return err
	}
	if err := fleet.EnsureTools(ctx, in.log); err != nil {
		return err
	}
	if *systemd {
		return fleet.PrepareSystemd(ctx, in.log, suites...)
	}
	return fleet.Prepare(ctx, in.log, suites...)
}

func (in *invocation) up(ctx context.Context, args []string) error {
	var config fleet.HostConfig
	var binds, env, features words
	in.flags.StringVar(&config.Suite, "suite", fleet.Trixie, "bookworm, trixie or sid")
	in.flags.StringVar(&config.NixConf, "nix-conf", "", "further `LINES` of nix.conf")
	in.flags.StringVar(&config.SSHDConfig, "sshd-config", "", "further `LINES` of sshd_config")
	in.flags.BoolVar(&config.NixTrusted, "trusted", false, "make the user nix a trusted user")
	in.flags.BoolVar(&config.NoDaemon, "no-daemon", false, "do not start nix-daemon")
	in.flags.BoolVar(&config.Systemd, "systemd", false, "systemd is process 1, and nix-daemon its service")
	in.flags.Var(&features, "feature", "a system `FEATURE`; repeat for more")
	in.flags.Var(&env, "daemon-env", "`NAME=VALUE` for nix-daemon's environment; repeat for more")
	in.flags.Var(&binds, "bind", "`PATH=HERE`: show the directory HERE read-only at PATH; repeat for more")
	names, err := in.parseMixed(args, 1, "a host name")
	if err != nil {
		return err
	}
	config.SystemFeatures, config.NixDaemon.Env = features, env
	config.Binds = map[string]string{}
	for _, bind := range binds {
		to, from, ok := strings.Cut(bind, "=")
		if !ok || !strings.HasPrefix(to, "/") || !strings.HasPrefix(from, "/") {
			fmt.Fprintf(in.stderr, "fleet up: --bind %q: want /path/in/host=/path/here\n", bind)
			return errUsage
		}
		config.Binds[to] = from
	}
	f, err := fleet.Open(ctx, in.fleet, in.log)
	if errors.Is(err, fleet.ErrNoFleet) {
		f, err = fleet.New(ctx, fleet.Options{Name: in.fleet, Detached: true, Log: in.log})
	}
	if err != nil {
		return err
	}
	for _, name := range names {
		config.Name = name
		started := time.Now()
		h, err := f.Host(ctx, config)
		if err != nil {
			return errors.Join(err, f.Release())
		}
		fmt.Fprintf(in.stdout, "%s: %s, Nix %s, up in %.1f s\n", name, h.Addr(), h.NixVersion(), time.Since(started).Seconds())
	}
	return f.Release()
}

// run does not open the fleet, so that others can meanwhile.
func (in *invocation) run(ctx context.Context, args []string) error {
	user := in.flags.String("user", "root", "root, alice, bob or nix")
	words, err := in.parse(args, 2, "a host and a command")
	if err != nil {
		return err
	}
	f, err := fleet.Peek(in.fleet)
	if err != nil {
		return err
	}
	h := f.Lookup(words[0])
	if h == nil {
		return fmt.Errorf("fleet %s has no host %q", in.fleet, words[0])
	}
	cmd := h.Command(context.WithoutCancel(ctx), *user, words[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, in.stdout, in.stderr
	if term := os.Getenv("TERM"); term != "" {
		cmd.Env = append(cmd.Env, "TERM="+term)
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	// From a terminal ^C reaches the program as well; a kill reaches only us.
	stop := context.AfterFunc(ctx, func() { h.Signal(cmd, syscall.SIGTERM) }) //nolint:errcheck
	defer stop()
	return cmd.Wait()
}

// open opens the fleet for a command that changes it.
func (in *invocation) open(ctx context.Context) (*fleet.Fleet, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return fleet.Open(ctx, in.fleet, in.log)
}

// each makes a command that does one thing to every host named.
func (in *invocation) each(do func(*fleet.Host, context.Context) error) func(context.Context, []string) error {
	return func(ctx context.Context, args []string) error {
		names, err := in.parseMixed(args, 1, "a host")
		if err != nil {
			return err
		}
		f, err := in.open(ctx)
		if err != nil {
			return err
		}
		var errs []error
		for _, name := range names {
			if h := f.Lookup(name); h == nil {
				errs = append(errs, fmt.Errorf("fleet %s has no host %q", in.fleet, name))
			} else {
				errs = append(errs, do(h, ctx))
			}
		}
		return errors.Join(append(errs, f.Release())...)
	}
}

func (in *invocation) remove(ctx context.Context, args []string) error {
	return in.each((*fleet.Host).Remove)(ctx, args)
}

func (in *invocation) list(_ context.Context, args []string) error {
	if _, err := in.parseMixed(args, 0, ""); err != nil {
		return err
	}
	names, err := fleet.List()
	if err != nil {
		return err
	}
	for _, name := range names {
		f, err := fleet.Peek(name)
		if errors.Is(err, fleet.ErrNoFleet) {
			continue // it is being made or removed
		}
		if err != nil {
			return err
		}
		fmt.Fprintf(in.stdout, "%s\n", name)
		for _, h := range f.Hosts() {
			fmt.Fprintf(in.stdout, "  %-16s %-13s %-9s Nix %-8s %s\n", h.Name(), h.Addr(), h.Suite(), h.NixVersion(), h.State())
		}
	}
	return nil
}

func (in *invocation) down(ctx context.Context, args []string) error {
	if _, err := in.parseMixed(args, 0, ""); err != nil {
		return err
	}
	f, err := in.open(ctx)
	if err != nil {
		return err
	}
	return f.Close()
}

func (in *invocation) reap(ctx context.Context, args []string) error {
	if _, err := in.parseMixed(args, 0, ""); err != nil {
		return err
	}
	return fleet.Reap(ctx, in.log)
}

// proxyFlags are the flags of far and proxy.
func (in *invocation) proxyFlags() *fleet.ProxyConfig {
	config := &fleet.ProxyConfig{}
	in.flags.DurationVar(&config.Delay, "delay", 25*time.Millisecond, "time each way, half a round trip")
	in.flags.Int64Var(&config.BytesPerSecond, "rate", 0, "bytes per second each way; 0: no bound")
	return config
}

func (in *invocation) far(ctx context.Context, args []string) error {
	config := in.proxyFlags()
	words, err := in.parseMixed(args, 2, "a new name and a host")
	if err != nil {
		return err
	}
	f, err := in.open(ctx)
	if err != nil {
		return err
	}
	h := f.Lookup(words[1])
	if h == nil {
		return errors.Join(fmt.Errorf("fleet %s has no host %q", in.fleet, words[1]), f.Release())
	}
	p, err := f.Far(ctx, words[0], h, *config)
	if err != nil {
		return errors.Join(err, f.Release())
	}
	// The fleet stays usable for others while the proxy runs.
	if err := f.Release(); err != nil {
		return err
	}
	fmt.Fprintf(in.stdout, "%s is %s, %v away each way\n", words[0], words[1], config.Delay)
	<-ctx.Done()
	return p.Close()
}

func (in *invocation) proxy(ctx context.Context, args []string) error {
	config := in.proxyFlags()
	listen := in.flags.String("listen", "127.0.0.1:0", "`ADDRESS:PORT` to accept connections on")
	to := in.flags.String("to", "", "`ADDRESS:PORT` to connect them with")
	if _, err := in.parseMixed(args, 0, ""); err != nil {
		return err
	}
	if *to == "" {
		fmt.Fprintln(in.stderr, "fleet proxy: want --to ADDRESS:PORT")
		return errUsage
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	p := fleet.NewProxy(l, func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", *to)
	}, *config)
	fmt.Fprintf(in.stdout, "listening on %s\n", p.Addr())
	<-ctx.Done()
	return p.Close()
}
