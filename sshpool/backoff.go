package sshpool

import (
	"math/rand/v2"
	"time"
)

// A Backoff counts failures and says how long to pause after each: from Min to Max.
// It is not safe for concurrent use.
type Backoff struct {
	Min, Max time.Duration

	failures int // in a row
}

// Next counts a failure and returns the pause after it: Min doubled for every
// failure before, at most Max, varied by up to half in both directions so that
// hosts lost together are not all tried again together.
func (b *Backoff) Next() time.Duration {
	d := b.Min
	for range b.failures {
		if d >= b.Max/2 {
			d = b.Max
			break
		}
		d *= 2
	}
	b.failures++
	d = min(d, b.Max)
	return d/2 + rand.N(d+1)
}

// Reset forgets the failures.
func (b *Backoff) Reset() { b.failures = 0 }
