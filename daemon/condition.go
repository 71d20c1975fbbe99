package daemon

import (
	"cmp"
	"sync"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A condition is what is known of how a machine is, beyond its connection. Safe for
// concurrent use; the zero value knows nothing.
type condition struct {
	mu      sync.Mutex
	load    *dispatchv1.MachineLoad // not changed once it is here; nil: not known
	unknown string                  // why
	parked  string                  // what the machine is parked for, in a word
}

// known is what the machine last told of its load, or why that is not known.
func (c *condition) known() (load *dispatchv1.MachineLoad, unknown string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.load != nil {
		return c.load, ""
	}
	return nil, cmp.Or(c.unknown, "it has not been asked yet")
}

// parkedFor is what the machine is short of, in a word.
func (c *condition) parkedFor() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.parked
}
