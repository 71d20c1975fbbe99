package daemon

import (
	"context"
	"fmt"
	"runtime"
	"testing"
)

// A build that waits costs the daemon little, so that thousands can. It must not
// run beside other tests, whose memory would count.
func TestWaitingBuildsTakeLittleMemory(t *testing.T) {
	const builds, most = 2000, 20 << 10 // bytes for each
	m := oneMachine("ssh")
	m.build = m.gated(make(chan struct{}))
	s := newSite(t, m)
	drvs := make([]*recipe, builds)
	for n := range drvs {
		drvs[n] = s.drv(fmt.Sprint("waits-", n), drvConfig{})
	}
	before := memoryInUse()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := s.client.Build(ctx, asked(drvs...))
	if err != nil {
		t.Fatal(err)
	}
	go readBuild(stream)
	s.eventually("all builds are in progress", func() bool { return len(s.status().GetBuilds()) == builds })
	each := (memoryInUse() - before) / builds
	t.Logf("%d bytes for each build", each)
	if each > most {
		t.Errorf("%d builds that wait take %d bytes each, want %d at most", builds, each, most)
	}
}

// memoryInUse is what the heap and the stacks hold that is in use.
func memoryInUse() int64 {
	var s runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&s)
	return int64(s.HeapAlloc + s.StackInuse) //nolint:gosec // far below
}
