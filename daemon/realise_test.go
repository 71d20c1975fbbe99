package daemon

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

// asked makes a request for derivations.
func asked(drvs ...*recipe) *dispatchv1.BuildRequest {
	req := new(dispatchv1.BuildRequest)
	for _, r := range drvs {
		req.Derivations = append(req.Derivations, string(r.path))
	}
	return req
}

func (r *realising) mustSucceed(t *testing.T) {
	t.Helper()
	if r.err != nil || !r.summary.GetSuccess() {
		t.Fatalf("Build = %v, summary %v; want success", r.err, r.summary)
	}
}

func TestRealiseBuildsInOrder(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		m.slots = 2
		s := newSite(t, m)
		bottom := s.drv("bottom", drvConfig{srcs: []nix.StorePath{s.source("src")}})
		left := s.drv("left", drvConfig{inputs: []*recipe{bottom}})
		right := s.drv("right", drvConfig{inputs: []*recipe{bottom}})
		top := s.drv("top", drvConfig{inputs: []*recipe{left, right}, outputs: []string{"dev", "out"}})
		left.refs["out"] = []nix.StorePath{bottom.out()}
		got := s.realise(asked(top))
		got.mustSucceed(t)
		if len(got.order) != 4 || got.order[0] != bottom.path || got.order[3] != top.path {
			t.Errorf("built in the order %v, want bottom first and top last", got.order)
		}
		all := pathNames([]nix.StorePath{bottom.path, left.path, right.path, top.path})
		if diff := cmp.Diff(all, slices.Sorted(slices.Values(got.plan.GetWillBuild()))); diff != "" {
			t.Errorf("plan (-want +got):\n%s", diff)
		}
		want := []string{"dev " + string(top.outputs["dev"]), "out " + string(top.out())}
		var outputs []string
		for _, o := range got.summary.GetOutputs() {
			outputs = append(outputs, o.GetName()+" "+o.GetPath())
			if o.GetDrvPath() != string(top.path) || !s.local.valid(nix.StorePath(o.GetPath())) {
				t.Errorf("output %v is of another derivation or not valid", o)
			}
		}
		if diff := cmp.Diff(want, outputs); diff != "" {
			t.Errorf("outputs (-want +got):\n%s", diff)
		}
		for _, r := range []*recipe{bottom, left, right, top} {
			st := got.stories[r.path]
			st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
			if st.log != strings.Join(r.log, "\n")+"\n" || st.finished.GetMachine() != m.uri() {
				t.Errorf("story of %s: log %q on %s", r.path.Name(), st.log, st.finished.GetMachine())
			}
			if count(m.built(), r.path) != 1 {
				t.Errorf("%s was built %d times", r.path.Name(), count(m.built(), r.path))
			}
			for _, p := range append(r.outPaths(), r.path) {
				if r == top && p == r.path || p != r.path {
					if !slices.Contains(s.local.store.Roots(), p) {
						t.Errorf("no temporary root for %s", p)
					}
				}
			}
		}
		// Outputs of its inputs, which the machine has built itself, do not travel up.
		mustBeOrdered(t, "upload", m.uploaded(), s.localRefs)
		if len(s.local.builtHere()) != 0 {
			t.Errorf("the local Nix built %v", s.local.builtHere())
		}
		// Again: all is valid, and nothing is done.
		again := s.realise(asked(top))
		again.mustSucceed(t)
		if len(again.order) != 0 || len(again.plan.GetWillBuild()) != 0 || len(again.summary.GetOutputs()) != 2 {
			t.Errorf("of what is valid: built %v, plan %v, summary %v", again.order, again.plan, again.summary)
		}
	})
}

func TestRealiseOnlyTheOutputsAskedFor(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	r := s.drv("thing", drvConfig{outputs: []string{"dev", "out"}})
	r.put(s.local.store, "dev", r.outputs["dev"])
	got := s.realise(&dispatchv1.BuildRequest{Derivations: []string{string(r.path) + "!dev"}})
	got.mustSucceed(t)
	if len(got.order) != 0 || len(got.summary.GetOutputs()) != 1 || got.summary.GetOutputs()[0].GetName() != "dev" {
		t.Errorf("built %v, outputs %v; want dev as it was", got.order, got.summary.GetOutputs())
	}
}

func TestRealiseFailure(t *testing.T) {
	t.Parallel()
	for _, keepGoing := range []bool{false, true} {
		t.Run(fmt.Sprintf("keep going %v", keepGoing), func(t *testing.T) {
			t.Parallel()
			m := oneMachine("ssh-ng")
			m.slots = 2
			open := make(chan struct{})
			s := newSite(t, m)
			broken, slow := s.drv("broken", drvConfig{}), s.drv("slow", drvConfig{})
			user := s.drv("user", drvConfig{inputs: []*recipe{broken}})
			other := s.drv("other", drvConfig{inputs: []*recipe{slow}})
			broken.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "exit code 1"}
			m.buildWith(func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
				if req.DrvPath == broken.path { // not before the other one runs
					s.eventually("both are being built", func() bool { return m.building() == 2 })
				}
				if req.DrvPath == slow.path {
					return m.gated(open)(ctx, req)
				}
				return m.site.recipe(req.DrvPath).build(m.store, req)
			})
			if keepGoing {
				go func() {
					s.eventually("the broken one has failed", func() bool { return m.building() == 1 && len(m.built()) == 2 })
					close(open)
				}()
			}
			req := asked(user, other)
			req.KeepGoing = keepGoing
			got := s.realise(req)
			if got.err != nil || got.summary.GetSuccess() {
				t.Fatalf("Build = %v, summary %v; want a summary of failure", got.err, got.summary)
			}
			if diff := cmp.Diff([]string{string(broken.path)}, got.summary.GetFailed()); diff != "" {
				t.Errorf("failed (-want +got):\n%s", diff)
			}
			got.stories[broken.path].mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_PERMANENT_FAILURE)
			if got.stories[user.path] != nil || slices.Contains(m.built(), user.path) {
				t.Error("what needs the failed one was tried")
			}
			if built := slices.Contains(m.built(), other.path); built != keepGoing {
				t.Errorf("the independent one was built: %v, want %v", built, keepGoing)
			}
			if outputs := got.summary.GetOutputs(); (len(outputs) == 1) != keepGoing {
				t.Errorf("outputs = %v", outputs)
			}
			s.idle()
			s.eventually("nothing runs on the machine", func() bool { return m.building() == 0 })
		})
	}
}

func TestRealiseLeavesToTheLocalNixWhatIsIts(t *testing.T) {
	t.Parallel()
	env := func(k, v string) map[string]string { return map[string]string{k: v} }
	tests := []struct {
		name  string
		drv   drvConfig
		local bool
	}{
		{"builtin", drvConfig{system: "builtin"}, true},
		{"preferLocalBuild", drvConfig{env: env("preferLocalBuild", "1")}, true},
		{"preferLocalBuild of another system", drvConfig{system: "i686-linux", env: env("preferLocalBuild", "1")}, false},
		{"no machine has the feature", drvConfig{env: env("requiredSystemFeatures", "benchmark")}, true},
		{"no machine has the system", drvConfig{system: "riscv64-linux"}, true},
		{"floating", drvConfig{floating: true}, true},
		{"an ordinary one", drvConfig{}, false},
	}
	m := oneMachine("ssh")
	m.system = nixSystem() + ",i686-linux"
	s := newSite(t, m)
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := s.drv("thing", tt.drv)
			got := s.realise(asked(r))
			got.mustSucceed(t)
			st := got.stories[r.path]
			if local := slices.Contains(s.local.builtHere(), r.path); local != tt.local || slices.Contains(m.built(), r.path) == tt.local {
				t.Errorf("built locally: %v, want %v", local, tt.local)
			}
			if want := strings.Join(r.log, "\n") + "\n"; st.log != want {
				t.Errorf("log = %q, want %q", st.log, want)
			}
			machine := m.uri()
			if tt.local {
				machine = ""
			}
			if diff := cmp.Diff([]string{machine}, st.placed()); diff != "" || st.finished.GetMachine() != machine {
				t.Errorf("placed (-want +got):\n%s and finished on %q", diff, st.finished.GetMachine())
			}
		})
	}
}

// What no machine can build and the local Nix cannot either fails with both reasons.
func TestRealiseExplainsWhatNothingCanBuild(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	s := newSite(t, m)
	r := s.drv("thing", drvConfig{system: "riscv64-linux"})
	r.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "platform mismatch"}
	got := s.realise(asked(r)).stories[r.path].finished.GetError()
	explained := s.explain(&dispatchv1.ExplainRequest{DrvPath: string(r.path)}).GetText()
	if want := "platform mismatch\n" + explained; got != want || !strings.Contains(got, m.uri()+" does not support system riscv64-linux") {
		t.Errorf("error %q, want %q", got, want)
	}
}

func TestRealiseEnforcesLimitsOnLocalBuilds(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	stop := make(chan struct{})
	s.local.mu.Lock()
	s.local.build = func(wiretest.BuildRequest) nix.BuildResult {
		<-stop
		return nix.BuildResult{Status: nix.Built}
	}
	s.local.mu.Unlock()
	t.Cleanup(func() { close(stop) })
	req := asked(s.drv("endless", drvConfig{system: "builtin"}))
	req.Limits = &dispatchv1.Limits{Timeout: durationpb.New(time.Second)} // on a busy host it may not have begun by then
	got := s.realise(req)
	if got.summary.GetSuccess() {
		t.Fatalf("summary = %v, want failure", got.summary)
	}
	got.stories[nix.StorePath(req.Derivations[0])].mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT)
}

func TestRealiseSubstitutes(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	s := newSite(t, m)
	cached := s.drv("cached", drvConfig{})
	top := s.drv("top", drvConfig{inputs: []*recipe{cached}})
	s.local.substitutable[cached.out()] = "from the cache"
	got := s.realise(asked(top))
	got.mustSucceed(t)
	if diff := cmp.Diff([]string{string(cached.out())}, got.plan.GetWillSubstitute()); diff != "" {
		t.Errorf("plan's substitutes (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]nix.StorePath{top.path}, m.built()); diff != "" {
		t.Errorf("built (-want +got):\n%s", diff)
	}
	if !slices.Contains(m.uploaded(), cached.out()) {
		t.Error("the substituted input did not go to the machine")
	}
}

// TestRealiseBuildsWhileItSubstitutes has a substitute that comes only after
// another derivation is built.
func TestRealiseBuildsWhileItSubstitutes(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	s := newSite(t, m)
	slow, quick := s.drv("slow", drvConfig{}), s.drv("quick", drvConfig{})
	top := s.drv("top", drvConfig{inputs: []*recipe{slow, quick}})
	s.local.substitutable[slow.out()] = "from a slow cache"
	substitute := s.local.store.Substitute
	s.local.store.Substitute = func(p nix.StorePath) {
		if p == slow.out() {
			s.eventually("the other derivation is built meanwhile", func() bool {
				return slices.Contains(m.built(), quick.path)
			})
		}
		substitute(p)
	}
	s.realise(asked(top)).mustSucceed(t)
	if diff := cmp.Diff([]nix.StorePath{quick.path, top.path}, m.built()); diff != "" {
		t.Errorf("built (-want +got):\n%s", diff)
	}
}

func TestRealiseWithoutASubstituteThatWasPromised(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	cached := s.drv("cached", drvConfig{})
	top := s.drv("top", drvConfig{inputs: []*recipe{cached}})
	s.local.substitutable[cached.out()] = "from the cache"
	s.local.store.Substitute = nil // it is gone
	got := s.realise(asked(top))
	if got.err != nil || got.summary.GetSuccess() {
		t.Fatalf("Build = %v, summary %v; want a summary of failure", got.err, got.summary)
	}
	if e := got.stories[top.path].finished.GetError(); !strings.Contains(e, string(cached.out())) {
		t.Errorf("error %q does not name what is missing", e)
	}
}

func TestRealiseErrors(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	good := s.drv("good", drvConfig{})
	absent := s.drv("absent", drvConfig{absent: true})
	invalid := s.drv("invalid", drvConfig{})
	s.local.store.Remove(invalid.path)
	garbage := s.path("garbage.drv")
	s.writeDrv(garbage, "Derive(")
	tests := []struct {
		name string
		ask  []string
		code codes.Code
		want string
	}{
		{"nothing", nil, codes.InvalidArgument, "no derivation"},
		{"no store path", []string{"hello"}, codes.InvalidArgument, "hello"},
		{"no derivation", []string{string(s.source("text"))}, codes.InvalidArgument, "not a derivation"},
		{"another store", []string{string(wiretest.Path(1, "x.drv"))}, codes.InvalidArgument, "/nix/store"},
		{"unknown output", []string{string(good.path) + "!man"}, codes.InvalidArgument, `no output "man", only out`},
		{"not there", []string{string(good.path), string(absent.path)}, codes.NotFound, string(absent.path)},
		{"not valid", []string{string(invalid.path)}, codes.NotFound, string(invalid.path)},
		{"garbage", []string{string(garbage)}, codes.InvalidArgument, "parse derivation"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := s.realise(&dispatchv1.BuildRequest{Derivations: tt.ask})
			if status.Code(got.err) != tt.code || !strings.Contains(got.err.Error(), tt.want) {
				t.Errorf("Build = %v, want %v with %q", got.err, tt.code, tt.want)
			}
		})
	}
}

func TestRealiseWithoutALocalStore(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{prepare: func(s *site) {
		s.d.stores.own.Socket, s.d.stores.own.awayMost = s.dir+"/../store", 100*time.Millisecond
	}})
	got := s.realise(asked(s.drv("thing", drvConfig{})))
	if status.Code(got.err) != codes.FailedPrecondition || !strings.Contains(got.err.Error(), "nix-daemon") {
		t.Errorf("Build = %v, want FailedPrecondition that tells of nix-daemon", got.err)
	}
}

func TestEndingABuildCallCancelsWhatNobodyElseWaitsFor(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.slots = 2
	open := make(chan struct{})
	m.build = m.gated(open)
	s := newSite(t, m)
	mine, shared := s.drv("mine", drvConfig{}), s.drv("shared", drvConfig{})
	h := s.hook()
	h.accepted(shared)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := s.client.Build(ctx, asked(mine, shared))
	if err != nil {
		t.Fatal(err)
	}
	s.eventually("both are being built", func() bool { return m.building() == 2 })
	cancel()
	if got := readBuild(stream); status.Code(got.err) != codes.Canceled {
		t.Errorf("Build = %v, want Canceled", got.err)
	}
	s.eventually("one is left", func() bool { return m.building() == 1 })
	close(open)
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	s.idle()
}
