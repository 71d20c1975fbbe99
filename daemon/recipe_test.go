package daemon

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

// A recipe is a derivation of a site's local store and what becomes of it where
// it is built.
type recipe struct {
	site    *site
	path    nix.StorePath
	drv     *nix.Derivation
	outputs map[string]nix.StorePath

	// refs are references of outputs, by output name.
	refs map[string][]nix.StorePath
	log  []string
	fail *nix.BuildResult
	size int // of each output's content, more than its name
}

// drvConfig says what a derivation is like. The zero value is one with a single
// output and no inputs for this host's system.
type drvConfig struct {
	srcs     []nix.StorePath
	inputs   []*recipe
	outputs  []string
	system   string
	env      map[string]string
	floating bool
	fixed    bool
	// absent leaves the .drv file out of the store.
	absent bool
}

// drv adds a derivation to the local store.
func (s *site) drv(name string, cfg drvConfig) *recipe {
	s.t.Helper()
	if cfg.outputs == nil {
		cfg.outputs = []string{"out"}
	}
	if cfg.system == "" {
		cfg.system = nixSystem()
	}
	r := &recipe{site: s, path: s.path(name + ".drv"), outputs: make(map[string]nix.StorePath), refs: make(map[string][]nix.StorePath)}
	var outputs, inputs, srcs, env []string
	refs := slices.Clone(cfg.srcs)
	for _, o := range cfg.outputs {
		r.outputs[o] = s.path(name + "-" + o)
		path, algo, hash := string(r.outputs[o]), "", ""
		if cfg.floating {
			path, algo = "", "r:sha256"
		}
		if cfg.fixed {
			algo, hash = "r:sha256", strings.Repeat("0", 64)
		}
		outputs = append(outputs, fmt.Sprintf("(%q,%q,%q,%q)", o, path, algo, hash))
	}
	for _, i := range cfg.inputs {
		inputs = append(inputs, fmt.Sprintf("(%q,[\"out\"])", i.path))
		refs = append(refs, i.path)
	}
	for _, p := range cfg.srcs {
		srcs = append(srcs, fmt.Sprintf("%q", p))
	}
	for _, k := range slices.Sorted(maps.Keys(cfg.env)) {
		env = append(env, fmt.Sprintf("(%q,%q)", k, cfg.env[k]))
	}
	text := fmt.Sprintf("Derive([%s],[%s],[%s],%q,\"/bin/sh\",[],[%s])", strings.Join(outputs, ","),
		strings.Join(inputs, ","), strings.Join(srcs, ","), cfg.system, strings.Join(env, ","))
	var err error
	if r.drv, err = nix.ParseDerivation([]byte(text)); err != nil {
		s.t.Fatal(err)
	}
	r.log = []string{"building " + name, name + " is ready"}
	s.mu.Lock()
	s.drvs[r.path] = r
	s.mu.Unlock()
	if !cfg.absent {
		s.writeDrv(r.path, text, refs...)
	}
	return r
}

// writeDrv puts a .drv file into the local store.
func (s *site) writeDrv(p nix.StorePath, text string, refs ...nix.StorePath) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, p.Base()), []byte(text), 0o444); err != nil {
		s.t.Fatal(err)
	}
	s.local.store.PutFile(p, text, refs...)
}

func (s *site) recipe(drvPath nix.StorePath) *recipe {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.drvs[drvPath]
}

// out is the path of the output "out".
func (r *recipe) out() nix.StorePath { return r.outputs["out"] }

// outPaths are the paths of all outputs.
func (r *recipe) outPaths() []nix.StorePath { return slices.Sorted(maps.Values(r.outputs)) }

// inputClosure is what a hook says in Start, or a caller's Nix would.
func (r *recipe) inputClosure() []nix.StorePath {
	seen := make(map[nix.StorePath]bool)
	var visit func(p nix.StorePath)
	visit = func(p nix.StorePath) {
		if seen[p] {
			return
		}
		seen[p] = true
		info, _, _ := r.site.local.store.Get(p)
		for _, ref := range info.References {
			visit(ref)
		}
	}
	for _, p := range r.drv.InputSrcs {
		visit(p)
	}
	for input := range r.drv.InputDrvs {
		visit(r.site.recipe(input).out())
	}
	return slices.Sorted(maps.Keys(seen))
}

// build does what the builder would do in a store: it needs the inputs and
// leaves the outputs there.
func (r *recipe) build(store *wiretest.Store, req wiretest.BuildRequest) nix.BuildResult {
	inputs := r.inputClosure()
	if req.Drv != nil {
		inputs = req.Drv.InputSrcs
	} else {
		inputs = append(inputs, r.path)
	}
	for _, p := range inputs {
		if _, _, ok := store.Get(p); !ok {
			return nix.BuildResult{Status: nix.MiscFailure, ErrorMsg: fmt.Sprintf("input %s is not valid", p)}
		}
	}
	for _, line := range r.log {
		req.Log(line)
	}
	if r.fail != nil {
		return *r.fail
	}
	for name, p := range r.outputs {
		r.put(store, name, p)
	}
	return nix.BuildResult{Status: nix.Built}
}

// put adds one output to a store.
func (r *recipe) put(store *wiretest.Store, name string, p nix.StorePath) {
	nar := wiretest.FileNAR("output " + name + " of " + string(r.path) + string(bytes.Repeat([]byte("x"), r.size)))
	info := wiretest.Info(p, nar, slices.Sorted(slices.Values(r.refs[name]))...)
	info.Deriver, info.Sigs, info.Ultimate = r.path, []string{"machine:c2lnbmF0dXJl"}, true
	if r.drv.Outputs[name].Kind() == nix.Fixed {
		info.CA = "fixed:r:sha256:" + strings.Repeat("0", 52)
	}
	store.Put(info, nar)
}
