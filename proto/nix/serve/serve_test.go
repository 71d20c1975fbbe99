package serve_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/serve"
	"nixdispatch/proto/nix/serve/servetest"
	"nixdispatch/proto/nix/wire"
	"nixdispatch/proto/nix/wire/wiretest"
)

func connect(t *testing.T, s *servetest.Server) (*serve.Client, *wiretest.Conn) {
	t.Helper()
	conn := s.Start()
	t.Cleanup(func() { conn.Close() })
	c, err := serve.NewClient(conn, conn)
	if err != nil {
		t.Fatal(err)
	}
	return c, conn
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

func writeFrom(nars map[nix.StorePath][]byte) serve.NarFunc {
	return func(info *nix.PathInfo, w io.Writer) error {
		_, err := w.Write(nars[info.Path])
		return err
	}
}

var drv = &nix.BasicDerivation{
	Outputs:  map[string]nix.DerivationOutput{"out": {Path: wiretest.Path(9, "out")}},
	Platform: "x86_64-linux", Builder: "/bin/sh", Args: []string{"-c", "true"},
	Env: map[string]string{"out": string(wiretest.Path(9, "out"))},
}

func TestEveryOperationWithEveryVersion(t *testing.T) {
	for _, version := range []wire.Version{2<<8 | 5, 2<<8 | 6, 2<<8 | 7, 2<<8 | 8} {
		t.Run(version.String(), func(t *testing.T) { everyOperation(t, version) })
	}
}

func everyOperation(t *testing.T, version wire.Version) {
	var built wiretest.BuildRequest
	result := nix.BuildResult{
		TimesBuilt: 1, StartTime: time.Unix(5, 0), StopTime: time.Unix(6, 0),
		BuiltOutputs: map[string]nix.StorePath{"out": wiretest.Path(9, "out")},
	}
	store := &wiretest.Store{Build: func(req wiretest.BuildRequest) nix.BuildResult { built = req; return result }}
	c, _ := connect(t, &servetest.Server{Store: store, Version: version})
	if want := min(version, 2<<8|7); c.Version() != want {
		t.Errorf("version %v, want %v", c.Version(), want)
	}

	infos, nars := upload(3, 1000)
	infos[1].Sigs, infos[1].CA, infos[1].Deriver = []string{"k:s"}, "text:sha256:x", wiretest.Path(8, "a.drv")
	if n, err := c.Upload(infos, writeFrom(nars)); n != 3 || err != nil {
		t.Fatalf("Upload = %d, %v", n, err)
	}
	missing := wiretest.Path(7, "missing")
	asked := []nix.StorePath{infos[2].Path, missing, infos[0].Path, infos[1].Path}
	valid, err := c.QueryValidPaths(asked, true, false)
	if d := cmp.Diff([]nix.StorePath{infos[0].Path, infos[1].Path, infos[2].Path}, valid); d != "" || err != nil {
		t.Errorf("QueryValidPaths: %v (-want +got)\n%s", err, d)
	}
	if roots := store.Roots(); len(roots) != len(asked) {
		t.Errorf("%d temporary roots after a query with lock, want %d", len(roots), len(asked))
	}
	got, err := c.QueryPathInfos(asked)
	if d := cmp.Diff(infos, got, cmpopts.EquateEmpty()); d != "" || err != nil {
		t.Errorf("QueryPathInfos: %v (-want +got)\n%s", err, d)
	}
	var nar bytes.Buffer
	if n, err := c.DumpStorePath(infos[1].Path, infos[1].NarSize, &nar); err != nil || n != int64(nar.Len()) || !bytes.Equal(nar.Bytes(), nars[infos[1].Path]) {
		t.Errorf("DumpStorePath = %d, %v", n, err)
	}

	opts := nix.BuildOptions{MaxSilentTime: 1500 * time.Millisecond, Timeout: time.Minute, MaxLogSize: 99, KeepFailed: true}
	res, err := c.BuildDerivation(wiretest.Path(8, "a.drv"), drv, opts)
	want := result
	if version < 2<<8|6 {
		want.BuiltOutputs = nil
	}
	if d := cmp.Diff(want, res); d != "" || err != nil {
		t.Errorf("BuildDerivation: %v (-want +got)\n%s", err, d)
	}
	opts.MaxSilentTime = 2 * time.Second // rounded up
	opts.KeepFailed = version >= 2<<8|7
	if d := cmp.Diff(wiretest.BuildRequest{DrvPath: wiretest.Path(8, "a.drv"), Drv: drv, Options: opts}, built,
		cmpopts.IgnoreFields(wiretest.BuildRequest{}, "Log"), cmpopts.EquateEmpty()); d != "" {
		t.Errorf("the server was asked (-want +got)\n%s", d)
	}
	buildPaths(t, c, &result)
	if c.Err() != nil {
		t.Errorf("Err = %v after operations that went well", c.Err())
	}
}

func buildPaths(t *testing.T, c *serve.Client, result *nix.BuildResult) {
	t.Helper()
	for _, status := range []nix.BuildStatus{nix.Built, nix.PermanentFailure, nix.TimedOut, nix.OutputRejected, nix.NotDeterministic, nix.MiscFailure} {
		*result = nix.BuildResult{Status: status}
		if status != nix.Built {
			result.ErrorMsg = "it failed"
		}
		res, err := c.BuildPaths([]string{string(wiretest.Path(8, "a.drv")) + "!out"}, nix.BuildOptions{})
		if d := cmp.Diff(*result, res); d != "" || err != nil {
			t.Errorf("BuildPaths of a build that ends with %v: %v (-want +got)\n%s", status, err, d)
		}
	}
}

func TestUploadNeedsNoRoundTripForEachPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		infos, nars := upload(50, 100)
		client, server := wiretest.Pipe(1 << 20)
		go func() {
			// Reads everything before it answers anything.
			r, w := wire.NewReader(server), wire.NewWriter(server)
			r.Uint64()
			r.Uint64()
			w.Uint64(0x5452eecb)
			w.Uint64(2<<8 | 7)
			w.Flush()
			for range infos {
				r.Uint64()
				info := r.PathInfo()
				r.CopyN(io.Discard, info.NarSize)
			}
			for range infos {
				w.Uint64(1)
			}
			w.Flush()
		}()
		c, err := serve.NewClient(client, client)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := c.Upload(infos, writeFrom(nars)); n != 50 || err != nil {
			t.Errorf("Upload = %d, %v", n, err)
		}
	})
}

func TestUploadOfMuchMoreThanFitsTheTransport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &wiretest.Store{}
		conn := (&servetest.Server{Store: store}).Start()
		defer conn.Close()
		c, err := serve.NewClient(conn, conn)
		if err != nil {
			t.Fatal(err)
		}
		infos, nars := upload(20_000, 10) // 160 KB of answers, with 64 KB of room
		if n, err := c.Upload(infos, writeFrom(nars)); n != len(infos) || err != nil {
			t.Errorf("Upload = %d, %v", n, err)
		}
		infos, nars = upload(8, 1<<20)
		if n, err := c.Upload(infos, writeFrom(nars)); n != len(infos) || err != nil {
			t.Errorf("Upload = %d, %v", n, err)
		}
	})
}

func TestUploadThatFailsTellsHowFarItCame(t *testing.T) {
	errSource := errors.New("no such path here")
	tests := []struct {
		name     string
		refuse   int // index the server refuses, or -1
		write    func(i int, nar []byte, w io.Writer) error
		done     int
		want     error
		unusable bool
	}{
		{"server refuses the third", 2, nil, 2, nil, true},
		{"third cannot be read", -1, func(i int, nar []byte, w io.Writer) error {
			if i == 2 {
				return errSource
			}
			_, err := w.Write(nar)
			return err
		}, 2, errSource, false},
		{"third breaks off", -1, func(i int, nar []byte, w io.Writer) error {
			if i == 2 {
				w.Write(nar[:len(nar)-8])
				return errSource
			}
			_, err := w.Write(nar)
			return err
		}, 2, errSource, true},
		{"third is too short", -1, func(i int, nar []byte, w io.Writer) error {
			if i == 2 {
				nar = nar[8:]
			}
			_, err := w.Write(nar)
			return err
		}, 2, nil, true},
		{"third is too long, which its writer ignores", -1, func(i int, nar []byte, w io.Writer) error {
			w.Write(nar)
			if i == 2 {
				w.Write(nar)
			}
			return nil
		}, 2, nil, true},
		{"third is not written", -1, func(i int, nar []byte, w io.Writer) error {
			if i == 2 {
				return nil
			}
			_, err := w.Write(nar)
			return err
		}, 2, nil, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				infos, nars := upload(6, 200_000)
				store := &wiretest.Store{BeforeAdd: func(info nix.PathInfo) error {
					if tt.refuse >= 0 && info.Path == infos[tt.refuse].Path {
						return errors.New("disk full")
					}
					return nil
				}}
				conn := (&servetest.Server{Store: store}).Start()
				defer conn.Close()
				c, err := serve.NewClient(conn, conn)
				if err != nil {
					t.Fatal(err)
				}
				write := writeFrom(nars)
				if tt.write != nil {
					i := -1
					write = func(info *nix.PathInfo, w io.Writer) error { i++; return tt.write(i, nars[info.Path], w) }
				}
				n, err := c.Upload(infos, write)
				if n != tt.done || err == nil || tt.want != nil && !errors.Is(err, tt.want) {
					t.Errorf("Upload = %d, %v; want %d, %v", n, err, tt.done, tt.want)
				}
				if !strings.Contains(fmt.Sprint(err), string(infos[2].Path)) {
					t.Errorf("error %v does not name the path", err)
				}
				if (c.Err() != nil) != tt.unusable {
					t.Errorf("Err = %v, want unusable %v", c.Err(), tt.unusable)
				}
				valid, err := c.QueryValidPaths([]nix.StorePath{infos[0].Path}, false, false)
				if (err != nil) != tt.unusable || err == nil && len(valid) != 1 {
					t.Errorf("the next operation: %v, %v", valid, err)
				}
			})
		})
	}
}

func TestClosingTheTransportEndsEveryOperation(t *testing.T) {
	infos, nars := upload(3, 1000)
	ops := map[string]func(c *serve.Client) error{
		"QueryValidPaths": func(c *serve.Client) error {
			_, err := c.QueryValidPaths([]nix.StorePath{infos[0].Path}, true, true)
			return err
		},
		"QueryPathInfos": func(c *serve.Client) error {
			_, err := c.QueryPathInfos([]nix.StorePath{infos[0].Path})
			return err
		},
		"DumpStorePath": func(c *serve.Client) error {
			_, err := c.DumpStorePath(infos[0].Path, infos[0].NarSize, io.Discard)
			return err
		},
		"Upload": func(c *serve.Client) error { _, err := c.Upload(infos, writeFrom(nars)); return err },
		"BuildDerivation": func(c *serve.Client) error {
			_, err := c.BuildDerivation(wiretest.Path(8, "a.drv"), drv, nix.BuildOptions{})
			return err
		},
		"BuildPaths": func(c *serve.Client) error {
			_, err := c.BuildPaths([]string{string(wiretest.Path(8, "a.drv"))}, nix.BuildOptions{})
			return err
		},
	}
	for name, op := range ops {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := wiretest.Pipe(100) // too little for any of the requests
				go func() {
					r, w := wire.NewReader(io.LimitReader(server, 16)), wire.NewWriter(server)
					r.Uint64()
					w.Uint64(0x5452eecb)
					w.Uint64(2<<8 | 7)
					w.Flush()
				}()
				c, err := serve.NewClient(client, client)
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

func TestAnswersThatMakeNoSense(t *testing.T) {
	infos, nars := upload(1, 10)
	other := wiretest.Path(77, "other")
	tests := []struct {
		name   string
		answer func(w *wire.Writer)
		op     func(c *serve.Client) error
	}{
		{"info of a path not asked for", func(w *wire.Writer) { w.StorePath(other) }, func(c *serve.Client) error {
			_, err := c.QueryPathInfos([]nix.StorePath{infos[0].Path})
			return err
		}},
		{"more valid paths than asked for", func(w *wire.Writer) { w.StorePathSet([]nix.StorePath{other, other}) }, func(c *serve.Client) error {
			_, err := c.QueryValidPaths([]nix.StorePath{infos[0].Path}, false, false)
			return err
		}},
		{"upload answered with 2", func(w *wire.Writer) { w.Uint64(2) }, func(c *serve.Client) error {
			_, err := c.Upload(infos, writeFrom(nars))
			return err
		}},
		{"text instead of a NAR", func(w *wire.Writer) { io.WriteString(w, "error: no such path") }, func(c *serve.Client) error {
			_, err := c.DumpStorePath(infos[0].Path, infos[0].NarSize, io.Discard)
			return err
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			client, server := wiretest.Pipe(1 << 20)
			w := wire.NewWriter(server)
			w.Uint64(0x5452eecb)
			w.Uint64(2<<8 | 7)
			tt.answer(w)
			w.Flush()
			c, err := serve.NewClient(client, client)
			if err != nil {
				t.Fatal(err)
			}
			if err := tt.op(c); err == nil || c.Err() == nil {
				t.Errorf("error %v, Err %v", err, c.Err())
			}
		})
	}
}

func TestHandshakeErrors(t *testing.T) {
	for _, tt := range []struct {
		name   string
		server servetest.Server
		want   wire.HandshakeFault
	}{
		{"noise", servetest.Server{Noise: "Welcome!\n"}, wire.Noise},
		{"too old", servetest.Server{Version: 2<<8 | 4}, wire.UnsupportedVersion},
		{"next major", servetest.Server{Version: 3 << 8}, wire.UnsupportedVersion},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := tt.server.Start()
			defer conn.Close()
			_, err := serve.NewClient(conn, conn)
			if e, ok := errors.AsType[*wire.HandshakeError](err); !ok || e.Fault != tt.want {
				t.Errorf("NewClient = %v, want fault %v", err, tt.want)
			}
		})
	}
	t.Run("message and end before we wrote", func(t *testing.T) {
		client, server := wiretest.Pipe(1 << 10)
		io.WriteString(server, "This account is currently not available.\n")
		server.Close()
		_, err := serve.NewClient(client, client)
		e, ok := errors.AsType[*wire.HandshakeError](err)
		if !ok || e.Fault != wire.Noise || !slices.Equal(e.Got, []byte("This account is currently not available.\n")) {
			t.Errorf("NewClient = %v, want the message", err)
		}
	})
}

// FuzzClient lets a server send arbitrary bytes: every operation must end, and
// either succeed or make the client unusable.
func FuzzClient(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add(append([]byte{0, 0, 0, 0, 0, 0, 0, 0}, wiretest.FileNAR("x")...))
	infos, nars := upload(2, 10)
	hello := []byte("\xcb\xee\x52\x54\x00\x00\x00\x00\x07\x02\x00\x00\x00\x00\x00\x00")
	f.Fuzz(func(t *testing.T, data []byte) {
		for i, op := range []func(c *serve.Client) error{
			func(c *serve.Client) error {
				_, err := c.QueryValidPaths([]nix.StorePath{infos[0].Path}, true, true)
				return err
			},
			func(c *serve.Client) error { _, err := c.QueryPathInfos([]nix.StorePath{infos[0].Path}); return err },
			func(c *serve.Client) error {
				_, err := c.DumpStorePath(infos[0].Path, infos[0].NarSize, io.Discard)
				return err
			},
			func(c *serve.Client) error { _, err := c.Upload(infos, writeFrom(nars)); return err },
			func(c *serve.Client) error {
				_, err := c.BuildDerivation(wiretest.Path(8, "a.drv"), drv, nix.BuildOptions{})
				return err
			},
			func(c *serve.Client) error { _, err := c.BuildPaths(nil, nix.BuildOptions{}); return err },
		} {
			c, err := serve.NewClient(io.MultiReader(bytes.NewReader(hello), bytes.NewReader(data)), io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			if err := op(c); (err == nil) != (c.Err() == nil) {
				t.Errorf("operation %d: %v, Err %v", i, err, c.Err())
			}
		}
	})
}
