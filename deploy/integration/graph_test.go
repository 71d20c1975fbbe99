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
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nixdispatch/deploy/fleet"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/worker"
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
	for _, c := range graphSites {
		t.Run("client="+c.client, func(t *testing.T) {
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
var graphSalt int

// instantiate makes a new graph.
func (s *site) instantiate(user string) *graph {
	s.t.Helper()
	graphSalt++
	hash, err := s.client.Run(s.t.Context(), "nix-hash", "--type", "sha256", "--base32", "/srv/sources")
	if err != nil {
		s.t.Fatal(err)
	}
	g := &graph{drvs: make(map[nix.StorePath]*nix.Derivation)}
	g.expr = fmt.Sprintf(`import /srv/graph.nix { salt = "%s-%d"; sources = /srv/sources; sourcesHash = "%s"; }`,
		user, graphSalt, strings.TrimSpace(hash.Stdout))
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

// checkGraph checks everything about a graph that was built: where, how often,
// and what is in the client's store now. tops are the paths that were printed.
func (s *site) checkGraph(g *graph, tops []string) {
	s.t.Helper()
	if diff := cmp.Diff(s.outputsOf(g.tops), tops); diff != "" {
		s.t.Errorf("paths printed (-want +got):\n%s", diff)
	}
	s.idle(time.Minute)
	at := s.where()
	s.checkSpread(at)
	s.checkPaths(g, at)
	s.checkContents(g)
}

// checkSpread checks that each derivation ran once, on a machine, that all
// machines had their share and none more at once than it has slots.
func (s *site) checkSpread(at map[string]string) {
	s.t.Helper()
	if len(at) != graphDerivations {
		s.t.Errorf("%d derivations were built, want %d", len(at), graphDerivations)
	}
	share := perHost(at)
	if share["client"] != 0 {
		s.t.Errorf("%d derivations were built on the client, whose max-jobs is 0", share["client"])
	}
	slots := make(map[string]int)
	for _, m := range s.status().Machines {
		slots[m.URI[strings.Index(m.URI, "@")+1:]] = m.Slots
	}
	for name, h := range s.machines {
		most := s.builds(h).most
		s.t.Logf("%s: %d derivations, at most %d at once, %d slots", name, share[name], most, slots[name])
		if most > slots[name] {
			s.t.Errorf("%s: %d builds at once on %d slots", name, most, slots[name])
		}
		if least := graphDerivations * slots[name] / 8 / 4; share[name] < least {
			s.t.Errorf("%s: built %d derivations, want at least %d", name, share[name], least)
		}
	}
}

// checkPaths checks every output in the client's store against its hash, and
// what the store knows of it against what the machine knows that built it.
func (s *site) checkPaths(g *graph, at map[string]string) {
	s.t.Helper()
	built := make(map[string][]nix.StorePath) // by host
	deriver := make(map[nix.StorePath]nix.StorePath)
	var all []nix.StorePath
	var fixed int
	for drvPath, drv := range g.drvs {
		for _, p := range drv.OutputPaths() {
			host := at[g.name(drvPath)]
			built[host] = append(built[host], p)
			deriver[p] = drvPath
			all = append(all, p)
		}
	}
	if len(all) != graphOutputs {
		s.t.Errorf("the graph has %d outputs, want %d", len(all), graphOutputs)
	}
	s.verify(pathStrings(all)...)
	here := pathInfos(s.t, s.client, all)
	for name, h := range s.machines {
		there := pathInfos(s.t, h, built[name])
		for _, p := range built[name] {
			got, want := here[p], there[p]
			if diff := cmp.Diff(want, got, sameInfo...); diff != "" {
				s.t.Errorf("%s on %s and on the client (-there +here):\n%s", p, name, diff)
			}
			if got.Deriver != deriver[p] {
				s.t.Errorf("deriver of %s is %q, want %s", p, got.Deriver, deriver[p])
			}
			if len(got.Sigs) != 1 || !strings.HasPrefix(got.Sigs[0], name+":") {
				s.t.Errorf("signatures of %s are %q, want one by %s", p, got.Sigs, name)
			}
			isFixed := strings.HasPrefix(got.CA, "fixed:")
			if isFixed {
				fixed++
			}
			if want := g.drvs[deriver[p]].ContentAddressed(); isFixed != want {
				s.t.Errorf("ca of %s is %q; a fixed output: %t", p, got.CA, want)
			}
		}
	}
	if fixed != graphFixed {
		s.t.Errorf("%d paths have a ca field, want %d", fixed, graphFixed)
	}
}

// checkContents looks into some outputs.
func (s *site) checkContents(g *graph) {
	s.t.Helper()
	multi := g.drvs[nix.StorePath(g.named("multi3"))].OutputPaths()
	infos := pathInfos(s.t, s.client, []nix.StorePath{multi["foo"], multi["dev"], multi["out"]})
	for from, to := range map[string][]string{"foo": {"out"}, "dev": {"foo", "out"}, "out": {"out"}} {
		for _, name := range to {
			if refs := infos[multi[from]].References; !slices.Contains(refs, multi[name]) {
				s.t.Errorf("output %s refers to %q, want output %s, %s, among them", from, refs, name, multi[name])
			}
		}
	}
	attrs := g.drvs[nix.StorePath(g.named("attrs1"))].OutputPaths()
	base := g.drvs[nix.StorePath(g.named("base1"))].OutputPaths()["out"]
	foo := g.drvs[nix.StorePath(g.named("multi1"))].OutputPaths()["foo"]
	want := fmt.Sprintf("two words\n%s\nit's\n%s\n", base, foo)
	if got, err := storeFile(s.client, string(attrs["out"])); err != nil || got != want {
		s.t.Errorf("output of structured attributes: %q, %v, want %q", got, err, want)
	}
}

// sameInfo compares what two stores know of a path; when they got it and
// whether they made it is their own.
var sameInfo = []cmp.Option{
	cmpopts.IgnoreFields(nix.PathInfo{}, "RegistrationTime", "Ultimate"),
	cmpopts.SortSlices(func(a, b nix.StorePath) bool { return a < b }),
	cmpopts.EquateEmpty(),
}

func pathStrings(paths []nix.StorePath) []string {
	names := make([]string, len(paths))
	for n, p := range paths {
		names[n] = string(p)
	}
	return names
}

// pathInfos asks a host's Nix about paths, which must be valid.
func pathInfos(t *testing.T, h *fleet.Host, paths []nix.StorePath) map[nix.StorePath]nix.PathInfo {
	t.Helper()
	cmd := h.Command(t.Context(), "root", "nix-daemon", "--stdio")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		_ = cmd.Wait() // how it ends when its input does is Nix's affair
	}()
	c, err := worker.NewClient(stdout, stdin, nil)
	if err != nil {
		t.Fatalf("nix-daemon on %s: %v", h.Name(), err)
	}
	infos, err := c.QueryPathInfos(paths)
	if err != nil {
		t.Fatalf("query paths of %s: %v", h.Name(), err)
	}
	known := make(map[nix.StorePath]nix.PathInfo)
	for _, i := range infos {
		known[i.Path] = i
	}
	if len(known) != len(paths) {
		t.Errorf("%d of %d paths are valid on %s", len(known), len(paths), h.Name())
	}
	return known
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

// checkCollectable checks that, once all is done, the garbage collector of every
// host takes all there is, and that nothing is left running.
func (s *site) checkCollectable() {
	s.t.Helper()
	end := time.Now().Add(collectable)
	for name, h := range s.hosts() {
		s.eventually(max(time.Until(end), time.Second), "no process of a build is left on "+name, func() bool {
			return len(buildProcesses(s.t, h)) == 0
		})
		var left []string
		for { // once at least, however slow this machine is
			if _, err := h.Run(s.t.Context(), "nix-store", "--gc"); err != nil {
				s.t.Fatal(err)
			}
			if left = storePaths(s.t, h); len(left) == 0 || time.Now().After(end) {
				break
			}
			time.Sleep(time.Second)
		}
		if len(left) > 0 {
			s.t.Errorf("%s: %d paths are not collectable %s after the last build, such as %s", name, len(left), collectable, left[0])
		}
	}
}

// buildProcesses are a host's processes that only a build needs.
func buildProcesses(t *testing.T, h *fleet.Host) []string {
	t.Helper()
	all, err := h.Processes()
	if err != nil {
		t.Fatal(err)
	}
	daemons := 0
	return slices.DeleteFunc(all, func(p string) bool {
		words := strings.Fields(p)
		if len(words) == 0 {
			return true
		}
		switch {
		case strings.Contains(p, "--stdio"), strings.Contains(p, "--serve"):
			return false
		case strings.HasSuffix(words[0], "nix-daemon"): // the first serves nobody
			daemons++
			return daemons == 1
		case strings.HasSuffix(words[0], "nix-dispatch"), strings.HasSuffix(words[0], "nix-dispatch-hook"):
			return false
		default:
			return true
		}
	})
}

// storePaths are the store paths that a host has, valid or not.
func storePaths(t *testing.T, h *fleet.Host) []string {
	t.Helper()
	names, err := h.ReadDir("/nix/store")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(names, func(name string) bool {
		return strings.HasPrefix(name, ".") || strings.HasSuffix(name, ".lock")
	})
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
