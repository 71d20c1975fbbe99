package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	godiff "github.com/google/go-cmp/cmp"

	"nixdispatch/deploy/graph"
	"nixdispatch/proto/nix"
)

// random is a configuration made from a seed.
func random(t *testing.T, seed uint64) config {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 7))
	var g graph.Graph
	for i := range 1 + r.IntN(60) {
		d := graph.Derivation{Name: fmt.Sprintf("%c%d", 'a'+rune(r.IntN(26)), i), Size: r.Int64N(50 << 20)}
		for input := range i {
			if r.IntN(i) < 2 {
				d.Inputs = append(d.Inputs, input)
			}
		}
		g = append(g, d)
	}
	text := "ssh://m0 x86_64-linux - 1 1\n"
	for i := range r.IntN(5) {
		text += fmt.Sprintf("ssh://m%d %s - %d %d\n", i+1, []string{"x86_64-linux", "x86_64-linux", "riscv64-linux"}[r.IntN(3)], r.IntN(6), 1+r.IntN(4))
	}
	machines, errs := nix.ParseMachines(text, nix.MachinesOptions{})
	if len(errs) > 0 {
		t.Fatal(errs[0])
	}
	c := defaultCosts
	c.Bandwidth = float64(1+r.IntN(1000)) * 1e6 / 8
	c.RoundTrip = time.Duration(r.IntN(100)) * time.Millisecond
	return config{
		graph: g, machines: machines, rules: ruleNames, clients: 1 + r.IntN(4), slots: r.IntN(3),
		seed: seed, seeds: 1, work: time.Duration(1+r.IntN(5000)) * time.Second, system: "x86_64-linux", costs: c,
	}
}

func TestEveryScheduleIsSound(t *testing.T) {
	for seed := range uint64(300) {
		cfg := random(t, seed)
		results, err := cfg.simulate()
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		again, err := cfg.simulate()
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range results {
			if !slices.Equal(r.records, again[i].records) {
				t.Fatalf("seed %d: %s does not end the same twice", seed, r.Rule)
			}
			if err := cfg.check(r); err != nil {
				t.Errorf("seed %d: %s: %v", seed, r.Rule, err)
			}
		}
	}
}

// check looks for what no schedule may do.
func (cfg config) check(r result) error {
	if r.Makespan < r.Bound {
		return fmt.Errorf("took %.3f s, less than the bound of %.3f s", r.Makespan, r.Bound)
	}
	graphs := drawn(cfg.graph, cfg.clients, r.Seed, cfg.work)
	done := make(map[path]time.Duration)
	for _, rec := range r.records {
		p := path{rec.Client, rec.Derivation}
		if _, twice := done[p]; twice {
			return fmt.Errorf("%v was built twice", p)
		}
		done[p] = rec.Done
		if rec.Ready > rec.Taken || rec.Taken > rec.Started || rec.Started > rec.Ended || rec.Ended > rec.Done {
			return fmt.Errorf("%v was in disorder: %+v", p, rec)
		}
		for _, input := range graphs[rec.Client][rec.Derivation].Inputs {
			if end, built := done[path{rec.Client, input}]; !built || end > rec.Ready {
				return fmt.Errorf("%v began before its input %d was there", p, input)
			}
		}
	}
	if want := len(cfg.graph) * cfg.clients; len(done) != want {
		return fmt.Errorf("%d derivations built, want %d", len(done), want)
	}
	return cfg.checkSlots(r)
}

// checkSlots counts, at every start, what runs at the same place. The stock hook
// holds a slot from first to last, nix-dispatch for the build alone.
func (cfg config) checkSlots(r result) error {
	type change struct {
		at   time.Duration
		more int
	}
	slots, speeds := make(map[string]int), make(map[string]float64)
	for _, m := range cfg.machines {
		if m.SystemSupported(cfg.system) {
			slots[m.StoreURI], speeds[m.StoreURI] = m.MaxJobs, m.SpeedFactor
		}
	}
	for client := range cfg.clients {
		name := fmt.Sprint("local ", client)
		slots[name], speeds[name] = cfg.slots, 1
	}
	graphs := drawn(cfg.graph, cfg.clients, r.Seed, cfg.work)
	changes := make(map[string][]change)
	for _, rec := range r.records {
		where, from, to := rec.Machine, rec.Started, rec.Ended
		if where == "" {
			where = fmt.Sprint("local ", rec.Client)
		} else if r.Rule == "stock" {
			from, to = rec.Taken, rec.Done
		}
		changes[where] = append(changes[where], change{from, 1}, change{to, -1})
		work := graphs[rec.Client][rec.Derivation].Work
		if least := time.Duration(float64(work) / speeds[where]); rec.Ended-rec.Started < least {
			return fmt.Errorf("%+v took less than %s", rec, least)
		}
	}
	for where, list := range changes {
		slices.SortFunc(list, func(a, b change) int { return cmp.Or(cmp.Compare(a.at, b.at), a.more-b.more) })
		n := 0
		for _, c := range list {
			if n += c.more; n > slots[where] {
				return fmt.Errorf("%d builds at once at %s, which has %d slots", n, where, slots[where])
			}
		}
	}
	return nil
}

// A schedule that breaks the rules is found out.
func TestCheckFindsFaults(t *testing.T) {
	cfg := config{
		graph:    graph.Graph{{Name: "a"}, {Name: "b", Inputs: []int{0}}},
		machines: mustParse(t, "ssh://m x86_64-linux - 1 1"),
		clients:  1, seed: 1, work: time.Hour, system: "x86_64-linux", costs: defaultCosts,
	}
	good, err := cfg.simulateRule("build", drawn(cfg.graph, 1, 1, cfg.work))
	if err != nil {
		t.Fatal(err)
	}
	good.Seed = 1
	if err := cfg.check(good); err != nil {
		t.Fatalf("a sound schedule: %v", err)
	}
	for name, spoil := range map[string]func(r *result){
		"too fast as a whole": func(r *result) { r.Makespan = r.Bound / 2 },
		"too fast a build":    func(r *result) { r.records[0].Ended = r.records[0].Started },
		"built twice":         func(r *result) { r.records[1] = r.records[0] },
		"not built":           func(r *result) { r.records = r.records[:1] },
		"before its input":    func(r *result) { r.records[1].Ready = 0 },
		"in disorder":         func(r *result) { r.records[1].Taken = r.records[1].Done + 1 },
		"no such slot":        func(r *result) { r.records[0].Machine = "ssh://n" },
		"two in one slot":     func(r *result) { r.records[0].Ended = r.records[1].Ended - 1; r.records[0].Done = r.records[1].Ready },
	} {
		bad := good
		bad.records = slices.Clone(good.records)
		spoil(&bad)
		if cfg.check(bad) == nil && cfg.checkSlots(bad) == nil {
			t.Errorf("%s: not found", name)
		}
	}
}

func mustParse(t *testing.T, text string) []nix.Machine {
	t.Helper()
	machines, errs := nix.ParseMachines(text, nix.MachinesOptions{})
	if len(errs) > 0 {
		t.Fatal(errs[0])
	}
	return machines
}

// What a link carries at once shares its bandwidth.
func TestLinkIsShared(t *testing.T) {
	c := new(clock)
	l := &link{clock: c, bandwidth: 100}
	got := make(map[string]time.Duration)
	send := func(name string, size int64) { l.send(size, func() { got[name] = c.now }) }
	send("a", 300)
	c.after(time.Second, func() { send("b", 100) })   // a has 200 left
	c.after(10*time.Second, func() { send("c", 50) }) // alone
	c.run()
	want := map[string]time.Duration{"b": 3 * time.Second, "a": 4 * time.Second, "c": 10500 * time.Millisecond}
	if diff := godiff.Diff(want, got); diff != "" {
		t.Errorf("ends (-want +got):\n%s", diff)
	}
}

// The loop of Nix's client offers again what was put off after five seconds, not
// when a slot becomes free.
func TestStockPollsForSlots(t *testing.T) {
	cfg := config{
		graph:    graph.Graph{{Name: "a", Work: time.Second}, {Name: "b", Work: time.Second}},
		machines: mustParse(t, "ssh://m x86_64-linux - 1 1"), clients: 1, system: "x86_64-linux", costs: defaultCosts,
	}
	ends := make(map[string]seconds)
	for _, rule := range ruleNames {
		r, err := cfg.simulateRule(rule, []graph.Graph{cfg.graph})
		if err != nil {
			t.Fatal(err)
		}
		ends[rule] = r.Makespan
	}
	if ends["stock"] < 6 || ends["hook"] > 3 || ends["build"] > 3 {
		t.Errorf("two builds of a second took %v s, want more than 6 by stock and less than 3 otherwise", ends)
	}
}

func TestCommand(t *testing.T) {
	call := func(args ...string) (int, string, string) {
		var out, errs bytes.Buffer
		code := run(args, &out, &errs)
		return code, out.String(), errs.String()
	}
	code, out, _ := call("-seeds", "2", "-work", "1m")
	if rows := strings.Count(out, "\n"); code != 0 || rows != 3+2*len(ruleNames) {
		t.Errorf("exit status %d and %d lines:\n%s", code, rows, out)
	}
	code, out, _ = call("-json", "-rules", "build,stock")
	var got struct{ Results []result }
	if err := json.Unmarshal([]byte(out), &got); code != 0 || err != nil || len(got.Results) != 2 || got.Results[0].Rule != "build" {
		t.Errorf("exit status %d, %v:\n%s", code, err, out)
	}
	for _, c := range []struct {
		code int
		args []string
	}{
		{0, []string{"-help"}},
		{2, []string{"extra"}},
		{2, []string{"-clients", "0"}},
		{2, []string{"-bandwidth", "0"}},
		{2, []string{"-graph", "/nonexistent"}},
		{2, []string{"-machines", "/nonexistent"}},
		{1, []string{"-rules", "luck"}},
		{1, []string{"-system", "riscv64-linux"}},
	} {
		if code, _, errs := call(c.args...); code != c.code || errs == "" {
			t.Errorf("simulate %v: exit status %d, want %d, and words on stderr: %q", c.args, code, c.code, errs)
		}
	}
}
