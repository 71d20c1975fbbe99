package integration

import (
	"fmt"
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
