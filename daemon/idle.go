package daemon

import (
	"sync"
	"time"
)

// An idlePool keeps things that were expensive to start for the next who needs
// one, for a short while. Safe for concurrent use.
type idlePool[T comparable] struct {
	ttl time.Duration
	end func(T) // ends one that nobody took in time; it may take a while

	mu     sync.Mutex
	idle   []idler[T] // the last one put is the first one taken
	closed bool
	ending sync.WaitGroup
}

type idler[T comparable] struct {
	x     T
	timer *time.Timer
}

// put hands over x, for ttl at most.
func (p *idlePool[T]) put(x T) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		p.ending.Go(func() { p.end(x) })
		return
	}
	p.idle = append(p.idle, idler[T]{x, time.AfterFunc(p.ttl, func() { p.expire(x) })})
}

// take returns the newest of what is there.
func (p *idlePool[T]) take() (x T, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.idle)
	if n == 0 {
		return x, false
	}
	last := p.idle[n-1]
	p.idle = p.idle[:n-1]
	last.timer.Stop()
	return last.x, true
}

// expire ends x if it is still there. A timer that fires while x is taken finds
// nothing; one that fires just as x is put back ends it early, which does no harm.
func (p *idlePool[T]) expire(x T) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n, other := range p.idle {
		if other.x == x {
			p.idle = append(p.idle[:n], p.idle[n+1:]...)
			p.ending.Go(func() { p.end(x) })
			return
		}
	}
}

// close ends all that is idle, now and later, and waits for it.
func (p *idlePool[T]) close() {
	p.mu.Lock()
	p.closed = true
	for _, i := range p.idle {
		i.timer.Stop()
		p.ending.Go(func() { p.end(i.x) })
	}
	p.idle = nil
	p.mu.Unlock()
	p.ending.Wait()
}
