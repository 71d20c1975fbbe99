package nix

import "fmt"

// TopoSort orders infos so that each comes after the ones it refers to, the
// order in which a store takes them. References to itself and to paths outside
// infos don't count; of several infos for one path the first is kept. Equal
// input gives equal output. A cycle is an error.
func TopoSort(infos []PathInfo) ([]PathInfo, error) {
	index := make(map[StorePath]int, len(infos))
	for i := range infos {
		if _, seen := index[infos[i].Path]; !seen {
			index[infos[i].Path] = i
		}
	}
	waiting := make([]int, len(infos)) // references not yet in sorted
	referrers := make([][]int, len(infos))
	sorted := make([]PathInfo, 0, len(index))
	var ready []int
	for i := range infos {
		if index[infos[i].Path] != i {
			continue
		}
		for _, ref := range infos[i].References {
			if j, ok := index[ref]; ok && j != i {
				waiting[i]++
				referrers[j] = append(referrers[j], i)
			}
		}
		if waiting[i] == 0 {
			ready = append(ready, i)
		}
	}
	for len(ready) > 0 {
		i := ready[0]
		ready = ready[1:]
		sorted = append(sorted, infos[i])
		for _, r := range referrers[i] {
			if waiting[r]--; waiting[r] == 0 {
				ready = append(ready, r)
			}
		}
	}
	if len(sorted) == len(index) {
		return sorted, nil
	}
	return nil, fmt.Errorf("sort store paths: cycle of references: %s", findCycle(infos, index, waiting))
}

// findCycle describes a cycle among the infos that still wait.
func findCycle(infos []PathInfo, index map[StorePath]int, waiting []int) string {
	at := 0
	for waiting[at] == 0 {
		at++
	}
	// Each that waits refers to one that waits, so this walk comes round.
	seen := map[int]int{}
	var walk []int
	for {
		if start, ok := seen[at]; ok {
			walk = append(walk[start:], at)
			break
		}
		seen[at] = len(walk)
		walk = append(walk, at)
		for _, ref := range infos[at].References {
			if j, ok := index[ref]; ok && j != at && waiting[j] > 0 {
				at = j
				break
			}
		}
	}
	var text string
	for n, i := range walk {
		if n == maxCycleShown {
			return text + " -> ..."
		}
		if n > 0 {
			text += " -> "
		}
		text += string(infos[i].Path)
	}
	return text
}

// maxCycleShown is how many paths of a cycle an error names.
const maxCycleShown = 10
