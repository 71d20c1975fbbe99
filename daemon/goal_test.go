package daemon

import (
	"testing"

	"nixdispatch/proto/nix"
)

func TestChainsOfGoals(t *testing.T) {
	// a <- b <- c <- d, a <- d, e alone; x is valid already.
	needs := map[nix.StorePath][]nix.StorePath{
		"a": {"x"}, "b": {"a"}, "c": {"b", "x"}, "d": {"c", "a"}, "e": nil,
	}
	r := &realisation{goals: make(map[nix.StorePath]*goal)}
	for p, inputs := range needs {
		drv := &nix.Derivation{InputDrvs: make(map[nix.StorePath][]string)}
		for _, input := range inputs {
			drv.InputDrvs[input] = []string{"out"}
		}
		r.goals[p] = &goal{r: r, drvPath: p, drv: drv}
	}
	r.link()
	for p, want := range map[nix.StorePath]int{"a": 3, "b": 2, "c": 1, "d": 0, "e": 0} {
		if got := r.goals[p].chain; got != want {
			t.Errorf("%s: chain %d, want %d", p, got, want)
		}
	}
	if got := r.goals["d"].pending; got != 2 {
		t.Errorf("d waits for %d goals, want 2", got)
	}
}
