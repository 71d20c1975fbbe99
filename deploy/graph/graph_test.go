package graph

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	got, err := Parse(strings.NewReader("a\t1\t\nb\t2\ta\nc\t0\ta,b\n"))
	want := Graph{
		{Name: "a", Size: 1024},
		{Name: "b", Size: 2048, Inputs: []int{0}},
		{Name: "c", Inputs: []int{0, 1}},
	}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("Parse: %v (-want +got):\n%s", err, diff)
	}
	for _, bad := range []string{
		"a\t1", "a\t1\t\t", "\t1\t", "a\tx\t", "a\t-1\t", "a\t9999999999999999\t", "a\t1\tb", "a\t1\ta", "a\t1\t\na\t1\t",
	} {
		if g, err := Parse(strings.NewReader(bad)); err == nil {
			t.Errorf("Parse(%q) = %v, want an error", bad, g)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("a\t1\t\nb\t2\ta\n")
	f.Fuzz(func(t *testing.T, text string) {
		g, err := Parse(strings.NewReader(text))
		if err != nil {
			return
		}
		for i, d := range g {
			for _, input := range d.Inputs {
				if input >= i {
					t.Errorf("derivation %d needs %d", i, input)
				}
			}
		}
	})
}

func TestPackages(t *testing.T) {
	g := Packages()
	if len(g) != 1000 {
		t.Fatalf("%d packages, want 1000", len(g))
	}
	g.Draw(1, 20*time.Minute)
	if off := g.Work() - 20*time.Minute; off.Abs() > time.Second {
		t.Errorf("the work is %s off", off)
	}
	again := Packages()
	again.Draw(1, 20*time.Minute)
	if diff := cmp.Diff(g, again); diff != "" {
		t.Errorf("the same seed draws other durations:\n%s", diff)
	}
	again.Draw(2, 20*time.Minute)
	if cmp.Equal(g, again) {
		t.Error("another seed draws the same durations")
	}
}

func TestBound(t *testing.T) {
	// a and b before c; d alone.
	g := Graph{
		{Name: "a", Work: 4 * time.Second},
		{Name: "b", Work: 2 * time.Second},
		{Name: "c", Work: 6 * time.Second, Inputs: []int{0, 1}},
		{Name: "d", Work: 8 * time.Second},
	}
	if got := g.Path(); got != 10*time.Second {
		t.Errorf("Path = %s, want that of a and c", got)
	}
	for _, c := range []struct {
		name     string
		machines []Machine
		graphs   []Graph
		want     time.Duration
	}{
		{"work", []Machine{{Slots: 1, Speed: 1}}, []Graph{g}, 20 * time.Second},
		{"path", []Machine{{Slots: 9, Speed: 1}}, []Graph{g}, 10 * time.Second},
		{"path on the fastest", []Machine{{Slots: 9, Speed: 1}, {Slots: 1, Speed: 2}}, []Graph{g}, 5 * time.Second},
		{"a machine without slots", []Machine{{Slots: 2, Speed: 1}, {Slots: 0, Speed: 9}}, []Graph{g}, 10 * time.Second},
		{"two graphs", []Machine{{Slots: 2, Speed: 2}}, []Graph{g, g}, 10 * time.Second},
	} {
		if got := Bound(c.machines, c.graphs...); got != c.want {
			t.Errorf("%s: Bound = %s, want %s", c.name, got, c.want)
		}
	}
}
