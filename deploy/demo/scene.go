package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"nixdispatch/deploy/fleet"
)

// programs is where the client sees the programs.
const programs = "/opt/nix-dispatch"

// patience is how long the demo waits for what takes a second on an idle host.
const patience = 2 * time.Minute

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
	bin  string // the programs' directory, absolute
	keep bool   // go on building after the last act
	out  *lockedWriter

	fleet    *fleet.Fleet
	client   *fleet.Host
	machines []*machine

	address   string    // of the page, on this machine
	daemon    *exec.Cmd // nil until it is started
	daemonLog logFile
	lastPage  []byte // as it was last served, nil before
	logs      string // where a failed demo's logs are, "" if none were kept

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
		s.client, err = s.host(hostCtx, fleet.HostConfig{
			Name: "client", Suite: fleet.Trixie, NixConf: "max-jobs = 0\n",
			NixDaemon: fleet.NixDaemon{Env: []string{"NIX_CONFIG=build-hook = " + programs + "/nix-dispatch hook"}},
			Binds:     map[string]string{programs: s.bin},
		})
		return err
	})
	for _, m := range s.machines {
		g.Go(func() (err error) {
			m.host, err = s.host(hostCtx, fleet.HostConfig{
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

// host makes a host, and shows it when it is up.
func (s *scene) host(ctx context.Context, config fleet.HostConfig) (*fleet.Host, error) {
	h, err := s.fleet.Host(ctx, config)
	if err == nil {
		fmt.Fprintf(s.out, "%-9s %-13s Nix %-7s is up\n", h.Name(), h.Addr(), h.NixVersion())
	}
	return h, err
}

// startDaemon starts nix-dispatchd and waits until its machines are up.
func (s *scene) startDaemon(ctx context.Context) error {
	s.say("nix-dispatchd connects to them, once")
	// It ends with its host, and its log with the fleet.
	file, err := os.Create(filepath.Join(s.fleet.Dir(), "nix-dispatchd.log"))
	if err != nil {
		return err
	}
	daemon := s.client.Command(context.WithoutCancel(ctx), "root", programs+"/nix-dispatchd", "--page-names")
	daemon.Stdout, daemon.Stderr = file, file
	if err := daemon.Start(); err != nil {
		return errors.Join(fmt.Errorf("start nix-dispatchd: %w", err), file.Close())
	}
	s.daemon, s.daemonLog = daemon, logFile{file}
	gone := make(chan error, 1)
	go func() { gone <- daemon.Wait() }()
	deadline := time.After(patience)
	for {
		out, err := s.client.Run(ctx, programs+"/nix-dispatch", "status")
		if err == nil && strings.Count(out.Stdout, " up ") == len(s.machines) {
			break
		}
		select {
		case err := <-gone:
			return fmt.Errorf("nix-dispatchd ended: %v", err)
		case <-deadline:
			return errors.Join(fmt.Errorf("after %v not all machines are up:\n%s", patience, out.Stdout), err)
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
