package daemon

import (
	"io"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// progressInterval is the least time between two reports of progress.
const progressInterval = 100 * time.Millisecond

// A direction is which way paths travel.
type direction int

const (
	uploading   direction = iota // to the machine
	downloading                  // to the local store
)

// A transfer counts what a copy has done and reports it to the build's
// followers and the metrics. Not safe for concurrent use.
type transfer struct {
	b        *build
	bytes    prometheus.Counter
	way      direction
	now      dispatchv1.Transfer
	reported time.Time
}

func newTransfer(b *build, bytes prometheus.Counter, way direction, infos []nix.PathInfo) *transfer {
	t := &transfer{b: b, bytes: bytes, way: way}
	t.now.Paths = uint64(len(infos))
	for _, i := range infos {
		t.now.Bytes += i.NarSize
	}
	return t
}

// begin starts on a path. What is written to the result is counted and passed
// on to w.
func (t *transfer) begin(i nix.PathInfo, w io.Writer) *countingWriter {
	t.endPath()
	t.now.Path, t.now.PathBytes, t.now.PathBytesDone = string(i.Path), i.NarSize, 0
	t.report()
	return &countingWriter{transfer: t, w: w}
}

// endPath counts the path that was under way as done.
func (t *transfer) endPath() {
	if t.now.Path != "" {
		t.now.PathsDone++
		t.now.Path, t.now.PathBytes, t.now.PathBytesDone = "", 0, 0
	}
}

// skip leaves out a path that somebody else has brought.
func (t *transfer) skip(i nix.PathInfo) {
	t.now.Paths--
	t.now.Bytes -= i.NarSize
}

// flush reports the end of a batch, with its last path as done. Unlike progress
// it reaches every follower.
func (t *transfer) flush() {
	if t.now.Path != "" {
		t.now.PathsDone++
	}
	t.b.feed.post(t.event())
	t.now.Path, t.now.PathBytes, t.now.PathBytesDone = "", 0, 0
}

// report tells how far the copy is, not too often.
func (t *transfer) report() {
	now := time.Now()
	if now.Sub(t.reported) < progressInterval {
		return
	}
	t.reported = now
	t.b.feed.postProgress(t.event())
}

// event is the state of the copy.
func (t *transfer) event() *dispatchv1.BuildEvent {
	copied := &dispatchv1.Transfer{
		Path: t.now.Path, PathBytesDone: t.now.PathBytesDone, PathBytes: t.now.PathBytes,
		PathsDone: t.now.PathsDone, Paths: t.now.Paths,
		BytesDone: t.now.BytesDone, Bytes: t.now.Bytes,
	}
	e := t.b.event()
	if t.way == uploading {
		e.Event = &dispatchv1.BuildEvent_Copying{Copying: &dispatchv1.Copying{Transfer: copied}}
	} else {
		e.Event = &dispatchv1.BuildEvent_Fetching{Fetching: &dispatchv1.Fetching{Transfer: copied}}
	}
	return e
}

// A countingWriter passes a NAR on and keeps count. err is its own failure to
// write, which tells it from the reader's.
type countingWriter struct {
	*transfer
	w   io.Writer
	err error
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.now.PathBytesDone += uint64(n)
	c.now.BytesDone += uint64(n)
	c.bytes.Add(float64(n))
	c.report()
	if err != nil {
		c.err = err
	}
	return n, err
}
