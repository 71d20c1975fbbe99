package worker_test

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/proto/nix/worker/workertest"
)

func connect(t *testing.T, s *workertest.Server, events worker.Events) *worker.Client {
	t.Helper()
	conn := s.Start()
	t.Cleanup(func() { conn.Close() })
	c, err := worker.NewClient(conn, conn, events)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// upload makes infos and NARs of n files that each refer to the one before.
func upload(n, size int) ([]nix.PathInfo, map[nix.StorePath][]byte) {
	var infos []nix.PathInfo
	nars := make(map[nix.StorePath][]byte)
	for i := range n {
		nar := wiretest.FileNAR(strings.Repeat(string(rune('a'+i%26)), size))
		info := wiretest.Info(wiretest.Path(i+1, "file"), nar)
		if i > 0 {
			info.References = []nix.StorePath{infos[i-1].Path}
		}
		infos = append(infos, info)
		nars[info.Path] = nar
	}
	return infos, nars
}

func writeFrom(nars map[nix.StorePath][]byte) worker.NarFunc {
	return func(info *nix.PathInfo, w io.Writer) error {
		_, err := w.Write(nars[info.Path])
		return err
	}
}

var (
	drvPath = wiretest.Path(8, "a.drv")
	drv     = &nix.BasicDerivation{
		Outputs:  map[string]nix.DerivationOutput{"out": {Path: wiretest.Path(9, "out")}},
		Platform: "x86_64-linux", Builder: "/bin/sh", Args: []string{"-c", "true"},
		Env: map[string]string{"out": string(wiretest.Path(9, "out"))},
	}
	versions = []wire.Version{1<<8 | 34, 1<<8 | 35, 1<<8 | 36, 1<<8 | 37, 1<<8 | 38, 1<<8 | 39}
)

// recorder keeps what it is told.
type recorder struct {
	logs       []string
	activities []worker.Activity
	stopped    []uint64
	buildLog   []byte
}

func (r *recorder) Log(text string)                 { r.logs = append(r.logs, text) }
func (r *recorder) StartActivity(a worker.Activity) { r.activities = append(r.activities, a) }
func (r *recorder) StopActivity(id uint64)          { r.stopped = append(r.stopped, id) }
func (r *recorder) Result(res worker.Result)        { r.buildLog = worker.AppendBuildLog(r.buildLog, res) }

func TestHandshakeTellsWhatThePeerIs(t *testing.T) {
	for _, version := range versions {
		for _, trust := range []worker.Trust{worker.TrustUnknown, worker.Trusted, worker.NotTrusted} {
			c := connect(t, &workertest.Server{Store: &wiretest.Store{}, Version: version, Trust: trust}, nil)
			want := trust
			if version < 1<<8|35 {
				want = worker.TrustUnknown
			}
			if c.Version() != min(version, 1<<8|38) || c.Trust() != want || c.NixVersion() != "2.fake" {
				t.Errorf("server %v, trust %d: version %v, trust %d, Nix %q", version, trust, c.Version(), c.Trust(), c.NixVersion())
			}
		}
	}
}

func TestHandshakeErrors(t *testing.T) {
	for _, tt := range []struct {
		name   string
		server workertest.Server
		want   wire.HandshakeFault
	}{
		{"noise", workertest.Server{Noise: "Welcome!\n"}, wire.Noise},
		{"too old", workertest.Server{Version: 1<<8 | 33}, wire.UnsupportedVersion},
		{"next major", workertest.Server{Version: 2 << 8}, wire.UnsupportedVersion},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := tt.server.Start()
			defer conn.Close()
			_, err := worker.NewClient(conn, conn, nil)
			if e, ok := errors.AsType[*wire.HandshakeError](err); !ok || e.Fault != tt.want {
				t.Errorf("NewClient = %v, want fault %v", err, tt.want)
			}
		})
	}
	t.Run("refused", func(t *testing.T) {
		conn := (&workertest.Server{Refuse: "user 'x' is not allowed"}).Start()
		defer conn.Close()
		_, err := worker.NewClient(conn, conn, nil)
		if e, ok := errors.AsType[*worker.RemoteError](err); !ok || e.Message != "user 'x' is not allowed" {
			t.Errorf("NewClient = %v, want the server's refusal", err)
		}
	})
	t.Run("closed in the middle", func(t *testing.T) {
		client, server := wiretest.Pipe(1 << 10)
		w := wire.NewWriter(server)
		w.Uint64(0x6478696f)
		w.Uint64(1<<8 | 35)
		w.Flush()
		server.CloseWrite()
		_, err := worker.NewClient(client, client, nil)
		if e, ok := errors.AsType[*wire.HandshakeError](err); !ok || e.Fault != wire.Closed || !e.Greeted {
			t.Errorf("NewClient = %v, want Closed after the greeting", err)
		}
	})
}

func TestQueriesWithEveryVersion(t *testing.T) {
	for _, version := range versions {
		t.Run(version.String(), func(t *testing.T) {
			outputs := map[string]nix.StorePath{"out": wiretest.Path(9, "out"), "doc": ""}
			store := &wiretest.Store{Outputs: func(nix.StorePath) map[string]nix.StorePath { return outputs }}
			c := connect(t, &workertest.Server{Store: store, Version: version}, nil)
			a := store.PutFile(wiretest.Path(1, "a"), "aaa")
			b := store.PutFile(wiretest.Path(2, "b"), "bbb", a.Path)
			b.Deriver, b.RegistrationTime, b.Ultimate = drvPath, time.Unix(9, 0), true
			b.Sigs, b.CA = []string{"k:s", "k:t"}, "text:sha256:x"
			store.Put(b, wiretest.FileNAR("bbb"))
			missing := wiretest.Path(3, "missing")

			for path, want := range map[nix.StorePath]bool{a.Path: true, missing: false} {
				if got, err := c.IsValidPath(path); got != want || err != nil {
					t.Errorf("IsValidPath(%s) = %v, %v", path, got, err)
				}
			}
			valid, err := c.QueryValidPaths([]nix.StorePath{b.Path, missing, a.Path}, false)
			if d := cmp.Diff([]nix.StorePath{a.Path, b.Path}, valid); d != "" || err != nil {
				t.Errorf("QueryValidPaths: %v (-want +got)\n%s", err, d)
			}
			infos, err := c.QueryPathInfos([]nix.StorePath{b.Path, missing, a.Path})
			if d := cmp.Diff([]nix.PathInfo{b, a}, infos, cmpopts.EquateEmpty()); d != "" || err != nil {
				t.Errorf("QueryPathInfos: %v (-want +got)\n%s", err, d)
			}
			if _, ok, err := c.QueryPathInfo(missing); ok || err != nil {
				t.Errorf("QueryPathInfo of a path that is not valid = %v, %v", ok, err)
			}
			var nar bytes.Buffer
			if n, err := c.NarFromPath(b.Path, b.NarSize, &nar); err != nil || n != int64(b.NarSize) || !bytes.Equal(nar.Bytes(), wiretest.FileNAR("bbb")) {
				t.Errorf("NarFromPath = %d, %v", n, err)
			}
			if err := c.AddTempRoots([]nix.StorePath{a.Path, missing}); err != nil {
				t.Error(err)
			}
			if d := cmp.Diff([]nix.StorePath{a.Path, missing}, store.Roots()); d != "" {
				t.Errorf("temporary roots (-want +got)\n%s", d)
			}
			if err := c.AddIndirectRoot("/home/x/result"); err != nil {
				t.Error(err)
			}
			if err := c.EnsurePath(a.Path); err != nil {
				t.Error(err)
			}
			got, err := c.QueryDerivationOutputMap(drvPath)
			if d := cmp.Diff(outputs, got); d != "" || err != nil {
				t.Errorf("QueryDerivationOutputMap: %v (-want +got)\n%s", err, d)
			}
			m, err := c.QueryMissing([]string{string(drvPath) + "!*", string(missing), string(a.Path)})
			want := worker.Missing{WillBuild: []nix.StorePath{drvPath}, Unknown: []nix.StorePath{missing}}
			if d := cmp.Diff(want, m); d != "" || err != nil {
				t.Errorf("QueryMissing: %v (-want +got)\n%s", err, d)
			}
		})
	}
}

func TestAnErrorOfTheServerLeavesTheConnectionInOrder(t *testing.T) {
	store := &wiretest.Store{}
	c := connect(t, &workertest.Server{Store: store}, nil)
	err := c.EnsurePath(wiretest.Path(1, "missing"))
	e, ok := errors.AsType[*worker.RemoteError](err)
	if !ok {
		t.Fatalf("EnsurePath = %v, want a RemoteError", err)
	}
	want := &worker.RemoteError{
		Message: "path '" + string(wiretest.Path(1, "missing")) + "' does not exist and cannot be created",
		Traces:  []string{"while performing an operation"},
	}
	if d := cmp.Diff(*want, *e); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if c.Err() != nil {
		t.Errorf("Err = %v", c.Err())
	}
	if _, err := c.IsValidPath(wiretest.Path(1, "missing")); err != nil {
		t.Errorf("the next operation: %v", err)
	}
}

func TestNarOfAnInvalidPathTellsTheServersReason(t *testing.T) {
	c := connect(t, &workertest.Server{Store: &wiretest.Store{}}, nil)
	n, err := c.NarFromPath(wiretest.Path(1, "missing"), 1, io.Discard)
	e, ok := errors.AsType[*worker.RemoteError](err)
	if !ok || !strings.Contains(e.Message, "is not valid") || n != 0 {
		t.Errorf("NarFromPath = %d, %v, want a RemoteError", n, err)
	}
	if c.Err() == nil {
		t.Error("the client calls itself usable, though the server closes now")
	}
}

func TestNotValidAsAnError(t *testing.T) {
	answer := func(msg string) *worker.Client {
		return scripted(t, func(w *wire.Writer) {
			w.Uint64(0x63787470)
			w.String("Error")
			w.Uint64(0)
			w.String("Error")
			w.String(msg)
			w.Uint64(0)
			w.Uint64(0)
		})
	}
	if _, ok, err := answer("path '/nix/store/…' is not valid").QueryPathInfo(wiretest.Path(1, "x")); ok || err != nil {
		t.Errorf("QueryPathInfo = %v, %v; want not valid, no error", ok, err)
	}
	if _, _, err := answer("disk on fire").QueryPathInfo(wiretest.Path(1, "x")); err == nil {
		t.Error("another error is taken for not valid")
	}
}

// scripted is a client of a server that has already said all it will say.
func scripted(t *testing.T, answer func(w *wire.Writer)) *worker.Client {
	t.Helper()
	var b bytes.Buffer
	w := wire.NewWriter(&b)
	w.Uint64(0x6478696f)
	w.Uint64(1<<8 | 35)
	w.String("2.x")
	w.Uint64(1)
	w.Uint64(0x616c7473)
	answer(w)
	w.Flush()
	c, err := worker.NewClient(&b, io.Discard, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSetOptions(t *testing.T) {
	var got worker.Options
	c := connect(t, &workertest.Server{Store: &wiretest.Store{}, Options: func(o worker.Options) { got = o }}, nil)
	want := worker.Options{
		KeepFailed: true, Fallback: true, Verbosity: 3, MaxJobs: 4, MaxSilentTime: time.Minute,
		QuietBuilds: true, Cores: 5, Substitutes: true, Overrides: map[string]string{"timeout": "7", "a": "b"},
	}
	if err := c.SetOptions(want); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-sent +received)\n%s", d)
	}
}

func TestBuildsWithEveryVersion(t *testing.T) {
	for _, version := range versions {
		t.Run(version.String(), func(t *testing.T) {
			result := nix.BuildResult{
				TimesBuilt: 1, StartTime: time.Unix(5, 0), StopTime: time.Unix(6, 0),
				BuiltOutputs: map[string]nix.StorePath{"out": wiretest.Path(9, "out")},
			}
			var asked wiretest.BuildRequest
			store := &wiretest.Store{Build: func(req wiretest.BuildRequest) nix.BuildResult {
				asked = req
				req.Log("line 1")
				req.Log("line 2")
				return result
			}}
			events := &recorder{}
			c := connect(t, &workertest.Server{Store: store, Version: version}, events)
			res, err := c.BuildDerivation(drvPath, drv)
			if d := cmp.Diff(result, res); d != "" || err != nil {
				t.Errorf("BuildDerivation: %v (-want +got)\n%s", err, d)
			}
			if d := cmp.Diff(drv, asked.Drv, cmpopts.EquateEmpty()); d != "" || asked.DrvPath != drvPath {
				t.Errorf("the server was asked to build %s (-want +got)\n%s", asked.DrvPath, d)
			}
			if string(events.buildLog) != "line 1\nline 2\n" || len(events.activities) != 1 || len(events.stopped) != 1 {
				t.Errorf("events %+v", events)
			}
			wantActivity := worker.Activity{
				ID: 42, Level: 3, Type: worker.ActBuild, Text: "building '" + string(drvPath) + "'",
				Fields: []worker.Field{{IsText: true, Text: string(drvPath)}, {Number: 1}},
			}
			if d := cmp.Diff(wantActivity, events.activities[0]); d != "" {
				t.Errorf("activity (-want +got)\n%s", d)
			}
			result = nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "it failed"}
			results, err := c.BuildPathsWithResults([]string{string(drvPath) + "!*", string(wiretest.Path(3, "missing"))})
			want := []worker.TargetResult{
				{Target: string(drvPath) + "!*", BuildResult: result},
				{Target: string(wiretest.Path(3, "missing")), BuildResult: nix.BuildResult{Status: nix.NoSubstituters, ErrorMsg: "no substituter"}},
			}
			if d := cmp.Diff(want, results, cmpopts.EquateEmpty()); d != "" || err != nil {
				t.Errorf("BuildPathsWithResults: %v (-want +got)\n%s", err, d)
			}
		})
	}
}

func TestUntrustedUserMayNotBuildInputAddressed(t *testing.T) {
	store := &wiretest.Store{Build: func(wiretest.BuildRequest) nix.BuildResult { return nix.BuildResult{} }}
	c := connect(t, &workertest.Server{Store: store, Trust: worker.NotTrusted}, nil)
	_, err := c.BuildDerivation(drvPath, drv)
	if e, ok := errors.AsType[*worker.RemoteError](err); !ok || !strings.Contains(e.Message, "not privileged") {
		t.Errorf("BuildDerivation = %v, want the server's refusal", err)
	}
	if c.Err() != nil {
		t.Errorf("Err = %v", c.Err())
	}
}

func TestClosingTheTransportEndsEveryOperation(t *testing.T) {
	infos, nars := upload(3, 1000)
	path, paths := infos[0].Path, []nix.StorePath{infos[0].Path, infos[1].Path}
	for name, op := range operations(path, paths, infos, nars) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := wiretest.Pipe(60)
				go func() {
					r, w := wire.NewReader(io.LimitReader(server, 32)), wire.NewWriter(server)
					r.Uint64()
					w.Uint64(0x6478696f)
					w.Uint64(1<<8 | 34)
					w.Flush()
					w.String("2.8")
					w.Uint64(0x616c7473)
					w.Flush()
				}()
				c, err := worker.NewClient(client, client, nil)
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					time.Sleep(time.Minute)
					client.Close()
				}()
				if err := op(c); err == nil || c.Err() == nil {
					t.Errorf("%s = %v, Err = %v after the transport was closed", name, err, c.Err())
				}
				if err := op(c); !errors.Is(err, io.ErrClosedPipe) {
					t.Errorf("%s on an unusable client = %v, want the first error inside", name, err)
				}
			})
		})
	}
}

func operations(path nix.StorePath, paths []nix.StorePath, infos []nix.PathInfo, nars map[nix.StorePath][]byte) map[string]func(c *worker.Client) error {
	return map[string]func(c *worker.Client) error{
		"SetOptions":      func(c *worker.Client) error { return c.SetOptions(worker.Options{}) },
		"IsValidPath":     func(c *worker.Client) error { _, err := c.IsValidPath(path); return err },
		"QueryValidPaths": func(c *worker.Client) error { _, err := c.QueryValidPaths(paths, true); return err },
		"QueryPathInfos":  func(c *worker.Client) error { _, err := c.QueryPathInfos(paths); return err },
		"NarFromPath":     func(c *worker.Client) error { _, err := c.NarFromPath(path, 1, io.Discard); return err },
		"AddTempRoots":    func(c *worker.Client) error { return c.AddTempRoots(paths) },
		"AddIndirectRoot": func(c *worker.Client) error { return c.AddIndirectRoot("/home/somebody/somewhere/result") },
		"EnsurePath":      func(c *worker.Client) error { return c.EnsurePath(path) },
		"QueryDerivationOutputMap": func(c *worker.Client) error {
			_, err := c.QueryDerivationOutputMap(drvPath)
			return err
		},
		"QueryMissing":    func(c *worker.Client) error { _, err := c.QueryMissing([]string{string(path)}); return err },
		"BuildDerivation": func(c *worker.Client) error { _, err := c.BuildDerivation(drvPath, drv); return err },
		"BuildPathsWithResults": func(c *worker.Client) error {
			_, err := c.BuildPathsWithResults([]string{string(path)})
			return err
		},
		"Upload": func(c *worker.Client) error { _, err := c.Upload(infos, true, writeFrom(nars)); return err },
		"AddMultipleToStore": func(c *worker.Client) error {
			return c.AddMultipleToStore(infos, true, writeFrom(nars))
		},
	}
}

// FuzzClient lets a server send arbitrary bytes: every operation must end, and
// its outcome must fit the state of the client.
func FuzzClient(f *testing.F) {
	last := "stla\x00\x00\x00\x00"
	one := "\x01\x00\x00\x00\x00\x00\x00\x00"
	f.Add([]byte{})
	f.Add([]byte(last + one))
	f.Add([]byte(last + strings.Repeat("\x00", 64)))
	f.Add(append([]byte(last), wiretest.FileNAR("x")...))
	f.Add([]byte("ptxc\x00\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00Error\x00\x00\x00" + strings.Repeat("\x00", 40)))
	f.Add([]byte("gmlo\x00\x00\x00\x00" + one + "x\x00\x00\x00\x00\x00\x00\x00" + last))
	f.Add([]byte("TRTS\x00\x00\x00\x00" + strings.Repeat(one, 3) + one + "x\x00\x00\x00\x00\x00\x00\x00" + one + one + one + last))
	infos, nars := upload(2, 10)
	ops := operations(infos[0].Path, []nix.StorePath{infos[0].Path, infos[1].Path}, infos, nars)
	f.Fuzz(func(t *testing.T, data []byte) {
		for name, op := range ops {
			c := scripted(t, func(w *wire.Writer) { w.Write(data) })
			c.Events = &recorder{}
			err := op(c)
			_, remote := errors.AsType[*worker.RemoteError](err)
			if c.Err() != nil && err == nil || c.Err() == nil && err != nil && !remote {
				t.Errorf("%s: %v, Err %v", name, err, c.Err())
			}
		}
	})
}
