package buildhook

import (
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"nixdispatch/cmd/internal/daemonsocket"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// BenchmarkHookAccepts measures what every build pays: the time from the start of
// the hook process to its reply, and what the process costs until its end. The
// counts tell more than the times do on a busy machine.
func BenchmarkHookAccepts(b *testing.B) {
	program := filepath.Join(b.TempDir(), "nix-dispatch-hook")
	build := exec.Command("go", "build", "-trimpath", "-tags=grpcnotrace", "-ldflags=-s -w", "-o", program, "nixdispatch/cmd/nix-dispatch-hook")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build: %v\n%s", err, out)
	}
	d := building(b, func(s hookStream, _ *dispatchv1.Start) error {
		return s.Send(finished(dispatchv1.BuildStatus_BUILD_STATUS_BUILT, "", ""))
	})
	var times []time.Duration
	var cpu time.Duration
	var faults, switches int64
	for b.Loop() {
		n := startFakeNix(b, exec.Command(program, "3"), testSettings(), daemonsocket.Env+"="+d.socket)
		if reply, _ := n.try(testSystem, true); reply != "accept" {
			b.Fatalf("reply = %q", reply)
		}
		times = append(times, time.Since(n.started))
		n.begin()
		if status := n.wait(); status != 0 {
			b.Fatalf("exit status = %d", status)
		}
		used := n.cmd.ProcessState.SysUsage().(*syscall.Rusage)
		cpu += time.Duration(used.Utime.Nano() + used.Stime.Nano())
		faults += used.Minflt
		switches += used.Nvcsw
	}
	each := 1 / float64(len(times))
	b.ReportMetric(float64(cpu.Microseconds())/1000*each, "cpu-ms/op")
	b.ReportMetric(float64(faults)*each, "faults/op")
	b.ReportMetric(float64(switches)*each, "switches/op")
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(times[len(times)*9/10].Microseconds())/1000, "p90-ms")
}
