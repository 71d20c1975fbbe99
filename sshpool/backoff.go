package sshpool

import (
	"math/rand/v2"
	"time"
)

// A backoff counts failures and says how long to pause after each. It is not
// safe for concurrent use.
type backoff struct {
	min, max time.Duration
	failures int // in a row
}

// next counts a failure and returns the pause after it: min doubled for every
// failure before, at most max, varied by up to half in both directions so that
// hosts lost together are not all tried again together.
func (b *backoff) next() time.Duration {
	d := b.min
	for range b.failures {
		if d >= b.max/2 {
			d = b.max
			break
		}
		d *= 2
	}
	b.failures++
	d = min(d, b.max)
	return d/2 + rand.N(d+1)
}

func (b *backoff) reset() { b.failures = 0 }
