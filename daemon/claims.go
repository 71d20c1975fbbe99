package daemon

import (
	"sync"

	"nixdispatch/proto/nix"
)

// claims say which build is uploading which path to one machine, so that a path
// that several builds need travels once. Safe for concurrent use.
//
// There is no cycle of waiters: a build claims all it lacks in one step, sends
// whatever refers to nothing that another build has claimed, and only then
// waits. References form no cycle, so of all unsent paths one refers to no
// other, and its owner can send it.
type claims struct {
	mu       sync.Mutex
	owners   map[nix.StorePath]*claim
	released chan struct{} // closed and replaced at each release
}

// A claim is one path being uploaded by one build.
type claim struct {
	done chan struct{} // closed when the owner sent the path or gave up
}

// over tells whether the owner is finished with the path.
func (c *claim) over() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func newClaims() *claims {
	return &claims{owners: make(map[nix.StorePath]*claim), released: make(chan struct{})}
}

// take claims those of paths that nobody has claimed, adding them to held, the
// caller's own. It returns the claims of others on the rest, and a channel that
// is closed at the next release of any.
func (c *claims) take(paths []nix.StorePath, held map[nix.StorePath]*claim) (theirs map[nix.StorePath]*claim, released <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	theirs = make(map[nix.StorePath]*claim)
	for _, p := range paths {
		if held[p] != nil {
			continue
		}
		if other := c.owners[p]; other != nil {
			theirs[p] = other
			continue
		}
		mine := &claim{done: make(chan struct{})}
		c.owners[p] = mine
		held[p] = mine
	}
	return theirs, c.released
}

// release gives up the caller's claims on paths, taking them out of held, and
// wakes who waits for them.
func (c *claims) release(paths []nix.StorePath, held map[nix.StorePath]*claim) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range paths {
		if mine := held[p]; mine != nil {
			delete(held, p)
			delete(c.owners, p)
			close(mine.done)
		}
	}
	close(c.released)
	c.released = make(chan struct{})
}
