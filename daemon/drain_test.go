package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func (s *site) drain(name string) *dispatchv1.DrainResponse {
	s.t.Helper()
	r, err := s.client.Drain(s.t.Context(), &dispatchv1.DrainRequest{Machine: name})
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

func TestDrainedMachineFinishesAndTakesNoMore(t *testing.T) {
	t.Parallel()
	m1, m2 := oneMachine("ssh"), namedMachine("ssh", "m2")
	m1.slots = 3
	open := make(chan struct{})
	m1.build = m1.gated(open)
	s := newSite(t, m1, m2)
	running := s.hook()
	running.accepted(s.drv("running", drvConfig{}))
	s.eventually("it runs on m1", func() bool { return m1.building() == 1 })
	if r := s.drain("m1"); r.GetMachine() != m1.uri() || r.GetBuilds() != 1 {
		t.Errorf("Drain = %v, want %s and one build", r, m1.uri())
	}
	got := s.machineStatus(m1)
	if got.GetState() != dispatchv1.MachineState_MACHINE_STATE_DRAINING || !got.GetDrained() || !strings.Contains(got.GetReason(), "by uid ") {
		t.Errorf("drained machine = %v", got)
	}
	if n := s.metric("nix_dispatch_machine_drained", map[string]string{"machine": m1.uri()}); n != 1 {
		t.Errorf("machine_drained = %v, want 1", n)
	}
	for _, name := range []string{"a", "b"} {
		s.mustBuild(s.drv(name, drvConfig{}))
	}
	if len(m2.built()) != 2 {
		t.Errorf("the other machine built %v, want both", m2.built())
	}
	close(open)
	running.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	if _, err := s.client.Undrain(t.Context(), &dispatchv1.UndrainRequest{Machine: m1.uri()}); err != nil {
		t.Fatal(err)
	}
	s.mustBuild(s.drv("c", drvConfig{}))
	if len(m1.built()) != 2 || s.machineStatus(m1).GetDrained() {
		t.Errorf("after undrain the machine built %v: %v", m1.built(), s.machineStatus(m1))
	}
}

func TestDrainSurvivesARestart(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	options := func(o *Options) { o.StateDir = state }
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{oneMachine("ssh")}, options: options})
	s.drain("m1")
	s.stop()
	m := oneMachine("ssh")
	m.late = true // it is not up, but drained
	s = newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, options: options})
	s.eventually("it is drained", func() bool {
		return s.machineStatus(m).GetState() == dispatchv1.MachineState_MACHINE_STATE_DRAINING
	})
	files, err := filepath.Glob(filepath.Join(state, drainedFile+"*"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{filepath.Join(state, drainedFile)}, files); diff != "" {
		t.Errorf("files in the state directory (-want +got):\n%s", diff)
	}
}

func TestCorruptDrainedFileIsReported(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	write(t, filepath.Join(state, drainedFile), `[{"uri":"ssh://m1"`)
	m := oneMachine("ssh")
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, options: func(o *Options) { o.StateDir = state }})
	errs := s.status().GetErrors()
	if len(errs) != 1 || errs[0].GetFile() != filepath.Join(state, drainedFile) || !strings.Contains(errs[0].GetMessage(), "unexpected end of JSON") {
		t.Errorf("errors = %v, want the file's", errs)
	}
	s.mustBuild(s.drv("thing", drvConfig{}))
	s.drain("m1")
	if errs := s.status().GetErrors(); len(errs) != 0 {
		t.Errorf("errors = %v after the file was written anew", errs)
	}
	if drained, err := readDrained(state); err != nil || drained[m.uri()].URI == "" {
		t.Errorf("readDrained = %v, %v", drained, err)
	}
}

func TestDrainErrors(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{oneMachine("ssh")}, builders: "ssh-ng://m1"})
	for name, want := range map[string]codes.Code{"": codes.NotFound, "m3": codes.NotFound, "m1": codes.InvalidArgument} {
		_, err := s.client.Drain(t.Context(), &dispatchv1.DrainRequest{Machine: name})
		if status.Code(err) != want {
			t.Errorf("Drain(%q) = %v, want %v", name, err, want)
		}
	}
	if r := s.drain("ssh-ng://m1"); r.GetMachine() != "ssh-ng://m1" {
		t.Errorf("Drain = %v", r)
	}
	if err := os.RemoveAll(s.d.opts.StateDir); err != nil {
		t.Fatal(err)
	}
	_, err := s.client.Drain(t.Context(), &dispatchv1.DrainRequest{Machine: "ssh://m1"})
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("Drain without a state directory = %v, want FAILED_PRECONDITION", err)
	}
	for _, m := range s.status().GetMachines() {
		if m.GetDrained() != (m.GetUri() == "ssh-ng://m1") {
			t.Errorf("machine = %v: what cannot be written down is not done", m)
		}
	}
}

func TestStrangersCommandNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	srv := &server{d: s.d}
	ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: peerInfo{caller: caller{uid: 4242}}})
	_, drain := srv.Drain(ctx, &dispatchv1.DrainRequest{Machine: "m1"})
	_, undrain := srv.Undrain(ctx, &dispatchv1.UndrainRequest{Machine: "m1"})
	_, reload := srv.Reload(ctx, &dispatchv1.ReloadRequest{})
	_, nobody := srv.Reload(t.Context(), &dispatchv1.ReloadRequest{})
	for name, err := range map[string]error{"drain": drain, "undrain": undrain, "reload": reload, "reload by nobody known": nobody} {
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s = %v, want PERMISSION_DENIED", name, err)
		}
	}
}

func FuzzParseDrained(f *testing.F) {
	f.Add([]byte(`[{"uri":"ssh://mac","since":"2026-11-22T23:00:00Z","by":"uid 0"}]`))
	f.Add([]byte(`[]`))
	f.Add([]byte(`[{}]`))
	f.Add([]byte(`{"uri":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		drained := make(map[string]drain)
		if parseDrained(data, drained) != nil {
			return
		}
		dir := t.TempDir()
		if err := writeDrained(dir, drained); err != nil {
			return // a time that JSON cannot hold
		}
		again, err := readDrained(dir)
		if err != nil || !cmp.Equal(again, drained, cmp.Comparer(func(a, b time.Time) bool { return a.Equal(b) })) {
			t.Errorf("written and read again: %v, %v; want %v", again, err, drained)
		}
	})
}
