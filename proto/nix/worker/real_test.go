package worker_test

import (
	"bytes"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker"
)

// eachNix runs f with a client of every real Nix there is.
func eachNix(t *testing.T, f func(t *testing.T, s *wiretest.RealStore, c *worker.Client, events *recorder)) {
	for _, real := range wiretest.RealNixes(t) {
		t.Run(real.Version, func(t *testing.T) {
			s := real.NewStore(t)
			out, in := s.Start("nix-daemon", "--stdio")
			events := &recorder{}
			c, err := worker.NewClient(out, in, events)
			if err != nil {
				t.Fatal(err)
			}
			if c.NixVersion() != real.Version {
				t.Errorf("the server calls itself %q, its program %q", c.NixVersion(), real.Version)
			}
			// The owner of the store is trusted, wherever trust is told.
			if told := c.Version() >= 1<<8|35; told != (c.Trust() == worker.Trusted) {
				t.Errorf("protocol %v: trust %d", c.Version(), c.Trust())
			}
			f(t, s, c, events)
		})
	}
}

func TestRealUploadQueryDump(t *testing.T) {
	eachNix(t, func(t *testing.T, s *wiretest.RealStore, c *worker.Client, _ *recorder) {
		nars := make(map[nix.StorePath][]byte)
		var infos []nix.PathInfo
		var paths []nix.StorePath
		for i, size := range []int{0, 1, 100_000, 3 << 20} {
			nar := wiretest.FileNAR(strings.Repeat("x", size))
			info := wiretest.Info(s.Path(i+1, "file"), nar, paths...)
			nars[info.Path] = nar
			infos = append(infos, info)
			paths = append(paths, info.Path)
		}
		last := &infos[3]
		last.References = append(slices.Clone(last.References), last.Path) // itself
		last.Deriver = s.Path(9, "file.drv")
		last.Sigs = []string{"key-1:" + strings.Repeat("A", 86) + "=="}
		missing := s.Path(8, "missing")

		if err := c.AddTempRoots(append(slices.Clone(paths), missing)); err != nil {
			t.Error(err)
		}
		if err := c.AddMultipleToStore(infos[:2], true, writeFrom(nars)); err != nil {
			t.Error(err)
		}
		for range 2 { // some, then all are valid
			if n, err := c.Upload(infos, true, writeFrom(nars)); n != len(infos) || err != nil {
				t.Fatalf("Upload = %d, %v", n, err)
			}
		}
		valid, err := c.QueryValidPaths(append(slices.Clone(paths), missing), true)
		if d := cmp.Diff(paths, valid); d != "" || err != nil {
			t.Errorf("QueryValidPaths: %v (-want +got)\n%s", err, d)
		}
		if ok, err := c.IsValidPath(missing); ok || err != nil {
			t.Errorf("IsValidPath of a missing path = %v, %v", ok, err)
		}
		got, err := c.QueryPathInfos(append([]nix.StorePath{missing}, paths...))
		if d := cmp.Diff(infos, got, cmpopts.EquateEmpty(), cmpopts.IgnoreFields(nix.PathInfo{}, "RegistrationTime")); d != "" || err != nil {
			t.Errorf("QueryPathInfos: %v (-want +got)\n%s", err, d)
		}
		for _, info := range infos {
			var nar bytes.Buffer
			if _, err := c.NarFromPath(info.Path, info.NarSize, &nar); err != nil || !bytes.Equal(nar.Bytes(), nars[info.Path]) {
				t.Errorf("NarFromPath(%s): %v", info.Path, err)
			}
		}
		if c.Err() != nil {
			t.Errorf("Err = %v", c.Err())
		}
		if _, err := c.NarFromPath(missing, 1, io.Discard); err == nil || !strings.Contains(err.Error(), "valid") || c.Err() == nil {
			t.Errorf("NarFromPath of a missing path = %v, Err %v", err, c.Err())
		}
	})
}

func TestRealErrorsLeaveTheConnectionInOrder(t *testing.T) {
	eachNix(t, func(t *testing.T, s *wiretest.RealStore, c *worker.Client, _ *recorder) {
		nar := wiretest.FileNAR(strings.Repeat("x", 1<<20))
		write := func(_ *nix.PathInfo, w io.Writer) error { _, err := w.Write(nar); return err }
		infos := []nix.PathInfo{wiretest.Info(s.Path(1, "a"), nar), wiretest.Info(s.Path(2, "b"), nar), wiretest.Info(s.Path(3, "c"), nar)}
		wrong := slices.Clone(infos)
		wrong[1].NarHash[0]++

		isRemote := func(what string, err error) {
			t.Helper()
			if _, ok := errors.AsType[*worker.RemoteError](err); !ok || c.Err() != nil {
				t.Errorf("%s: %v, want a RemoteError; Err %v", what, err, c.Err())
			}
		}
		isRemote("ensure a missing path", c.EnsurePath(s.Path(9, "missing")))
		n, err := c.Upload(wrong, true, write)
		isRemote("upload with a wrong hash", err)
		if n != 1 {
			t.Errorf("%d paths confirmed, want 1", n)
		}
		isRemote("the same at once", c.AddMultipleToStore(wrong[1:], true, write))
		errSource := errors.New("source")
		_, err = c.Upload(infos[1:], true, func(_ *nix.PathInfo, w io.Writer) error { w.Write(nar[:99_999]); return errSource })
		if !errors.Is(err, errSource) || c.Err() != nil {
			t.Errorf("upload that breaks off: %v; Err %v", err, c.Err())
		}
		if n, err := c.Upload(infos, true, write); n != 3 || err != nil {
			t.Errorf("Upload after errors = %d, %v", n, err)
		}
	})
}

func TestRealBuilds(t *testing.T) {
	eachNix(t, func(t *testing.T, s *wiretest.RealStore, c *worker.Client, events *recorder) {
		system := strings.Trim(strings.TrimSpace(string(s.Output("nix-instantiate", "--eval", "--expr", "builtins.currentSystem"))), `"`)
		if err := c.SetOptions(worker.Options{MaxJobs: 1, Verbosity: 3, Substitutes: true, Overrides: map[string]string{"timeout": "30"}}); err != nil {
			t.Fatal(err)
		}
		out := s.Path(2, "output")
		build := func(script string) nix.BuildResult {
			t.Helper()
			res, err := c.BuildDerivation(s.Path(3, "output.drv"), &nix.BasicDerivation{
				Outputs:  map[string]nix.DerivationOutput{"out": {Path: out}},
				Platform: system, Builder: "/bin/sh", Args: []string{"-c", script},
				Env: map[string]string{"out": string(out), "name": "output"},
			})
			if err != nil {
				t.Fatal(err)
			}
			return res
		}
		if res := build("exit 7"); res.Status != nix.PermanentFailure || !strings.Contains(res.ErrorMsg, "7") {
			t.Errorf("build that fails: %+v", res)
		}
		log := "line one\n@nix {\"action\":\"setPhase\",\"phase\":\"last\"}\nline two\n"
		events.buildLog = nil
		if res := build("printf '" + strings.ReplaceAll(log, "\n", `\n`) + "'; echo 1 > $out"); res.Status != nix.Built {
			t.Errorf("build: %+v", res)
		}
		if string(events.buildLog) != log {
			t.Errorf("log %q, want %q", events.buildLog, log)
		}
		if !slices.ContainsFunc(events.activities, func(a worker.Activity) bool { return a.Type == worker.ActBuild }) {
			t.Errorf("no activity of a build among %+v", events.activities)
		}
		if ok, err := c.IsValidPath(out); !ok || err != nil {
			t.Errorf("the output is valid: %v, %v", ok, err)
		}
		if res := build("exit 1"); res.Status != nix.AlreadyValid {
			t.Errorf("build of what is there: %+v", res)
		}
	})
}

func TestRealBuildPathsWithResults(t *testing.T) {
	eachNix(t, func(t *testing.T, s *wiretest.RealStore, c *worker.Client, _ *recorder) {
		good, bad := s.Instantiate("good", "echo 1 > $out"), s.Instantiate("bad", "exit 3")
		targets := []string{string(good) + "!*", string(bad) + "!out"}

		m, err := c.QueryMissing(targets)
		slices.Sort(m.WillBuild)
		want := []nix.StorePath{good, bad}
		slices.Sort(want)
		if d := cmp.Diff(want, m.WillBuild); d != "" || err != nil {
			t.Errorf("QueryMissing: %v (-want +got)\n%s", err, d)
		}
		if err := c.SetOptions(worker.Options{MaxJobs: 1, KeepGoing: true}); err != nil {
			t.Fatal(err)
		}
		results, err := c.BuildPathsWithResults(targets)
		if err != nil || len(results) != 2 {
			t.Fatalf("BuildPathsWithResults: %+v, %v", results, err)
		}
		status := make(map[string]nix.BuildStatus)
		for _, r := range results {
			status[r.Target] = r.Status
		}
		outputs, err := c.QueryDerivationOutputMap(good)
		if err != nil || outputs["out"] == "" {
			t.Errorf("QueryDerivationOutputMap = %v, %v", outputs, err)
		}
		if ok, err := c.IsValidPath(outputs["out"]); !ok || err != nil {
			t.Errorf("the output is valid: %v, %v", ok, err)
		}
		wantStatus := map[string]nix.BuildStatus{targets[0]: nix.Built, targets[1]: nix.PermanentFailure}
		if d := cmp.Diff(wantStatus, status); d != "" {
			t.Errorf("statuses (-want +got)\n%s", d)
		}
	})
}
