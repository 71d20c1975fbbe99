// Package dispatchtest serves made-up daemons to tests of clients.
package dispatchtest

import (
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// Serve answers DispatchService as impl does on a socket of its own until the
// test ends, or the server is stopped.
func Serve(t testing.TB, impl dispatchv1.DispatchServiceServer) (socket string, server *grpc.Server) {
	t.Helper()
	socket = filepath.Join(SocketDir(t), "socket")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server = grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
	dispatchv1.RegisterDispatchServiceServer(server, impl)
	healthpb.RegisterHealthServer(server, health.NewServer()) // says that all is well
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(listener) //nolint:errcheck // Stop ends it
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
	return socket, server
}

// Silent listens and accepts connections without ever saying a word.
func Silent(t testing.TB) (socket string, connections *atomic.Int32) {
	socket = filepath.Join(SocketDir(t), "socket")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	connections = new(atomic.Int32)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			defer conn.Close()
		}
	}()
	t.Cleanup(func() { listener.Close(); <-done })
	return socket, connections
}

// SocketDir is a directory with a short name, for the test's time: a socket's
// path has at most 107 bytes, and t.TempDir holds the test's name.
func SocketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
