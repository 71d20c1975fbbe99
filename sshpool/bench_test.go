package sshpool

import (
	"io"
	"testing"

	"nixdispatch/sshpool/sshtest"
)

// The benchmarks run against OpenSSH's sshd: what counts is what the two do
// together, and sshd takes most of the time.

func BenchmarkDownload(b *testing.B) {
	const size = 64 << 20
	d := sshtest.StartSSHD(b)
	h := upHost(b, Options{}, sshdConfig(d))
	b.SetBytes(size)
	buf := make([]byte, 64<<10)
	for b.Loop() {
		s := mustSession(b, h, "head -c 67108864 /dev/zero")
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{s.Stdout}, buf)
		if err != nil || n != size {
			b.Fatal(n, err)
		}
		s.Close()
	}
}

func BenchmarkUpload(b *testing.B) {
	const size = 64 << 20
	d := sshtest.StartSSHD(b)
	h := upHost(b, Options{}, sshdConfig(d))
	b.SetBytes(size)
	block := make([]byte, 64<<10)
	for b.Loop() {
		s := mustSession(b, h, "cat >/dev/null")
		for range size / len(block) {
			if _, err := s.Stdin.Write(block); err != nil {
				b.Fatal(err)
			}
		}
		s.Stdin.Close()
		if err := s.Wait(); err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
}

// BenchmarkSession opens a session for a command that ends at once.
func BenchmarkSession(b *testing.B) {
	d := sshtest.StartSSHD(b)
	h := upHost(b, Options{}, sshdConfig(d))
	for b.Loop() {
		s := mustSession(b, h, ":")
		if err := s.Wait(); err != nil {
			b.Fatal(err)
		}
		s.Close()
	}
}

// BenchmarkConnect makes a connection.
func BenchmarkConnect(b *testing.B) {
	d := sshtest.StartSSHD(b)
	for b.Loop() {
		p := New(Options{})
		h := p.Add(sshdConfig(d))
		awaitStatus(b, h, "up", func(st Status) bool { return st.State == Up })
		p.Close()
	}
}
