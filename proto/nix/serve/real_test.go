package serve_test

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/serve"
	"nixdispatch/proto/nix/wire/wiretest"
)

// eachNix runs f with a client of every real Nix there is.
func eachNix(t *testing.T, f func(t *testing.T, s *wiretest.RealStore, c *serve.Client)) {
	for _, real := range wiretest.RealNixes(t) {
		t.Run(real.Version, func(t *testing.T) {
			s := real.NewStore(t)
			f(t, s, connectReal(t, s))
		})
	}
}

func connectReal(t *testing.T, s *wiretest.RealStore) *serve.Client {
	t.Helper()
	out, in := s.Start("nix-store", "--serve", "--write")
	c, err := serve.NewClient(out, in)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRealUploadQueryDump(t *testing.T) {
	eachNix(t, func(t *testing.T, s *wiretest.RealStore, c *serve.Client) {
		nars := make(map[nix.StorePath][]byte)
		var infos []nix.PathInfo
		for i, size := range []int{0, 1, 100_000, 3 << 20} {
			nar := wiretest.FileNAR(strings.Repeat("x", size))
			info := wiretest.Info(s.Path(i+1, "file"), nar)
			for _, before := range infos {
				info.References = append(info.References, before.Path)
			}
			nars[info.Path] = nar
			infos = append(infos, info)
		}
		last := &infos[3]
		last.References = append(last.References, last.Path) // itself
		last.Deriver = s.Path(9, "file.drv")
		last.Sigs = []string{"key-1:" + strings.Repeat("A", 86) + "=="}

		for range 2 { // the second time all are valid
			if n, err := c.Upload(infos, writeFrom(nars)); n != len(infos) || err != nil {
				t.Fatalf("Upload = %d, %v", n, err)
			}
		}
		missing := s.Path(8, "missing")
		asked := []nix.StorePath{missing}
		for _, info := range infos {
			asked = append(asked, info.Path)
		}
		valid, err := c.QueryValidPaths(asked, true, true)
		if d := cmp.Diff(asked[1:], valid); d != "" || err != nil {
			t.Errorf("QueryValidPaths: %v (-want +got)\n%s", err, d)
		}
		got, err := c.QueryPathInfos(asked)
		if d := cmp.Diff(infos, got, cmpopts.EquateEmpty()); d != "" || err != nil {
			t.Errorf("QueryPathInfos: %v (-want +got)\n%s", err, d)
		}
		for _, info := range infos {
			var nar bytes.Buffer
			if _, err := c.DumpStorePath(info.Path, info.NarSize, &nar); err != nil || !bytes.Equal(nar.Bytes(), nars[info.Path]) {
				t.Errorf("DumpStorePath(%s): %v", info.Path, err)
			}
		}
		if _, err := c.DumpStorePath(missing, 1, io.Discard); err == nil || c.Err() == nil {
			t.Errorf("DumpStorePath of a missing path = %v, Err %v", err, c.Err())
		}
	})
}

func TestRealDumpOfATree(t *testing.T) {
	eachNix(t, func(t *testing.T, s *wiretest.RealStore, c *serve.Client) {
		host, inside := s.File("tree")
		files := map[string]string{"a": "1", "a.b": "", "B/deep/er/file": strings.Repeat("z", 200_001), "\xff\xfe": "odd name", "run": "#!/bin/sh\n"}
		for name, content := range files {
			path := filepath.Join(host, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chmod(filepath.Join(host, "run"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("../nowhere", filepath.Join(host, "link")); err != nil {
			t.Fatal(err)
		}
		want := s.Output("nix-store", "--dump", inside)
		path := nix.StorePath(strings.TrimSpace(string(s.Output("nix-store", "--add", inside))))
		var got bytes.Buffer
		if _, err := c.DumpStorePath(path, uint64(len(want)), &got); err != nil || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("DumpStorePath: %v; %d bytes, nix-store --dump gives %d", err, got.Len(), len(want))
		}
	})
}

func TestRealBuilds(t *testing.T) {
	eachNix(t, func(t *testing.T, s *wiretest.RealStore, c *serve.Client) {
		input := wiretest.FileNAR("input")
		info := wiretest.Info(s.Path(1, "input"), input)
		if _, err := c.Upload([]nix.PathInfo{info}, func(_ *nix.PathInfo, w io.Writer) error { _, err := w.Write(input); return err }); err != nil {
			t.Fatal(err)
		}
		out := s.Path(2, "output")
		derivation := func(script string) *nix.BasicDerivation {
			return &nix.BasicDerivation{
				Outputs: map[string]nix.DerivationOutput{"out": {Path: out}}, InputSrcs: []nix.StorePath{info.Path},
				Platform: "builtin", Builder: "/bin/sh", Args: []string{"-c", script},
				Env: map[string]string{"out": string(out), "in": string(info.Path), "name": "output"},
			}
		}
		build := func(script string, opts nix.BuildOptions) nix.BuildResult {
			t.Helper()
			drv := derivation(script)
			drv.Platform = strings.TrimSpace(string(s.Output("nix-instantiate", "--eval", "--expr", "builtins.currentSystem")))
			drv.Platform = strings.Trim(drv.Platform, `"`)
			res, err := c.BuildDerivation(s.Path(3, "output.drv"), drv, opts)
			if err != nil {
				t.Fatal(err)
			}
			return res
		}
		if res := build("echo no >&2; exit 7", nix.BuildOptions{}); res.Status != nix.PermanentFailure || !strings.Contains(res.ErrorMsg, "7") {
			t.Errorf("build that fails: %+v", res)
		}
		if res := build("/bin/sleep 60", nix.BuildOptions{Timeout: time.Second}); res.Status != nix.TimedOut {
			t.Errorf("build that takes too long: %+v", res)
		}
		if res := build("read a < $in; echo $a $in > $out", nix.BuildOptions{KeepFailed: true}); res.Status != nix.Built || res.ErrorMsg != "" {
			t.Errorf("build: %+v", res)
		}
		infos, err := c.QueryPathInfos([]nix.StorePath{out})
		if err != nil || len(infos) != 1 || !cmp.Equal(infos[0].References, []nix.StorePath{info.Path}) {
			t.Errorf("the output is %+v, %v", infos, err)
		}
		if res := build("exit 1", nix.BuildOptions{}); res.Status != nix.AlreadyValid {
			t.Errorf("build of what is there: %+v", res)
		}
	})
}

func TestRealBuildPaths(t *testing.T) {
	eachNix(t, func(t *testing.T, s *wiretest.RealStore, c *serve.Client) {
		good, bad := s.Instantiate("good", "echo 1 > $out"), s.Instantiate("bad", "echo a reason; exit 3")
		res, err := c.BuildPaths([]string{string(good) + "!out"}, nix.BuildOptions{})
		if err != nil || res.Status != nix.Built {
			t.Errorf("BuildPaths = %+v, %v", res, err)
		}
		res, err = c.BuildPaths([]string{string(bad)}, nix.BuildOptions{})
		if err != nil || res.Status != nix.PermanentFailure || !strings.Contains(res.ErrorMsg, "bad.drv") {
			t.Errorf("BuildPaths of what fails = %+v, %v", res, err)
		}
		if c.Err() != nil {
			t.Errorf("Err = %v", c.Err())
		}
	})
}

func TestRealUploadRefused(t *testing.T) {
	eachNix(t, func(t *testing.T, s *wiretest.RealStore, c *serve.Client) {
		nar := wiretest.FileNAR("x")
		infos := []nix.PathInfo{wiretest.Info(s.Path(1, "a"), nar), wiretest.Info(s.Path(2, "b"), nar), wiretest.Info(s.Path(3, "c"), nar)}
		infos[1].NarHash[0]++
		n, err := c.Upload(infos, func(_ *nix.PathInfo, w io.Writer) error { _, err := w.Write(nar); return err })
		if n != 1 || err == nil || c.Err() == nil {
			t.Errorf("Upload with a wrong hash = %d, %v; Err %v", n, err, c.Err())
		}
	})
}
