package daemon

import (
	"sync"

	"nixdispatch/proto/nix"
)

// leftLocal are the derivations that Build calls have left to the local Nix. It
// asks its build hook about them, and would get a machine for what machines can
// build, too. The zero value is ready to use. Safe for concurrent use.
type leftLocal struct {
	mu   sync.Mutex
	drvs map[nix.StorePath]int // how many calls wait for it
}

// add notes a derivation until remove is called.
func (l *leftLocal) add(drvPath nix.StorePath) (remove func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.drvs == nil {
		l.drvs = make(map[nix.StorePath]int)
	}
	l.drvs[drvPath]++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.drvs[drvPath]--; l.drvs[drvPath] == 0 {
			delete(l.drvs, drvPath)
		}
	}
}

func (l *leftLocal) has(drvPath nix.StorePath) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.drvs[drvPath] > 0
}
