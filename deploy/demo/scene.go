package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"nixdispatch/deploy/fleet"
)

// programs is where the client sees the programs.
const programs = "/opt/nix-dispatch"

// A machine is one line of the client's machines file.
type machine struct {
	name, suite, uri, columns string
	host                      *fleet.Host
}

// The machines are of every Nix there is and of both protocols.
func machines() []*machine {
	return []*machine{
		{name: "scratchy", suite: fleet.Bookworm, uri: "ssh://scratchy", columns: "x86_64-linux - 2"},
		{name: "itchy", suite: fleet.Trixie, uri: "ssh-ng://root@itchy", columns: "x86_64-linux - 2"},
		{name: "poochie", suite: fleet.Sid, uri: "ssh://nix@poochie", columns: "x86_64-linux - 2 1 big"},
	}
}

// A scene is the demo in progress.
type scene struct {
	fleet    *fleet.Fleet
	bin      string
	out      io.Writer
	client   *fleet.Host
	machines []*machine

	address   string // of the page, on this machine
	daemon    *exec.Cmd
	daemonLog syncBuffer

	result  string            // output path of the last derivation
	took    time.Duration     // of the build
	paths   []string          // output paths of all derivations
	builtOn map[string]string // host name by derivation
}

// say prints a heading.
func (s *scene) say(format string, args ...any) {
	fmt.Fprintf(s.out, "\n== %s\n", fmt.Sprintf(format, args...))
}

// shell shows a command as a person would type it on the client, and runs it.
func (s *scene) shell(ctx context.Context, user, command string) (string, error) {
	prompt := map[bool]string{true: "#", false: "$"}[user == "root"]
	fmt.Fprintf(s.out, "%s@client%s %s\n", user, prompt, command)
	out, err := s.client.RunAs(ctx, user, "sh", "-c", "PATH=$PATH:"+programs+"; "+command)
	io.WriteString(s.out, out.Stdout)
	return out.Stdout, err
}

// bringUp makes the hosts and switches nix-dispatch on, as the README says for
// a client of Nix 2.26.
func (s *scene) bringUp(ctx context.Context) error {
	s.say("A client and three machines, each with its own root, network, sshd and nix-daemon")
	s.machines = machines()
	g, hostCtx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		s.client, err = s.fleet.Host(hostCtx, fleet.HostConfig{
			Name: "client", Suite: fleet.Trixie, NixConf: "max-jobs = 0\n",
			NixDaemon: fleet.NixDaemon{Env: []string{"NIX_CONFIG=build-hook = " + programs + "/nix-dispatch hook"}},
			Binds:     map[string]string{programs: s.bin},
		})
		return err
	})
	for _, m := range s.machines {
		g.Go(func() (err error) {
			m.host, err = s.fleet.Host(hostCtx, fleet.HostConfig{
				Name: m.name, Suite: m.suite, NixTrusted: true, SystemFeatures: []string{"big"},
			})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	var file strings.Builder
	for _, m := range s.machines {
		fmt.Fprintf(&file, "%s %s\n", m.uri, m.columns)
	}
	for _, h := range s.fleet.Hosts() {
		fmt.Fprintf(s.out, "%-9s %-13s Nix %s\n", h.Name(), h.Addr(), h.NixVersion())
	}
	fmt.Fprintln(s.out)
	if err := s.client.WriteFile("/etc/nix/machines", []byte(file.String()), 0o644); err != nil {
		return err
	}
	if _, err := s.shell(ctx, "alice", "cat /etc/nix/machines"); err != nil {
		return err
	}
	_, err := s.shell(ctx, "alice", "nix-dispatch machines check")
	return err
}

// startDaemon starts nix-dispatchd and waits until its machines are up.
func (s *scene) startDaemon(ctx context.Context) error {
	s.say("nix-dispatchd connects to them, once")
	s.daemon = s.client.Command(context.WithoutCancel(ctx), "root", programs+"/nix-dispatchd", "--page-names")
	s.daemon.Stdout, s.daemon.Stderr = &s.daemonLog, &s.daemonLog
	if err := s.daemon.Start(); err != nil {
		return fmt.Errorf("start nix-dispatchd: %w", err)
	}
	gone := make(chan error, 1)
	go func() { gone <- s.daemon.Wait() }()
	deadline := time.After(time.Minute)
	for {
		out, err := s.client.Run(ctx, programs+"/nix-dispatch", "status")
		if err == nil && strings.Count(out.Stdout, " up ") == len(s.machines) {
			break
		}
		select {
		case err := <-gone:
			return fmt.Errorf("nix-dispatchd ended: %v", err)
		case <-deadline:
			return errors.Join(fmt.Errorf("after a minute not all machines are up:\n%s", out.Stdout), err)
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
	if _, err := s.shell(ctx, "root", "nix-dispatch status"); err != nil {
		return err
	}
	return s.forwardPage()
}

// metricsAt is where the daemon serves metrics and the page, on the client.
const metricsAt = "127.0.0.1:9747"

// forwardPage makes the page that the daemon serves on the client one of this
// machine's, under the same address if it is free here.
func (s *scene) forwardPage() error {
	p, err := s.client.Forward(metricsAt, metricsAt)
	if err != nil {
		p, err = s.client.Forward("127.0.0.1:0", metricsAt)
	}
	if err != nil {
		return err
	}
	s.address = "http://" + p.Addr().String() + "/"
	fmt.Fprintf(s.out, "\nA page to look at, while this runs: %s\n", s.address)
	return nil
}

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

// A lockedWriter may be written by several goroutines.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
