package integration

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/deploy/fleet"
	"nixdispatch/proto/nix"
)

// What testdata/graph.nix has.
const (
	graphDerivations = 60
	graphOutputs     = 80
	graphFixed       = 10
)

// collectable is how soon a path nobody needs must be collectable.
const collectable = time.Minute

// graphSites are the combinations of versions and protocols in which the graph
// is built: every pair of a client's and a machine's version, each machine's
// version over both protocols.
var graphSites = []struct {
	client  string
	schemes [3]string // of a bookworm, a trixie and a sid machine
}{
	{fleet.Bookworm, [3]string{"ssh", "ssh-ng", "ssh"}},
	{fleet.Trixie, [3]string{"ssh-ng", "ssh", "ssh-ng"}},
	{fleet.Sid, [3]string{"ssh-ng", "ssh", "ssh"}},
}

// TestGraph builds a graph of derivations by plain nix-build.
func TestGraph(t *testing.T) {
	t.Parallel()
	for _, c := range graphSites {
		if !slices.Contains(clients(t), c.client) {
			continue
		}
		t.Run("client="+c.client, func(t *testing.T) {
			t.Parallel()
			s := newGraphSite(t, c.client, c.schemes)
			for _, user := range []string{"alice", "root"} {
				s.countBuilds()
				g := s.instantiate(user)
				start := time.Now()
				tops := s.mustBuild(user, g.expr)
				t.Logf("%s: %s", user, time.Since(start).Round(time.Millisecond))
				s.checkGraph(g, tops)
			}
			s.checkCollectable()
		})
	}
}

// TestGraphByDispatchBuild builds the graph by nix-dispatch build.
func TestGraphByDispatchBuild(t *testing.T) {
	t.Parallel()
	s := newGraphSite(t, fleet.Trixie, [3]string{"ssh", "ssh", "ssh-ng"})
	t.Run("paths", func(t *testing.T) {
		s := s.in(t)
		s.countBuilds()
		g := s.instantiate("root")
		out, err := s.dispatch(append([]string{"build"}, g.tops...)...)
		if err != nil {
			t.Fatalf("nix-dispatch build: %v", err)
		}
		s.checkGraph(g, strings.Fields(out.Stdout))
	})
	t.Run("json", func(t *testing.T) {
		s := s.in(t)
		s.countBuilds()
		g := s.instantiate("root")
		multi := g.named("multi0")
		out, err := s.dispatch(append([]string{"build", "--json", multi}, g.tops...)...)
		if err != nil {
			t.Fatalf("nix-dispatch build --json: %v", err)
		}
		type result struct {
			DrvPath string            `json:"drvPath"`
			Outputs map[string]string `json:"outputs"`
		}
		var got, want []result
		if err := json.Unmarshal([]byte(out.Stdout), &got); err != nil {
			t.Fatalf("stdout is %q: %v", out.Stdout, err)
		}
		for _, drv := range append([]string{multi}, g.tops...) {
			r := result{drv, make(map[string]string)}
			for name, p := range g.drvs[nix.StorePath(drv)].OutputPaths() {
				r.Outputs[name] = string(p)
			}
			want = append(want, r)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("results (-want +got):\n%s", diff)
		}
		s.checkGraph(g, s.outputsOf(g.tops))
	})
	t.Run("failures", func(t *testing.T) { s.in(t).checkExitCodes() })
	s.checkCollectable()
}

// in is the site as a subtest sees it.
func (s *site) in(t *testing.T) *site {
	sub := *s
	sub.t = t
	return &sub
}

// newGraphSite has a machine of each version, with 4, 2 and 2 slots, that signs
// what it builds, and a client that builds nothing itself.
func newGraphSite(t *testing.T, client string, schemes [3]string) *site {
	fleet.Require(t)
	cfg := siteConfig{client: client}
	for n, scheme := range schemes {
		name := suites[n] + "-" + scheme
		columns := "x86_64-linux - 2"
		if n == 0 {
			columns = "x86_64-linux - 4"
		}
		cfg.machines = append(cfg.machines, machineConfig{
			name: name, suite: suites[n], scheme: scheme, columns: columns,
			host: fleet.HostConfig{
				NixConf: "secret-key-files = /etc/nix-keys/key\n",
				Binds:   map[string]string{"/etc/nix-keys": secretKey(t, name)},
			},
		})
	}
	s := newSite(t, cfg)
	for name, text := range map[string]string{"dir/file": "a source file\n", "script": "#!/bin/sh\n"} {
		s.write("/srv/sources/"+name, text)
	}
	if _, err := s.client.Run(t.Context(), "sh", "-c", "chmod +x /srv/sources/script && ln -s dir/file /srv/sources/link"); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("testdata/graph.nix")
	if err != nil {
		t.Fatal(err)
	}
	s.write("/srv/graph.nix", string(text))
	return s
}

// A graph is an instance of testdata/graph.nix in the client's store.
type graph struct {
	expr string
	tops []string // its two last derivations
	drvs map[nix.StorePath]*nix.Derivation
}

// graphSalt makes each graph of this process another.
var graphSalt atomic.Int64

// instantiate makes a new graph.
func (s *site) instantiate(user string) *graph {
	s.t.Helper()
	hash, err := s.client.Run(s.t.Context(), "nix-hash", "--type", "sha256", "--base32", "/srv/sources")
	if err != nil {
		s.t.Fatal(err)
	}
	g := &graph{drvs: make(map[nix.StorePath]*nix.Derivation)}
	g.expr = fmt.Sprintf(`import /srv/graph.nix { salt = "%s-%d"; sources = /srv/sources; sourcesHash = "%s"; }`,
		user, graphSalt.Add(1), strings.TrimSpace(hash.Stdout))
	out, err := s.client.RunAs(s.t.Context(), user, "nix-instantiate", "--expr", g.expr)
	if err != nil {
		s.t.Fatal(err)
	}
	g.tops = strings.Fields(out.Stdout)
	closure, err := s.client.Run(s.t.Context(), append([]string{"nix-store", "--query", "--requisites"}, g.tops...)...)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, p := range strings.Fields(closure.Stdout) {
		if !strings.HasSuffix(p, ".drv") {
			continue
		}
		text, err := s.client.ReadFile(p)
		if err != nil {
			s.t.Fatal(err)
		}
		if g.drvs[nix.StorePath(p)], err = nix.ParseDerivation(text); err != nil {
			s.t.Fatalf("%s: %v", p, err)
		}
	}
	if len(g.drvs) != graphDerivations {
		s.t.Fatalf("the graph has %d derivations, want %d", len(g.drvs), graphDerivations)
	}
	return g
}

// name is a derivation's name in testdata/graph.nix.
func (g *graph) name(drvPath nix.StorePath) string {
	_, name, _ := strings.Cut(drvPath.Base(), "-")
	name, _, _ = strings.Cut(name, "-")
	return name
}

// named is the derivation with a name in testdata/graph.nix.
func (g *graph) named(name string) string {
	for p := range g.drvs {
		if g.name(p) == name {
			return string(p)
		}
	}
	return ""
}

// outputsOf asks the client's Nix for the outputs of derivations.
func (s *site) outputsOf(drvs []string) []string {
	s.t.Helper()
	out, err := s.client.Run(s.t.Context(), append([]string{"nix-store", "--query", "--outputs"}, drvs...)...)
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.Fields(out.Stdout)
}

// secretKey makes a binary cache's signing key and returns the directory
// that has it, in a file "key".
func secretKey(t *testing.T, name string) string {
	t.Helper()
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "key"), []byte(name+":"+base64.StdEncoding.EncodeToString(key)), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// checkExitCodes checks how nix-dispatch build ends when it does not succeed.
func (s *site) checkExitCodes() {
	s.t.Helper()
	bad, err := s.client.Run(s.t.Context(), "nix-instantiate", "--expr",
		derivation{name: "bad", script: "echo it is broken >&2; exit 7"}.expr())
	if err != nil {
		s.t.Fatal(err)
	}
	drv := strings.TrimSpace(bad.Stdout)
	for _, c := range []struct {
		name   string
		args   []string
		code   int
		stderr string
	}{
		{"a build fails", []string{"build", drv}, 1, "it is broken"},
		{"no derivation", []string{"build"}, 2, "which derivation?"},
		{"not a derivation", []string{"build", "/etc/passwd"}, 2, "/etc/passwd"},
		{"an output it has not", []string{"build", drv + "^doc"}, 2, `"doc"`},
		{"a derivation that is not there", []string{"build", strings.Replace(drv, "bad", "good", 1)}, 1, "is not in the local store"},
		{"no daemon", []string{"build", "--socket", "/run/none", drv}, 3, "/run/none"},
	} {
		out, err := s.dispatch(c.args...)
		code := 0
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			code = exit.ExitCode()
		} else if err != nil {
			s.t.Fatal(err)
		}
		if code != c.code || !strings.Contains(out.Stderr, c.stderr) || out.Stdout != "" {
			s.t.Errorf("%s: exit status %d, want %d; stdout %q, want none; stderr, which should speak of %q:\n%s",
				c.name, code, c.code, out.Stdout, c.stderr, out.Stderr)
		}
	}
}
