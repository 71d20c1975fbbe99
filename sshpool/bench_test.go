package sshpool

import (
	"io"
	"syscall"
	"testing"
	"time"

	"nixdispatch/sshpool/sshtest"
)

// The benchmarks run against OpenSSH's sshd: what counts is what the two do
// together, and sshd takes most of the time.

// reportCPU reports the processor time this process took for each GiB, which says
// more than the throughput does on a machine that others use too.
func reportCPU(b *testing.B, size int) {
	used := func() time.Duration {
		var u syscall.Rusage
		syscall.Getrusage(syscall.RUSAGE_SELF, &u)
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	b.Cleanup(func() {
		gib := float64(b.N) * float64(size) / (1 << 30)
		b.ReportMetric((used()-before).Seconds()/gib, "cpu-s/GiB")
	})
}

func BenchmarkDownload(b *testing.B) {
	const size = 64 << 20
	d := sshtest.StartSSHD(b)
	h := upHost(b, Options{}, sshdConfig(d))
	b.SetBytes(size)
	reportCPU(b, size)
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
	reportCPU(b, size)
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
