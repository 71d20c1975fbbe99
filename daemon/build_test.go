package daemon

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker"
)

// mustBeOrdered fails the test unless paths come once each, after what they
// refer to.
func mustBeOrdered(t *testing.T, what string, paths []nix.StorePath, refs func(nix.StorePath) []nix.StorePath) {
	t.Helper()
	for n, p := range paths {
		if slices.Contains(paths[:n], p) {
			t.Errorf("%s: %s came twice", what, p)
		}
		for _, r := range refs(p) {
			if slices.Contains(paths[n+1:], r) {
				t.Errorf("%s: %s came before %s, to which it refers", what, p, r)
			}
		}
	}
}

func (s *site) localRefs(p nix.StorePath) []nix.StorePath {
	info, _, _ := s.local.store.Get(p)
	return info.References
}

func TestBuildFromInputsToOutputs(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		var asked wiretest.BuildRequest
		m.build = func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult {
			asked = req
			return m.site.recipe(req.DrvPath).build(m.store, req)
		}
		s := newSite(t, m)
		base := s.source("base")
		middle := s.source("middle", base)
		top := s.source("top", base, middle)
		there := s.source("there")
		m.store.PutFile(there, "contents of there")
		dep := s.drv("dep", drvConfig{})
		s.local.store.PutFile(dep.out(), "built before", base)
		m.store.PutFile(dep.out(), "built before", base)
		r := s.drv("thing", drvConfig{srcs: []nix.StorePath{top, there}, inputs: []*recipe{dep}, outputs: []string{"dev", "man", "out"}})
		r.refs["dev"] = []nix.StorePath{r.outputs["man"]}
		r.refs["out"] = []nix.StorePath{r.outputs["dev"], r.outputs["out"], top}
		r.log = []string{"one", "two", strings.Repeat("long ", 5000), "last"}

		h := s.hook()
		free := holdLock(t, s.store().Real(r.outputs["man"])+".lock")
		h.onHandOver = func(paths []string) {
			defer free()
			if got := s.local.imported(); len(got) != 0 {
				t.Errorf("%v imported before the locks were asked for", got)
			}
		}
		// Progress is for those who read in time: the upload waits for us.
		told := make(chan struct{})
		var once sync.Once
		h.onEvent = func(e *dispatchv1.BuildEvent) {
			if tr := e.GetCopying().GetTransfer(); tr != nil {
				once.Do(func() { close(told) })
				if tr.GetPaths() != 3 || tr.GetBytes() == 0 || tr.GetBytesDone() > tr.GetBytes() {
					t.Errorf("progress of copying %v, want 3 paths and their bytes", tr)
				}
			}
		}
		m.onUpload(func(nix.PathInfo) error {
			if !closed(told) {
				t.Error("no progress of copying is told")
			}
			return nil
		})
		accepted := h.accepted(r)
		st := h.finish()
		st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)

		if got, want := st.phases(), "copying building fetching"; got != want {
			t.Errorf("phases %q, want %q", got, want)
		}
		if want := strings.Join(r.log, "\n") + "\n"; st.log != want {
			t.Errorf("log of %d bytes, want %d: %.60q", len(st.log), len(want), st.log)
		}
		if st.finished.GetMachine() != m.uri() || st.finished.GetBuildDuration().AsDuration() <= 0 {
			t.Errorf("finished = %v, want the machine and a duration", st.finished)
		}
		for _, e := range st.events {
			if e.GetBuildId() != accepted.GetBuildId() || e.GetDrvPath() != string(r.path) {
				t.Errorf("event of build %d, %s; want %d, %s", e.GetBuildId(), e.GetDrvPath(), accepted.GetBuildId(), r.path)
			}
		}
		up := m.uploaded()
		mustBeOrdered(t, "upload", up, s.localRefs)
		if diff := cmp.Diff([]nix.StorePath{base, middle, top}, slices.Sorted(slices.Values(up))); diff != "" {
			t.Errorf("uploaded (-want +got):\n%s", diff)
		}
		inputs := r.inputClosure()
		for _, p := range inputs {
			if !slices.Contains(m.store.Roots(), p) {
				t.Errorf("no temporary root for input %s", p)
			}
		}
		if diff := cmp.Diff(inputs, asked.Drv.InputSrcs); diff != "" {
			t.Errorf("inputs of the derivation asked for (-want +got):\n%s", diff)
		}
		if asked.DrvPath != r.path || asked.Options != (nix.BuildOptions{}) {
			t.Errorf("asked to build %s within %+v, want %s without limits", asked.DrvPath, asked.Options, r.path)
		}
		if diff := cmp.Diff([][]string{pathNames(r.outPaths())}, h.handOvers); diff != "" {
			t.Errorf("hand-overs (-want +got):\n%s", diff)
		}
		s.checkOutputs(r)
		s.checkBytes(m, "up", base, middle, top)
		s.checkBytes(m, "down", r.outPaths()...)
		last := func(get func(*dispatchv1.BuildEvent) *dispatchv1.Transfer) (found *dispatchv1.Transfer) {
			for _, e := range st.events {
				if tr := get(e); tr != nil {
					found = tr
				}
			}
			return found
		}
		down := last(func(e *dispatchv1.BuildEvent) *dispatchv1.Transfer { return e.GetFetching().GetTransfer() })
		if down.GetPaths() != 3 || down.GetBytes() == 0 {
			t.Errorf("progress of fetching %v, want 3 paths and their bytes", down)
		}
	})
}

// checkOutputs compares what the local store was given with what the machine has.
func (s *site) checkOutputs(r *recipe) {
	s.t.Helper()
	s.local.mu.Lock()
	imports := slices.Clone(s.local.imports)
	s.local.mu.Unlock()
	if len(imports) != len(r.outputs) {
		s.t.Errorf("%d imports, want %d", len(imports), len(r.outputs))
	}
	mustBeOrdered(s.t, "import", pathsOf(imports), s.localRefs)
	for _, got := range imports {
		var want nix.PathInfo
		for _, m := range s.machines {
			if info, _, ok := m.store.Get(got.Path); ok {
				want = info
			}
		}
		want.Ultimate = false // another host built it
		if diff := cmp.Diff(want, got); diff != "" {
			s.t.Errorf("import of %s (-on the machine +imported):\n%s", got.Path, diff)
		}
	}
}

// checkBytes compares nar_bytes_total with the sizes of paths.
func (s *site) checkBytes(m *fakeMachine, direction string, paths ...nix.StorePath) {
	s.t.Helper()
	var want uint64
	for _, p := range paths {
		info, _, _ := s.local.store.Get(p)
		want += info.NarSize
	}
	if got := testutil.ToFloat64(s.d.metrics.narBytes.WithLabelValues(m.uri(), direction)); got != float64(want) {
		s.t.Errorf("nar_bytes_total %s = %v, want %d", direction, got, want)
	}
}

func TestContentAddressIsKept(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		s := newSite(t, oneMachine(scheme))
		r := s.drv("fetched", drvConfig{fixed: true})
		s.mustBuild(r)
		s.checkOutputs(r)
		if got := s.local.imports[0].CA; !strings.HasPrefix(got, "fixed:") {
			t.Errorf("ca of the import = %q", got)
		}
	})
}

func TestValidOutputsAreNotFetched(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		s := newSite(t, m)
		r := s.drv("partly", drvConfig{outputs: []string{"dev", "out"}})
		r.put(s.local.store, "dev", r.outputs["dev"])
		h := s.hook()
		h.accepted(r)
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if diff := cmp.Diff([]nix.StorePath{r.out()}, s.local.imported()); diff != "" {
			t.Errorf("imported (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff([][]string{{string(r.out())}}, h.handOvers); diff != "" {
			t.Errorf("hand-overs (-want +got):\n%s", diff)
		}

		// Both are valid now: nothing travels and no lock is asked for.
		h = s.hook()
		h.accepted(r)
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if got := s.local.imported(); len(got) != 1 || len(h.handOvers) != 0 {
			t.Errorf("imported %v, hand-overs %v; want nothing new", got, h.handOvers)
		}
	})
}

func TestMachinesSubstituteInputsIfAsked(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		s := newSite(t, m)
		cached, rare := s.source("cached"), s.source("rare")
		m.store.Substitute = func(p nix.StorePath) {
			if p == cached {
				m.store.PutFile(p, "contents of cached")
			}
		}
		h := s.hook(func(h *dispatchv1.Hello) { h.BuildersUseSubstitutes = true })
		h.accepted(s.drv("thing", drvConfig{srcs: []nix.StorePath{cached, rare}}))
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if diff := cmp.Diff([]nix.StorePath{rare}, m.uploaded()); diff != "" {
			t.Errorf("uploaded (-want +got):\n%s", diff)
		}
		m.store.Remove(cached)
		s.mustBuild(s.drv("unasked", drvConfig{srcs: []nix.StorePath{cached, rare}}))
		if diff := cmp.Diff([]nix.StorePath{rare, cached}, m.uploaded()); diff != "" {
			t.Errorf("uploaded in all (-want +got):\n%s", diff)
		}
	})
}

func TestFailedDerivationIsNotRetried(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m, m2 := oneMachine(scheme), namedMachine(scheme, "m2")
		s := newSite(t, m, m2)
		r := s.drv("broken", drvConfig{})
		r.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "builder failed with exit code 3"}
		st := s.build(r)
		st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE)
		if got := st.finished; got.GetError() != r.fail.ErrorMsg || got.GetMachine() != m.uri() {
			t.Errorf("finished = %v, want the machine's words", got)
		}
		if want := strings.Join(r.log, "\n") + "\n"; st.log != want {
			t.Errorf("log = %q, want %q", st.log, want)
		}
		if len(m.built()) != 1 || len(m2.built()) != 0 {
			t.Errorf("built %v and %v, want one attempt", m.built(), m2.built())
		}
		if got := s.local.imported(); len(got) != 0 {
			t.Errorf("imported %v of a failed build", got)
		}
	})
}

func TestDistrustedUserSendsDerivationsWhole(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		m.trust = worker.NotTrusted
		m.build = func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult {
			if req.Drv != nil {
				return nix.BuildResult{Status: nix.MiscFailure,
					ErrorMsg: "error: you are not privileged to build input-addressed derivations"}
			}
			return m.site.recipe(req.DrvPath).build(m.store, req)
		}
		s := newSite(t, m)
		src := s.source("src")
		dep := s.drv("dep", drvConfig{srcs: []nix.StorePath{src}})
		depSrc := s.source("dep-result")
		dep.outputs["out"] = depSrc
		r := s.drv("thing", drvConfig{inputs: []*recipe{dep}})
		m.store.PutFile(depSrc, "contents of dep-result") // built there before
		st := s.mustBuild(r)
		if want := strings.Join(r.log, "\n") + "\n"; st.log != want {
			t.Errorf("log = %q, want that of the second attempt alone: %q", st.log, want)
		}
		up := m.uploaded()
		mustBeOrdered(t, "upload", up, s.localRefs)
		if diff := cmp.Diff(slices.Sorted(slices.Values([]nix.StorePath{src, dep.path, r.path})), slices.Sorted(slices.Values(up))); diff != "" {
			t.Errorf("uploaded (-want +got):\n%s", diff)
		}
		// The next build knows beforehand.
		attempts := len(m.built())
		s.mustBuild(s.drv("next", drvConfig{}))
		if got := len(m.built()) - attempts; got != 1 {
			t.Errorf("%d attempts of the next build, want 1", got)
		}
	})
}

// TestBuildersCannotMakeAMachineDistrustUs has builders say what a Nix daemon
// would.
func TestBuildersCannotMakeAMachineDistrustUs(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		s := newSite(t, m)
		const refusal = "error: you are not privileged to build input-addressed derivations"
		r := s.drv("liar", drvConfig{})
		r.log = []string{refusal}
		r.fail = &nix.BuildResult{Status: nix.PermanentFailure,
			ErrorMsg: "builder failed with exit code 1; last 1 log lines:\n> " + refusal + "\n" + refusal}
		s.build(r).mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE)
		if len(m.built()) != 1 || s.inUse(m).untrusted.Load() {
			t.Errorf("%d attempts, untrusted %v; want one and trust", len(m.built()), s.inUse(m).untrusted.Load())
		}
	})
}

func TestLateJoinersGiveUpTheirLocksToo(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		s := newSite(t, oneMachine(scheme))
		importing, goOn := make(chan struct{}), make(chan struct{})
		s.local.onImport(func(nix.PathInfo) error {
			close(importing)
			<-goOn
			return nil
		})
		r := s.drv("wanted", drvConfig{})
		first := s.hook()
		first.accepted(r)
		done := make(chan *story)
		go func() { done <- first.finish() }()
		if !closed(importing) {
			t.Fatal("nothing is imported")
		}
		late := s.hook()
		if got := late.accepted(r); got.GetMachineName() != s.machines["m1"].uri() {
			t.Errorf("reply to the second caller = %v, want the machine it is on", got)
		}
		late.onHandOver = func([]string) { close(goOn) }
		lateStory, firstStory := late.finish(), <-done
		lateStory.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if lateStory.log != firstStory.log || lateStory.log == "" {
			t.Errorf("log of the late one %q, of the first %q", lateStory.log, firstStory.log)
		}
		want := [][]string{{string(r.out())}}
		if diff := cmp.Diff(want, late.handOvers); diff != "" {
			t.Errorf("hand-overs of the late one (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(want, first.handOvers); diff != "" {
			t.Errorf("hand-overs of the first one (-want +got):\n%s", diff)
		}
	})
}
