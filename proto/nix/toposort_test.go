package nix

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// infosOf makes infos from words such as "a:b,c": a refers to b and c.
func infosOf(words ...string) []PathInfo {
	var infos []PathInfo
	for _, w := range words {
		name, refs, _ := strings.Cut(w, ":")
		info := PathInfo{Path: StorePath(name)}
		for _, r := range strings.FieldsFunc(refs, func(c rune) bool { return c == ',' }) {
			info.References = append(info.References, StorePath(r))
		}
		infos = append(infos, info)
	}
	return infos
}

func pathsOf(infos []PathInfo) []string {
	var paths []string
	for _, i := range infos {
		paths = append(paths, string(i.Path))
	}
	return paths
}

func TestTopoSort(t *testing.T) {
	for _, tt := range []struct{ in, want []string }{
		{nil, nil},
		{[]string{"a"}, []string{"a"}},
		{[]string{"a:a", "b"}, []string{"a", "b"}},
		{[]string{"a:b", "b:c", "c"}, []string{"c", "b", "a"}},
		{[]string{"a:b,c,elsewhere", "b:d,d", "c:d", "d:d"}, []string{"d", "b", "c", "a"}},
		{[]string{"a:b", "b", "a:b", "b"}, []string{"b", "a"}},
	} {
		got, err := TopoSort(infosOf(tt.in...))
		if err != nil {
			t.Errorf("TopoSort(%q): %v", tt.in, err)
		}
		if diff := cmp.Diff(tt.want, pathsOf(got)); diff != "" {
			t.Errorf("TopoSort(%q) (-want +got):\n%s", tt.in, diff)
		}
	}
}

func TestTopoSortNamesTheCycle(t *testing.T) {
	got, err := TopoSort(infosOf("top:a", "a:b", "x", "b:x,c", "c:c,a"))
	if got != nil || err == nil || !strings.HasSuffix(err.Error(), ": a -> b -> c -> a") {
		t.Errorf("TopoSort = %v, %v; want the cycle of a, b and c", pathsOf(got), err)
	}
	var ring []string
	for i := range 100 {
		ring = append(ring, fmt.Sprintf("p%d:p%d", i, (i+1)%100))
	}
	if _, err := TopoSort(infosOf(ring...)); err == nil || !strings.HasSuffix(err.Error(), " -> p9 -> ...") {
		t.Errorf("long cycle: %v; want it cut short", err)
	}
}

func TestTopoSortPutsReferencesFirstInAnyGraph(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		n := 1 + random.IntN(40)
		infos := make([]PathInfo, n)
		for i, rank := range random.Perm(n) {
			infos[i].Path = StorePath(fmt.Sprint(rank))
			for range random.IntN(4) {
				infos[i].References = append(infos[i].References, StorePath(fmt.Sprint(random.IntN(rank+1))))
			}
		}
		got, err := TopoSort(infos)
		if err != nil || len(got) != n {
			t.Fatalf("%d of %d infos, %v", len(got), n, err)
		}
		for i, info := range got {
			for _, ref := range info.References {
				if j := slices.IndexFunc(got, func(o PathInfo) bool { return o.Path == ref }); j > i {
					t.Fatalf("%s comes before its reference %s", info.Path, ref)
				}
			}
		}
	}
}

func TestTopoSortOfALongChainIsLinear(t *testing.T) {
	const n = 50_000
	infos := make([]PathInfo, n)
	for i := range infos {
		infos[i] = PathInfo{Path: StorePath(fmt.Sprint(i)), References: []StorePath{StorePath(fmt.Sprint(i + 1))}}
	}
	start := time.Now()
	got, err := TopoSort(infos)
	if err != nil || len(got) != n || got[0].Path != infos[n-1].Path {
		t.Fatalf("%d infos, %v", len(got), err)
	}
	// Quadratic time would be minutes.
	if took := time.Since(start); took > time.Minute {
		t.Errorf("took %v", took)
	}
}
