package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
)

// vanish cuts the machine off for good.
func (m *fakeMachine) vanish() {
	m.ssh.FailDials(errors.New("no route to host"))
	m.ssh.Cut()
}

func TestMachineFaultsMoveTheBuild(t *testing.T) {
	t.Parallel()
	// spoil has a build succeed whose output is not what it seems.
	spoil := func(m *fakeMachine, change func(info *nix.PathInfo, nar []byte)) {
		m.build = func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult {
			result := m.site.recipe(req.DrvPath).build(m.store, req)
			p := m.site.recipe(req.DrvPath).out()
			info, nar, _ := m.store.Get(p)
			nar = slices.Clone(nar)
			change(&info, nar)
			if info.Path == p {
				m.store.Put(info, nar)
			} else {
				m.store.Remove(p)
			}
			return result
		}
	}
	tests := []struct {
		name string
		// harm is done to the first machine before the site starts, or after.
		harm  func(m *fakeMachine)
		after func(s *site, m *fakeMachine)
		error string
		size  int
		twice bool // the builder runs on both
		moved bool // by the scheduler, which hears of it as soon
	}{
		{name: "an output with a wrong hash", twice: true, error: "hash mismatch", harm: func(m *fakeMachine) {
			spoil(m, func(info *nix.PathInfo, _ []byte) { info.NarHash[0] ^= 1 })
		}},
		{name: "an output that was changed", twice: true, error: "hash mismatch", harm: func(m *fakeMachine) {
			spoil(m, func(_ *nix.PathInfo, nar []byte) { nar[len(nar)-40] ^= 1 })
		}},
		{name: "an output that is no NAR", twice: true, error: "copy outputs", harm: func(m *fakeMachine) {
			spoil(m, func(_ *nix.PathInfo, nar []byte) { nar[8] ^= 1 })
		}},
		{name: "an output of another size", twice: true, error: "copy outputs", harm: func(m *fakeMachine) {
			spoil(m, func(info *nix.PathInfo, _ []byte) { info.NarSize -= 8 })
		}},
		{name: "an output that refers to what is not there", twice: true, error: "which is not an input", harm: func(m *fakeMachine) {
			spoil(m, func(info *nix.PathInfo, _ []byte) {
				info.References = append(info.References, wiretest.Path(999, "elsewhere"))
			})
		}},
		{name: "an output that is not there", twice: true, error: "is not valid there", harm: func(m *fakeMachine) {
			spoil(m, func(info *nix.PathInfo, _ []byte) { info.Path = "" })
		}},
		{name: "refuses an input", error: "copy inputs", after: func(_ *site, m *fakeMachine) {
			m.onUpload(func(nix.PathInfo) error { return errors.New("disk full") })
		}},
		{name: "never says which inputs it lacks", error: "ask which inputs are missing: it stopped taking and giving data for 200ms", after: func(s *site, m *fakeMachine) {
			s.inUse(m).copyStall = 200 * time.Millisecond
			m.onQuestion(func() { <-s.t.Context().Done() })
		}},
		{name: "never says whether its store is another", error: "look at its store: it stopped taking and giving data for 200ms", after: func(s *site, m *fakeMachine) {
			s.inUse(m).copyStall = 200 * time.Millisecond
			s.inUse(m).others.forget()
			m.onQuestion(func() { <-s.t.Context().Done() })
		}},
		{name: "stops during the upload", error: "copy inputs: it stopped taking and giving data for 200ms", after: func(s *site, m *fakeMachine) {
			s.inUse(m).copyStall = 200 * time.Millisecond
			m.onUpload(func(nix.PathInfo) error { <-s.t.Context().Done(); return nil })
		}},
		{name: "vanishes during the upload", moved: true, after: func(_ *site, m *fakeMachine) {
			m.onUpload(func(nix.PathInfo) error { m.vanish(); return nil })
		}},
		{name: "vanishes during the build", twice: true, error: "build:", harm: func(m *fakeMachine) {
			m.build = func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
				m.vanish()
				return untilGone(ctx, req)
			}
		}},
		{name: "vanishes during the download", twice: true, error: "copy outputs", size: 5 << 20, after: func(s *site, m *fakeMachine) {
			var once sync.Once
			s.local.onImport(func(nix.PathInfo) error { once.Do(m.vanish); return nil })
		}},
		{name: "its disk is full", twice: true, error: "No space left", harm: func(m *fakeMachine) {
			m.build = func(context.Context, wiretest.BuildRequest) nix.BuildResult {
				return nix.BuildResult{Status: nix.TransientFailure, ErrorMsg: "write: No space left on device"}
			}
		}},
		{name: "refuses sessions", error: "open a session", after: func(_ *site, m *fakeMachine) {
			m.ssh.RefuseExec(true)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			eachScheme(t, func(t *testing.T, scheme string) {
				m, m2 := oneMachine(scheme), namedMachine(scheme, "m2")
				if tt.harm != nil {
					tt.harm(m)
				}
				s := newSite(t, m, m2)
				if tt.after != nil {
					tt.after(s, m)
				}
				r := s.drv("thing", drvConfig{srcs: []nix.StorePath{s.source("src")}})
				r.size = tt.size
				st := s.mustBuild(r)
				if diff := cmp.Diff([]string{m.uri(), m2.uri()}, st.placed()); diff != "" {
					t.Errorf("placed on (-want +got):\n%s", diff)
				}
				if got := st.finished.GetMachine(); got != m2.uri() {
					t.Errorf("finished on %s, want %s", got, m2.uri())
				}
				if want := 1; (len(m.built()) == want) != tt.twice {
					t.Errorf("the first machine built %v, want a build: %v", m.built(), tt.twice)
				}
				var reason string
				for _, e := range st.events {
					reason += e.GetQueued().GetReason()
				}
				if note := "nix-dispatch: machine " + m.uri(); !tt.moved && !strings.Contains("\n"+st.log, "\n"+note) {
					t.Errorf("the log does not tell of the attempt that failed: %q", st.log)
				}
				if !tt.moved && (!strings.Contains(reason, m.uri()) || !strings.Contains(reason, tt.error)) {
					t.Errorf("reason for trying again = %q, want it to name %s and %q", reason, m.uri(), tt.error)
				}
				if _, nar, _ := s.local.store.Get(r.out()); !strings.Contains(string(nar), "output out of "+string(r.path)) {
					t.Errorf("the output is not what was built")
				}
			})
		})
	}
}

// TestMachineLiesAboutAnOutput has a machine say of outputs what the derivation says
// otherwise, or what nix-daemon could not read.
func TestMachineLiesAboutAnOutput(t *testing.T) {
	t.Parallel()
	for _, fixed := range []bool{false, true} {
		eachScheme(t, func(t *testing.T, scheme string) {
			m := oneMachine(scheme)
			m.build = func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult {
				r := m.site.recipe(req.DrvPath)
				result := r.build(m.store, req)
				info, nar, _ := m.store.Get(r.out())
				info.CA = "fixed:r:sha256:" + strings.Repeat("1", 52)
				info.Deriver = wiretest.Path(998, "other.drv")
				info.Ultimate = true
				info.Sigs = []string{"no signature", ":c2ln", "key:", "key:?", "key:c2ln"}
				m.store.Put(info, nar)
				return result
			}
			s := newSite(t, m)
			r := s.drv("thing", drvConfig{fixed: fixed})
			s.mustBuild(r)
			got := s.local.imports[0]
			if want := r.drv.Outputs["out"].ContentAddress(); got.CA != want || (want != "") != fixed {
				t.Errorf("content address %q, want the derivation's, %q", got.CA, want)
			}
			if got.Deriver != r.path || got.Ultimate || !slices.Equal(got.Sigs, []string{"key:c2ln"}) {
				t.Errorf("imported as %+v", got)
			}
		})
	}
}

func TestAttemptsAreBounded(t *testing.T) {
	t.Parallel()
	var machines []*fakeMachine
	for n := range maxAttempts + 2 {
		machines = append(machines, namedMachine(schemes[n%2], fmt.Sprintf("m%d", n)))
	}
	s := newSite(t, machines...)
	var refused atomic.Int32
	for _, m := range machines {
		m.onUpload(func(nix.PathInfo) error { refused.Add(1); return errors.New("disk full") })
	}
	st := s.build(s.drv("thing", drvConfig{srcs: []nix.StorePath{s.source("src")}}))
	st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE)
	if got := refused.Load(); got != maxAttempts {
		t.Errorf("%d attempts, want %d", got, maxAttempts)
	}
	if last := machines[maxAttempts-1].uri(); st.finished.GetMachine() != last || !strings.Contains(st.finished.GetError(), last) {
		t.Errorf("finished = %v, want it to name the last machine tried, %s", st.finished, last)
	}
	s.idle()
}

func TestLostBuildKeepsItsSlot(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m, m2 := oneMachine(scheme), namedMachine(scheme, "m2")
		m.build = func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
			m.ssh.Cut() // and is back at once
			return untilGone(ctx, req)
		}
		s := newSite(t, m, m2)
		st := s.mustBuild(s.drv("thing", drvConfig{}))
		if got := st.finished.GetMachine(); got != m2.uri() {
			t.Errorf("finished on %s, want %s", got, m2.uri())
		}
		s.eventually("the machine is back", func() bool {
			return s.machineStatus(m).GetState() == dispatchv1.MachineState_MACHINE_STATE_UP
		})
		if got := s.machineStatus(m).GetRunning(); got != 1 {
			t.Errorf("%d slots in use after a build was lost, want 1", got)
		}
		if got := s.machineStatus(m2).GetRunning(); got != 0 {
			t.Errorf("%d slots in use on the other machine, want 0", got)
		}
	})
}

func TestLocalFaultIsNotBlamedOnAMachine(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m, m2 := oneMachine(scheme), namedMachine(scheme, "m2")
		s := newSite(t, m, m2)
		s.local.onImport(func(nix.PathInfo) error { return errors.New("no space left on device") })
		st := s.build(s.drv("thing", drvConfig{}))
		st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE)
		if got := st.finished; got.GetMachine() != "" || !strings.Contains(got.GetError(), "local store") ||
			!strings.Contains(got.GetError(), "no space left") {
			t.Errorf("finished = %v, want the local store's error and no machine", got)
		}
		if got := m2.built(); len(got) != 0 {
			t.Errorf("another machine built %v", got)
		}
		gone := s.source("gone")
		r := s.drv("needs-gone", drvConfig{srcs: []nix.StorePath{gone}})
		h := s.hook()
		h.accepted(r)
		s.local.store.Remove(gone)
		// Whether it is gone before the question or after it, this host is to blame.
		if st := h.finish(); st.finished.GetMachine() != "" && st.status() != dispatchv1.BuildStatus_BUILD_STATUS_BUILT {
			t.Errorf("finished = %v, want no machine blamed", st.finished)
		}
	})
}

func TestMachinesThatDoNotSpeakNix(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		harm func(m *fakeMachine)
		want []string
	}{
		{"noisy shell", func(m *fakeMachine) { m.noise = "Welcome to the machine!\n" }, []string{"Welcome to the machine!", "bashrc"}},
		{"no Nix", func(m *fakeMachine) { m.query = "?remote-program=nowhere" }, []string{"nowhere", "not found", "remote-program"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			eachScheme(t, func(t *testing.T, scheme string) {
				m := oneMachine(scheme)
				m.late = true
				tt.harm(m)
				s := newSite(t, m)
				s.eventually("the machine is down", func() bool {
					return s.machineStatus(m).GetState() == dispatchv1.MachineState_MACHINE_STATE_DOWN
				})
				for _, want := range tt.want {
					if got := s.machineStatus(m).GetReason(); !strings.Contains(got, want) {
						t.Errorf("reason %q does not tell %q", got, want)
					}
				}
			})
		})
	}
}
