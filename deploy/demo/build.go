package main

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

//go:embed graph.nix
var graph string

// graphSize is how many derivations graph.nix has.
const graphSize = 12

// slots is how many builds the machines take at once.
const slots = 6

// goFile lets the parts in graph.nix end, on each machine.
const goFile = "/run/demo-go"

// build runs nix-build as an ordinary user, and shows status while every slot is
// taken: the parts run until they have been seen to, so that this does not depend on
// how fast the host is.
func (s *scene) build(ctx context.Context) error {
	s.say("alice, an ordinary user, builds %d derivations with nix-build", graphSize)
	const file = "/home/alice/graph.nix"
	if err := s.client.WriteFile(file, []byte(graph), 0o644); err != nil {
		return err
	}
	fmt.Fprintln(s.out, "alice@client$ nix-build graph.nix")
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var stdout strings.Builder
	cmd := s.client.Command(ctx, "alice", "nix-build", "--no-out-link", file)
	cmd.Stdout, cmd.Stderr = &stdout, s.out
	started := time.Now()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start nix-build: %w", err)
	}
	done := make(chan struct{})
	shown := make(chan error, 1)
	go func() {
		err := s.showAllBusy(ctx, done)
		if err != nil {
			cancel() // the parts would wait for ever
		}
		shown <- err
	}()
	err := cmd.Wait()
	s.took = time.Since(started)
	close(done)
	if err != nil {
		err = fmt.Errorf("nix-build: %w", err)
	}
	if err := errors.Join(<-shown, err); err != nil {
		return err
	}
	s.result = strings.TrimSpace(stdout.String())
	fmt.Fprintf(s.out, "%s\n", s.result)
	return nil
}

// showAllBusy prints the status when every slot has a build, among nix-build's own
// lines, and lets the builds go on.
func (s *scene) showAllBusy(ctx context.Context, done <-chan struct{}) error {
	deadline := time.After(patience)
	for {
		status, err := s.client.Run(ctx, programs+"/nix-dispatch", "status")
		if err != nil {
			return fmt.Errorf("nix-dispatch status: %w", err)
		}
		if strings.Count(status.Stdout, " building ") == slots {
			fmt.Fprintf(s.out, "\nmeanwhile, root@client# nix-dispatch status\n%s\n", status.Stdout)
			break
		}
		select {
		case <-done:
			return fmt.Errorf("nix-build ended before %d builds ran at once", slots)
		case <-deadline:
			return fmt.Errorf("after %v not all of the machines' %d slots were taken:\n%s", patience, slots, status.Stdout)
		case <-time.After(100 * time.Millisecond):
		}
	}
	for _, m := range s.machines {
		if err := m.host.WriteFile(goFile, nil, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// showWhere shows where each derivation was built, according to the machines:
// every output holds the name of the host that made it.
func (s *scene) showWhere(ctx context.Context) error {
	s.say("Where each was built: every output holds the name of its host")
	out, err := s.client.Run(ctx, "sh", "-c",
		`nix-store -q --outputs $(nix-store -q --requisites "$(nix-store -q --deriver "$0")" | grep '\.drv$')`, s.result)
	if err != nil {
		return err
	}
	s.paths = strings.Fields(out.Stdout)
	s.builtOn = make(map[string]string)
	perHost := make(map[string]int)
	for _, p := range s.paths {
		host, err := s.client.ReadFile(p + "/built-on")
		if err != nil {
			return err
		}
		_, name, _ := strings.Cut(path.Base(p), "-")
		s.builtOn[name] = strings.TrimSpace(string(host))
		perHost[s.builtOn[name]]++
	}
	tw := tabwriter.NewWriter(s.out, 0, 8, 2, ' ', 0)
	for _, m := range s.machines {
		var names []string
		for name, host := range s.builtOn {
			if host == m.name {
				names = append(names, name)
			}
		}
		slices.SortFunc(names, func(a, b string) int { return cmp.Compare(a, b) })
		connections, err := m.host.SSHConnections()
		if err != nil {
			return err
		}
		fmt.Fprintf(tw, "%s\tNix %s\t%d SSH connection\t%d built:\t%s\n", m.name, m.host.NixVersion(), connections, len(names), strings.Join(names, " "))
		switch {
		case len(names) == 0:
			err = fmt.Errorf("nothing was built on %s", m.name)
		case connections != 1:
			err = fmt.Errorf("%d SSH connections to %s, want 1", connections, m.name)
		}
		if err != nil {
			tw.Flush()
			return err
		}
		delete(perHost, m.name)
	}
	tw.Flush()
	if len(s.paths) != graphSize || len(perHost) > 0 {
		return fmt.Errorf("%d outputs, want %d; built elsewhere: %v", len(s.paths), graphSize, perHost)
	}
	if s.builtOn["tests"] != "poochie" {
		return fmt.Errorf("tests, which asks for the feature big, was built on %s, which lacks it", s.builtOn["tests"])
	}
	return nil
}

// checkStore checks the outputs in the client's store, and the kept log.
func (s *scene) checkStore(ctx context.Context) error {
	s.say("The outputs are valid in the client's store, and the logs are kept")
	for _, p := range s.paths {
		if _, err := s.client.Run(ctx, "nix-store", "--verify-path", p); err != nil {
			return fmt.Errorf("verify: %w", err)
		}
	}
	fmt.Fprintf(s.out, "nix-store --verify-path: all %d outputs are as registered\n", len(s.paths))
	log, err := s.shell(ctx, "alice", "nix log "+s.result)
	if err != nil {
		return err
	}
	if want := "all parts are in place"; !strings.Contains(log, want) {
		return fmt.Errorf("the log is %q, want %q in it", log, want)
	}
	status, err := s.shell(ctx, "root", "nix-dispatch status")
	if err != nil {
		return err
	}
	if !strings.Contains(status, "no builds in progress") {
		return fmt.Errorf("builds are left in nix-dispatch status")
	}
	return nil
}

// metrics shows an excerpt for Prometheus. The hosts have no curl.
func (s *scene) metrics(ctx context.Context) error {
	s.say("For Prometheus, from 127.0.0.1:9747/metrics")
	out, err := s.client.Run(ctx, "bash", "-c",
		`exec 3<>/dev/tcp/127.0.0.1/9747; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3; cat <&3`)
	if err != nil {
		return err
	}
	built := 0
	for line := range strings.Lines(out.Stdout) {
		for _, name := range []string{"machine_up", "builds_total", "ssh_connects_total"} {
			if strings.HasPrefix(line, "nix_dispatch_"+name+"{") {
				io.WriteString(s.out, line)
			}
		}
		if strings.HasPrefix(line, "nix_dispatch_builds_total{") && strings.Contains(line, `result="built"`) {
			n, err := strconv.Atoi(strings.Fields(line)[1])
			if err != nil {
				return fmt.Errorf("metrics: %q: %w", line, err)
			}
			built += n
		}
	}
	if built != graphSize {
		return fmt.Errorf("the metrics count %d builds, want %d", built, graphSize)
	}
	return nil
}

// page looks at the page that the daemon serves for people.
func (s *scene) page(ctx context.Context) error {
	s.say("For people, the page %s", s.address)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.address, nil)
	if err != nil {
		return err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("the page: %w", err)
	}
	defer r.Body.Close()
	html, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	s.lastPage = html
	if err != nil {
		return fmt.Errorf("the page: %w", err)
	}
	for _, want := range append([]string{"program"}, s.uris()...) {
		if !strings.Contains(string(html), want) {
			return fmt.Errorf("the page (%s) does not show %q", r.Status, want)
		}
	}
	fmt.Fprintln(s.out, "It shows the machines and the builds that have ended. To look at it: 'make demo KEEP=1', which goes on building.")
	return nil
}

func (s *scene) uris() []string {
	var uris []string
	for _, m := range s.machines {
		uris = append(uris, m.uri)
	}
	return uris
}

// keepBuilding builds the graph again, round after round, until ctx ends, which is
// no error.
func (s *scene) keepBuilding(ctx context.Context) error {
	s.say("alice goes on building: look at %s, and stop it with Ctrl-C", s.address)
	for round := 1; ctx.Err() == nil; round++ {
		cmd := s.client.Command(ctx, "alice", "nix-build", "--no-out-link", "--argstr", "round", strconv.Itoa(round), "graph.nix")
		started := time.Now()
		out, err := cmd.CombinedOutput()
		switch {
		case ctx.Err() != nil:
		case err != nil:
			return fmt.Errorf("round %d: nix-build: %w\n%s", round, err, out)
		default:
			fmt.Fprintf(s.out, "round %d: %d derivations in %.1f s\n", round, graphSize, time.Since(started).Seconds())
		}
	}
	return nil
}

func (s *scene) summary() string {
	return fmt.Sprintf("%d derivations built on %d machines in %.1f s, none on the client; every output verified",
		len(s.paths), len(s.machines), s.took.Seconds())
}
