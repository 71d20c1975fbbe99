package daemon

import (
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/proto/nix/worker/workertest"
)

// TestNixDaemonIsRestarted connects to a nix-daemon that is away for a moment.
func TestNixDaemonIsRestarted(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		// end ends what listens, and returns what brings it back.
		end func(*testing.T, *net.UnixListener) (back func() *net.UnixListener)
	}{
		{"connections are refused", func(t *testing.T, l *net.UnixListener) func() *net.UnixListener {
			l.SetUnlinkOnClose(false)
			l.Close()
			return func() *net.UnixListener {
				time.Sleep(3 * localPause)
				// Where there is no socket, nix-daemon --stdio is started instead.
				socket := l.Addr().String()
				next := listenAt(t, socket+".new")
				if err := os.Rename(socket+".new", socket); err != nil {
					t.Error(err)
				}
				return next
			}
		}},
		{"connections are not greeted", func(t *testing.T, l *net.UnixListener) func() *net.UnixListener {
			return func() *net.UnixListener {
				for range 2 {
					if conn, err := l.Accept(); err == nil {
						conn.Close()
					}
				}
				return l
			}
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(t.TempDir(), "socket")
			listener := listenAt(t, socket)
			if listener == nil {
				return
			}
			back := tt.end(t, listener)
			var serving sync.WaitGroup
			serving.Go(func() {
				l := back()
				if l == nil {
					return
				}
				defer l.Close()
				conn, err := l.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				server := &workertest.Server{Store: new(wiretest.Store), Trust: worker.Trusted}
				_ = server.Serve(conn, conn) // the client notices
			})
			defer serving.Wait()
			conn, err := newLocalStore(nix.LocalStore{Socket: socket}).open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
		})
	}
}

// listenAt listens for as long as it may take to be asked again. It returns nil, and
// the test has failed, where it can't.
func listenAt(t *testing.T, socket string) *net.UnixListener {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Error(err)
		return nil
	}
	l.SetDeadline(time.Now().Add(2 * localAwayMost))
	return l
}
