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
	releases uint64        // counts them
}

// A claim is one path being uploaded by one build.
type claim struct {
	done chan struct{} // closed when the owner sent the path or gave up
	sent bool          // which of the two; valid once done is closed
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

// moment is how many releases there have been. What a machine is found to lack
// after a moment is certain to be lacking only until the next release.
func (c *claims) moment() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.releases
}

// A taking is what take found.
type taking struct {
	mine     []nix.StorePath          // newly claimed
	theirs   map[nix.StorePath]*claim // claimed by others
	moment   uint64
	released <-chan struct{} // closed at the next release of any
}

// take claims those of paths that nobody has claimed, adding them to held, the
// caller's own.
func (c *claims) take(paths []nix.StorePath, held map[nix.StorePath]*claim) taking {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := taking{theirs: make(map[nix.StorePath]*claim), moment: c.releases, released: c.released}
	for _, p := range paths {
		if held[p] != nil {
			continue
		}
		if other := c.owners[p]; other != nil {
			t.theirs[p] = other
			continue
		}
		mine := &claim{done: make(chan struct{})}
		c.owners[p] = mine
		held[p] = mine
		t.mine = append(t.mine, p)
	}
	return t
}

// release gives up the caller's claims on paths, taking them out of held, and
// wakes who waits for them. sent says that the machine has the paths.
func (c *claims) release(paths []nix.StorePath, held map[nix.StorePath]*claim, sent bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, p := range paths {
		if mine := held[p]; mine != nil {
			delete(held, p)
			delete(c.owners, p)
			mine.sent = sent
			close(mine.done)
		}
	}
	c.releases++
	close(c.released)
	c.released = make(chan struct{})
}
