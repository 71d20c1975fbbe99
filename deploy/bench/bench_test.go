package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestReached(t *testing.T) {
	f := figure{Unit: "s", Sides: []side{
		{ours, []float64{1, 4, 2}},
		{stock, []float64{10, 20, 40}},
		{"nobody", nil},
	}}
	for _, c := range []struct {
		goal    goal
		value   float64
		met, ok bool
	}{
		// By the rounds 0.1, 0.2 and 0.05, not by the medians 2 and 20.
		{goal{ours, stock, 0.1}, 0.1, true, true},
		{goal{ours, stock, 0.09}, 0.1, false, true},
		{goal{ours, "", 2}, 2, true, true},
		{goal{ours, "", 1.9}, 2, false, true},
		{goal{ours, "limit", 1}, 0, false, false},
		{goal{"nobody", "", 1}, 0, false, false},
		{goal{ours, "nobody", 1}, 0, false, false},
	} {
		value, met, ok := f.reached(c.goal)
		if value != c.value || met != c.met || ok != c.ok {
			t.Errorf("%+v: %v %v %v, want %v %v %v", c.goal, value, met, ok, c.value, c.met, c.ok)
		}
	}
}

func TestMedian(t *testing.T) {
	for want, values := range map[float64][]float64{3: {3}, 2: {3, 1, 2}, 2.5: {4, 2, 1, 3}} {
		if got := median(values); got != want {
			t.Errorf("median(%v) = %v, want %v", values, got, want)
		}
	}
}

func TestChoose(t *testing.T) {
	all := []row{{name: "a"}, {name: "b"}, {name: "c"}}
	chosen, err := choose(all, "c, a")
	if err != nil || len(chosen) != 2 || chosen[0].name != "c" || chosen[1].name != "a" {
		t.Errorf("choose: %v %v", chosen, err)
	}
	if _, err := choose(all, "d"); err == nil {
		t.Error("a row that is not there was found")
	}
}

// What is measured again replaces what was measured before, in the table and in
// the file, and leaves the rest alone.
func TestBook(t *testing.T) {
	dir := t.TempDir()
	jsonFile, mdFile := filepath.Join(dir, "b.json"), filepath.Join(dir, "b.md")
	if err := os.WriteFile(mdFile, []byte("before\n"+tableBegin+"old\n"+tableEnd+"after\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	all := []row{{name: "first"}, {name: "second"}}
	of := func(name string, value float64) entry {
		return entry{Row: name, Work: "work of " + name, Conditions: conditions{Time: time.Unix(0, 0).UTC()},
			Figures: []figure{{Case: "Nix 1", Unit: "s", Sides: []side{{ours, []float64{value}}, {stock, []float64{10}}},
				Goals: []goal{{ours, stock, 0.1}}, Note: "because"}}}
	}
	for _, e := range []entry{of("second", 5), of("first", 1), of("second", 2)} {
		b, err := openBook(jsonFile)
		if err != nil {
			t.Fatal(err)
		}
		b.put(e)
		if err := b.save(jsonFile); err != nil {
			t.Fatal(err)
		}
		if err := b.insertInto(mdFile, all); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(mdFile)
	if err != nil {
		t.Fatal(err)
	}
	got := string(text)
	for _, want := range []string{
		"before\n" + tableBegin, tableEnd + "after\n",
		"| first, Nix 1 | ours 1.00 s<br>stock 10.0 s | ours at most 0.1 x stock | 0.1 x | met |\n" +
			"| second, Nix 1 | ours 2.00 s<br>stock 10.0 s | ours at most 0.1 x stock | 0.2 x | missed by 100 % |\n",
		"* **first**: work of first. Nix 1, because.",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is missing in\n%s", want, got)
		}
	}
	if strings.Contains(got, "old") || strings.Contains(got, "5.00") {
		t.Errorf("what was replaced is still there:\n%s", got)
	}
}

func TestNumbers(t *testing.T) {
	for want, v := range map[string]float64{"1234": 1234.4, "12.3": 12.34, "1.23": 1.234, "0.0123": 0.01234} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %q, want %q", v, got, want)
		}
	}
}

func TestSchedulerFigures(t *testing.T) {
	out := `goos: linux
BenchmarkEvents/life/plain/machines=10/queued=100000-2    	    5000	     39100 ns/op	      3320 cpu-ns/event
BenchmarkEvents/flap/plain/machines=10/queued=100000      	    5000	     124.1 ns/op	     70.5 cpu-ns/event
BenchmarkEvents/life/plain/machines=1000/queued=100000-2  	    5000	     39100 ns/op	     20000 cpu-ns/event
PASS
`
	got, err := schedulerFigures([]byte(out))
	if err != nil || len(got) != 2 {
		t.Fatalf("figures %+v, %v; want two", got, err)
	}
	life := got[0]
	if life.Case != "life, plain" || life.side("10 machines").Values[0] != 3.32 || life.side("1000 machines").Values[0] != 20 {
		t.Errorf("figure %+v", life)
	}
	if _, err := schedulerFigures([]byte("PASS\n")); err == nil {
		t.Error("no figures are no error")
	}
}
