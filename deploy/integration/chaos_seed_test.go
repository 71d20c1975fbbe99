package integration

import (
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
)

const seedVariable = "NIX_DISPATCH_CHAOS_SEED"

// chaosSeed is the seed of all that is random here: that variable's, or another one
// for each process.
var chaosSeed = sync.OnceValue(func() uint64 {
	if seed, err := strconv.ParseUint(os.Getenv(seedVariable), 10, 64); err == nil {
		return seed
	}
	return rand.Uint64N(1_000_000)
})
