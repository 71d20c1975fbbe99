package worker_test

import (
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/proto/nix/worker/workertest"
)

type uploadFunc func(c *worker.Client, infos []nix.PathInfo, write worker.NarFunc) error

var uploads = map[string]uploadFunc{
	"Upload": func(c *worker.Client, infos []nix.PathInfo, write worker.NarFunc) error {
		n, err := c.Upload(infos, true, write)
		if err == nil && n != len(infos) {
			return errors.New("not all confirmed and no error")
		}
		return err
	},
	"AddMultipleToStore": func(c *worker.Client, infos []nix.PathInfo, write worker.NarFunc) error {
		return c.AddMultipleToStore(infos, true, write)
	},
}

// onPair runs f with a client of server in a bubble that fails if a goroutine
// stays behind.
func onPair(t *testing.T, server *workertest.Server, f func(t *testing.T, c *worker.Client)) {
	synctest.Test(t, func(t *testing.T) {
		conn := server.Start()
		defer conn.Close()
		c, err := worker.NewClient(conn, conn, &recorder{})
		if err != nil {
			t.Fatal(err)
		}
		f(t, c)
	})
}

func TestUploadOfMuchMoreThanFitsTheTransport(t *testing.T) {
	for name, upload1 := range uploads {
		t.Run(name, func(t *testing.T) {
			store := &wiretest.Store{}
			onPair(t, &workertest.Server{Store: store}, func(t *testing.T, c *worker.Client) {
				// The server sends a message for each path, all together far more than
				// the 64 KiB there is room for.
				infos, nars := upload(3000, 10)
				if err := upload1(c, infos, writeFrom(nars)); err != nil {
					t.Error(err)
				}
				big, bigNars := upload(8, 1<<20)
				if err := upload1(c, big, writeFrom(bigNars)); err != nil {
					t.Error(err)
				}
				paths := make([]nix.StorePath, len(infos))
				for i := range infos {
					paths[i] = infos[i].Path
				}
				if got, err := c.QueryPathInfos(paths); err != nil || len(got) != len(paths) {
					t.Errorf("QueryPathInfos: %d infos, %v", len(got), err)
				}
				if err := c.AddTempRoots(paths); err != nil || len(store.Roots()) != len(paths) {
					t.Errorf("AddTempRoots: %d roots, %v", len(store.Roots()), err)
				}
			})
		})
	}
}

func TestUploadThatFailsLeavesTheConnectionInOrder(t *testing.T) {
	errSource := errors.New("no such path here")
	whole := func(nar []byte, w io.Writer) error { _, err := w.Write(nar); return err }
	tests := []struct {
		name   string
		refuse bool
		third  func(nar []byte, w io.Writer) error
		want   func(err error) bool
	}{
		{"server refuses", true, whole, func(err error) bool {
			e, ok := errors.AsType[*worker.RemoteError](err)
			return ok && e.Message == "disk full"
		}},
		{"cannot be read", false, func([]byte, io.Writer) error { return errSource },
			func(err error) bool { return errors.Is(err, errSource) }},
		{"breaks off", false, func(nar []byte, w io.Writer) error { w.Write(nar[:len(nar)-8]); return errSource },
			func(err error) bool { return errors.Is(err, errSource) }},
		{"too short", false, func(nar []byte, w io.Writer) error { return whole(nar[:len(nar)-8], w) },
			func(err error) bool { return err != nil && strings.Contains(err.Error(), "wrong NAR size") }},
		{"too long, which its writer ignores", false, func(nar []byte, w io.Writer) error { whole(nar, w); w.Write(nar); return nil },
			func(err error) bool { return err != nil && strings.Contains(err.Error(), "wrong NAR size") }},
		{"not written", false, func([]byte, io.Writer) error { return nil },
			func(err error) bool { return err != nil && strings.Contains(err.Error(), "wrong NAR size") }},
	}
	for _, tt := range tests {
		for name, upload1 := range uploads {
			t.Run(tt.name+"/"+name, func(t *testing.T) {
				infos, nars := upload(6, 200_000)
				store := &wiretest.Store{BeforeAdd: func(info nix.PathInfo) error {
					if tt.refuse && info.Path == infos[2].Path {
						return errors.New("disk full")
					}
					return nil
				}}
				onPair(t, &workertest.Server{Store: store}, func(t *testing.T, c *worker.Client) {
					err := upload1(c, infos, func(info *nix.PathInfo, w io.Writer) error {
						if info.Path == infos[2].Path {
							return tt.third(nars[info.Path], w)
						}
						return whole(nars[info.Path], w)
					})
					if !tt.want(err) {
						t.Errorf("error %v", err)
					}
					if c.Err() != nil {
						t.Fatalf("Err = %v, want a usable client", c.Err())
					}
					valid, err := c.QueryValidPaths([]nix.StorePath{infos[0].Path, infos[1].Path, infos[2].Path}, false)
					// What is too long was whole before, and the server took it.
					if want := 2 + strings.Count(tt.name, "too long"); err != nil || len(valid) != want {
						t.Errorf("afterwards %v are valid, %v; want the first %d", valid, err, want)
					}
				})
			})
		}
	}
}

func TestUploadStopsSoonAfterARefusal(t *testing.T) {
	infos, nars := upload(200, 100_000)
	store := &wiretest.Store{BeforeAdd: func(info nix.PathInfo) error {
		if info.Path == infos[2].Path {
			return errors.New("disk full")
		}
		return nil
	}}
	onPair(t, &workertest.Server{Store: store}, func(t *testing.T, c *worker.Client) {
		asked := 0
		write := writeFrom(nars)
		n, err := c.Upload(infos, true, func(info *nix.PathInfo, w io.Writer) error {
			asked++
			time.Sleep(time.Second) // until everybody else waits: the refusal has arrived
			return write(info, w)
		})
		if n != 2 || err == nil || !strings.Contains(err.Error(), string(infos[2].Path)) {
			t.Errorf("Upload = %d, %v; want 2 and an error that names the third", n, err)
		}
		if asked > 6 {
			t.Errorf("%d NARs were asked for, though the third was refused", asked)
		}
	})
}

func TestServerThatDiesDuringAnUpload(t *testing.T) {
	for name, upload1 := range uploads {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, server := wiretest.Pipe(64 << 10)
				go func() {
					s := &workertest.Server{Store: &wiretest.Store{}}
					s.Serve(io.LimitReader(server, 500_000), server)
					server.Close()
				}()
				c, err := worker.NewClient(client, client, nil)
				if err != nil {
					t.Fatal(err)
				}
				infos, nars := upload(10, 200_000)
				if err := upload1(c, infos, writeFrom(nars)); err == nil || c.Err() == nil {
					t.Errorf("error %v, Err %v", err, c.Err())
				}
			})
		})
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
			w.Uint64(0x6478696f)
			w.Uint64(1<<8 | 34)
			w.String("2.8")
			w.Uint64(0x616c7473)
			w.Flush()
			for range 3 {
				r.Uint64()
			}
			for range infos {
				r.Uint64()
				r.PathInfo()
				r.Uint64()
				r.Uint64()
				wire.NewFramedReader(r).Drain()
			}
			for range infos {
				w.Uint64(0x616c7473)
			}
			w.Flush()
		}()
		c, err := worker.NewClient(client, client, nil)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := c.Upload(infos, true, writeFrom(nars)); n != 50 || err != nil {
			t.Errorf("Upload = %d, %v", n, err)
		}
	})
}

func BenchmarkUpload(b *testing.B) {
	nar := wiretest.FileNAR(strings.Repeat("x", 64<<20))
	info := wiretest.Info(wiretest.Path(1, "x"), nar)
	client, server := wiretest.Pipe(1 << 20)
	go func() {
		r, w := wire.NewReader(server), wire.NewWriter(server)
		r.Uint64()
		w.Uint64(0x6478696f)
		w.Uint64(1<<8 | 34)
		w.String("2.8")
		w.Uint64(0x616c7473)
		w.Flush()
		for range 3 {
			r.Uint64()
		}
		for r.Uint64(); r.Err() == nil; r.Uint64() {
			r.PathInfo()
			r.Uint64()
			r.Uint64()
			wire.NewFramedReader(r).Drain()
			w.Uint64(0x616c7473)
			w.Flush()
		}
	}()
	c, err := worker.NewClient(client, client, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	b.SetBytes(int64(len(nar)))
	b.ReportAllocs()
	for b.Loop() {
		if err := c.AddToStoreNar(&info, true, func(_ *nix.PathInfo, w io.Writer) error { _, err := w.Write(nar); return err }); err != nil {
			b.Fatal(err)
		}
	}
}
