package daemon

import (
	"sync"
)

// leftLocal are the derivations that Build calls have left to the local Nix. It
// asks its build hook about them, and would get a machine for what machines can
// build, too. The zero value is ready to use. Safe for concurrent use.
type leftLocal struct {
	mu   sync.Mutex
	drvs map[drvKey]int // how many calls wait for it
}

// add notes a derivation until remove is called.
func (l *leftLocal) add(drv drvKey) (remove func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.drvs == nil {
		l.drvs = make(map[drvKey]int)
	}
	l.drvs[drv]++
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.drvs[drv]--; l.drvs[drv] == 0 {
			delete(l.drvs, drv)
		}
	}
}

func (l *leftLocal) has(drv drvKey) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.drvs[drv] > 0
}
