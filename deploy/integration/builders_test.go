package integration

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

const (
	// buildsFile is where the builders of these tests append a line when they
	// start and one when they end, on the host they run on. A short append is
	// atomic: the lines are in the order of what they tell.
	buildsFile = "/srv/builds"
	// goFile is what builders wait for that must not end before a test says so.
	// With a derivation's name after it, it is for that one only.
	goFile = "/srv/go"
)

// counted wraps a builder's script so that the host it runs on counts it.
func counted(name, script string) string {
	return fmt.Sprintf("set -e\necho start %s >> %s\n%s\necho end %s >> %[2]s\n", name, buildsFile, script, name)
}

// awaitGo is a script that ends when the test has written goFile to the host. It
// gives up after minutes, so that nothing outlives a broken test.
const awaitGo = `n=0
while ! test -e ` + goFile + ` && ! test -e "` + goFile + `-$name"; do
	n=$((n + 1)); test $n -lt 3000
	sleep 0.1
done`

// A derivation is what trivial writes as a Nix expression.
type derivation struct {
	name     string
	features []string
	script   string // "" for one that does nothing but write $out
}

// expr is the derivation as a Nix expression; it is counted where it is built.
func (d derivation) expr() string {
	features := ""
	if d.features != nil {
		features = fmt.Sprintf("requiredSystemFeatures = [ %q ];", strings.Join(d.features, `" "`))
		features = strings.ReplaceAll(features, `\"`, `"`)
	}
	return fmt.Sprintf(`(derivation {
		name = "%s"; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/usr/bin:/bin"; %s
		args = [ "-c" ''%s'' ];
	})`, d.name, features, counted(d.name, d.script+"\necho built "+d.name+" > $out"))
}

// all is a Nix expression for many derivations.
func all(ds []derivation) string {
	var b strings.Builder
	b.WriteString("[\n")
	for _, d := range ds {
		b.WriteString(d.expr() + "\n")
	}
	b.WriteString("]")
	return b.String()
}

// many are n derivations that differ in their names only.
func many(n int, d derivation) []derivation {
	ds := make([]derivation, n)
	for i := range ds {
		ds[i] = d
		ds[i].name = fmt.Sprintf("%s-%d", d.name, i)
	}
	return ds
}

// hosts are the client, under its name, and the machines.
func (s *site) hosts() map[string]*fleet.Host {
	hosts := maps.Clone(s.machines)
	hosts["client"] = s.client
	return hosts
}

// countBuilds has every host forget which builds ran on it and lets no builder
// go that waits for goFile. No build may be in progress.
func (s *site) countBuilds() {
	s.t.Helper()
	for _, h := range s.hosts() {
		if _, err := h.Run(s.t.Context(), "sh", "-c", "rm -f "+goFile+"*"); err != nil {
			s.t.Fatal(err)
		}
		if err := h.WriteFile(buildsFile, nil, 0o666); err != nil {
			s.t.Fatal(err)
		}
		// Not subject to this process's umask.
		if _, err := h.Run(s.t.Context(), "chmod", "666", buildsFile); err != nil {
			s.t.Fatal(err)
		}
	}
}

// letGo ends the waiting of the builders on all hosts, or of those named.
func (s *site) letGo(names ...string) {
	s.t.Helper()
	files := []string{goFile}
	if len(names) > 0 {
		files = nil
	}
	for _, name := range names {
		files = append(files, goFile+"-"+name)
	}
	for _, h := range s.hosts() {
		for _, file := range files {
			if err := h.WriteFile(file, nil, 0o644); err != nil {
				s.t.Fatal(err)
			}
		}
	}
}

// A buildCount is what the builders on one host have told.
type buildCount struct {
	starts  map[string]int // by derivation name
	running int
	most    int // at once
}

// names are the derivations built, sorted.
func (c buildCount) names() []string { return slices.Sorted(maps.Keys(c.starts)) }

// total counts starts.
func (c buildCount) total() int {
	n := 0
	for _, starts := range c.starts {
		n += starts
	}
	return n
}

// builds counts what ran on a host since countBuilds.
func (s *site) builds(h *fleet.Host) buildCount {
	s.t.Helper()
	text, err := h.ReadFile(buildsFile)
	if err != nil {
		s.t.Fatal(err)
	}
	return countLines(s.t, string(text))
}

func countLines(t *testing.T, text string) buildCount {
	t.Helper()
	c := buildCount{starts: make(map[string]int)}
	for line := range strings.Lines(text) {
		switch what, name, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " "); what {
		case "start":
			c.starts[name]++
			c.running++
			c.most = max(c.most, c.running)
		case "end":
			c.running--
		default:
			t.Fatalf("line %q in %s", line, buildsFile)
		}
	}
	return c
}

// where tells on which host each derivation ran. One that ran twice, or still
// runs, is an error.
func (s *site) where() map[string]string {
	s.t.Helper()
	at := make(map[string]string)
	for host, h := range s.hosts() {
		c := s.builds(h)
		if c.running != 0 {
			s.t.Errorf("%d builds on %s started and have not ended", c.running, host)
		}
		for name, n := range c.starts {
			if n != 1 || at[name] != "" {
				s.t.Errorf("%s ran %d times on %s, and on %q", name, n, host, at[name])
			}
			at[name] = host
		}
	}
	return at
}

// perHost counts the derivations of where by host.
func perHost(at map[string]string) map[string]int {
	n := make(map[string]int)
	for _, host := range at {
		n[host]++
	}
	return n
}

// A running is a nix-build that a test started and has not waited for.
type running struct {
	s    *site
	out  func() fleet.Output
	done chan error
}

// start begins a nix-build. It is killed with the test.
func (s *site) start(user, expr string, args ...string) *running {
	s.t.Helper()
	cmd, out := s.nixBuildCommand(s.t.Context(), user, expr, args...)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	r := &running{s: s, out: out, done: make(chan error, 1)}
	go func() { r.done <- cmd.Wait() }()
	return r
}

// wait waits for the end of a nix-build that must succeed.
func (r *running) wait(within time.Duration) {
	r.s.t.Helper()
	select {
	case err := <-r.done:
		if err != nil {
			r.s.t.Fatalf("nix-build: %v\n%s", err, r.out().Stderr)
		}
	case <-time.After(within):
		r.s.t.Fatalf("nix-build does not end within %s\n%s", within, r.out().Stderr)
	}
}
