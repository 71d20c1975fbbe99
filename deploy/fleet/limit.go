package fleet

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// Limit makes the host's line slow: it carries bytesPerSecond in each direction,
// and what does not fit in the queue before it, a fifth of a second's worth but at
// least 64 KiB, is dropped, as on a real one. 0 ends it; so does a boot. The
// kernel does it (tc-tbf(8)).
func (h *Host) Limit(ctx context.Context, bytesPerSecond int64) error {
	return h.LimitQueue(ctx, bytesPerSecond, time.Second/5)
}

// LimitQueue is Limit with a queue that holds what the line carries in the time given,
// at least 64 KiB.
func (h *Host) LimitQueue(ctx context.Context, bytesPerSecond int64, queue time.Duration) error {
	h.powerMu.Lock()
	defer h.powerMu.Unlock()
	if !h.On() {
		return fmt.Errorf("limit the line of host %s: %w", h.name, ErrOff)
	}
	for _, end := range []struct {
		in   process
		link string
	}{{h.fleet.network, portName(h.index)}, {h.snapshot().Init, hostInterface}} {
		if err := h.fleet.netTool(ctx, "tc", end.in, limitBatch(end.link, bytesPerSecond, queue)); err != nil {
			return fmt.Errorf("limit the line of host %s: %w", h.name, err)
		}
	}
	return nil
}

func limitBatch(link string, bytesPerSecond int64, queue time.Duration) string {
	if bytesPerSecond == 0 {
		// There is something to delete in any case then.
		return fmt.Sprintf("qdisc replace dev %s root pfifo\nqdisc del dev %[1]s root\n", link)
	}
	var batch strings.Builder
	// What may go at once is what the line carries in 20 ms: a timer that comes
	// late on a busy host must not make the line slower than it is said to be.
	fmt.Fprintf(&batch, "qdisc replace dev %s root tbf rate %dbps burst %d limit %d\n",
		link, bytesPerSecond, max(16<<10, bytesPerSecond/50), max(64<<10, bytesPerSecond*int64(queue)/int64(time.Second)))
	return batch.String()
}
