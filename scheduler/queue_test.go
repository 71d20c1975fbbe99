package scheduler_test

import (
	"fmt"
	"math"
	"slices"
	"testing"

	. "nixdispatch/scheduler"
)

// TestChoice has a case for each rule of the choice among machines that only
// this rule decides, and says which rule did. Each machine has the builds put on
// it, then one more build chooses.
func TestChoice(t *testing.T) {
	type m struct {
		slots  int
		speed  float64
		builds int
	}
	const (
		byRatio = "a slot is free; lowest load/speed factor"
		bySpeed = "a slot is free; fastest of those with the lowest load/speed factor"
		byLoad  = "a slot is free; least loaded of the fastest"
		byList  = "a slot is free; first in the list among equals"
		only    = "the only matching machine with a free slot"
	)
	inf := math.Inf(1)
	tests := []struct {
		name     string
		machines []m
		want     int
		why      string
	}{
		{"one", []m{{1, 1, 0}}, 0, only},
		{"idle before busy", []m{{2, 1, 1}, {2, 1, 0}}, 1, byRatio},
		{"idle and slow before busy and fast", []m{{2, 9, 1}, {2, 0.5, 0}}, 1, byRatio},
		{"load counts by speed", []m{{9, 1, 2}, {9, 4, 7}}, 1, byRatio},
		{"load counts by fractions of speed", []m{{9, 1, 2}, {9, 1.5, 2}}, 1, byRatio},
		{"not the free slots", []m{{99, 1, 1}, {1, 1, 0}}, 1, byRatio},
		{"fastest of the idle", []m{{1, 1, 0}, {1, 1.5, 0}, {1, 1.2, 0}}, 1, bySpeed},
		{"fastest of equal ratio", []m{{9, 1, 2}, {9, 2, 4}}, 1, bySpeed},
		{"speed 0 is 1", []m{{1, 0.5, 0}, {1, 0, 0}, {1, 0.9, 0}}, 1, bySpeed},
		{"negative speed is 1", []m{{1, 0.5, 0}, {1, -7, 0}, {1, 0.9, 0}}, 1, bySpeed},
		{"speed nan is 1", []m{{1, 0.5, 0}, {1, math.NaN(), 0}, {1, 0.9, 0}}, 1, bySpeed},
		{"least loaded of the fastest", []m{{9, inf, 3}, {9, inf, 2}, {9, 1, 0}}, 1, byLoad},
		{"first of equals", []m{{1, 1, 0}, {1, 1, 0}}, 0, byList},
		{"first of equals behind a better one", []m{{1, 1, 0}, {1, 2, 0}, {1, 2, 0}}, 1, byList},
		{"better one behind equals", []m{{1, 1, 0}, {1, 1, 0}, {1, 2, 0}}, 2, bySpeed},
		{"full ones are left out", []m{{1, 9, 1}, {1, 1, 0}}, 1, only},
		{"no slots at all is left out", []m{{0, 9, 0}, {1, 1, 0}}, 1, only},
		{"staging by the same rule", []m{{2, 1, 2}, {2, 2, 2}}, 1, "no slot is free; lowest load/speed factor of those with a staging place"},
		{"staging on the only one", []m{{1, 2, 2}, {1, 1, 1}}, 1, "no slot is free; the only matching machine with a staging place"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := New()
			var ms []Machine
			for i, m := range tt.machines {
				// The second system is for builds that fit this machine only.
				ms = append(ms, Machine{
					ID: MachineID(fmt.Sprint(i)), Systems: []string{"x", fmt.Sprint(i)},
					MaxJobs: m.slots, SpeedFactor: m.speed,
				})
			}
			q.SetMachines(ms)
			id := BuildID(0)
			for i, m := range tt.machines {
				q.SetState(ms[i].ID, Up, "")
				for range m.builds {
					id++
					q.Enqueue(Request{ID: id, System: fmt.Sprint(i)})
				}
			}
			got := q.Enqueue(Request{ID: 1000, System: "x"})
			if len(got) != 1 || got[0].Kind != Place || got[0].Machine != ms[tt.want].ID || got[0].Why != tt.why {
				t.Errorf("Enqueue = %+v, want place on %d: %s", got, tt.want, tt.why)
			}
		})
	}
}

// TestEligible has a case for each rule of eligibility and the reason it gives.
func TestEligible(t *testing.T) {
	machine := Machine{
		ID: "m", Systems: []string{"i686-linux", "x86_64-linux"}, MaxJobs: 1,
		SupportedFeatures: []string{"kvm", "big-parallel"}, MandatoryFeatures: []string{"benchmark"},
	}
	plain := Machine{ID: "m", Systems: []string{"x86_64-linux"}, MaxJobs: 1}
	tests := []struct {
		name     string
		machine  Machine
		system   string
		features []string
		want     Reason
	}{
		{"nothing asked", plain, "x86_64-linux", nil, Eligible},
		{"second system", machine, "i686-linux", []string{"benchmark"}, Eligible},
		{"other system", plain, "i686-linux", nil, SystemUnsupported},
		{"empty system", plain, "", nil, SystemUnsupported},
		{"builtin", plain, "builtin", nil, Eligible},
		{"builtin needs its features", plain, "builtin", []string{"kvm"}, FeatureMissing},
		{"supported and mandatory asked", machine, "x86_64-linux", []string{"kvm", "benchmark"}, Eligible},
		{"asked twice", machine, "x86_64-linux", []string{"benchmark", "kvm", "benchmark"}, Eligible},
		{"mandatory counts as supported", machine, "x86_64-linux", []string{"benchmark"}, Eligible},
		{"mandatory not asked", machine, "x86_64-linux", []string{"kvm"}, MandatoryNotRequired},
		{"nothing asked of mandatory", machine, "x86_64-linux", nil, MandatoryNotRequired},
		{"one of three missing", machine, "x86_64-linux", []string{"kvm", "benchmark", "nested"}, FeatureMissing},
		{"first reason is the system", machine, "riscv64-linux", []string{"nested"}, SystemUnsupported},
		{"missing before mandatory", machine, "x86_64-linux", []string{"nested"}, FeatureMissing},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := New()
			q.SetMachines([]Machine{tt.machine})
			q.SetState("m", Up, "")
			r := Request{ID: 1, System: tt.system, Features: tt.features}
			e := q.Explain(r)
			if e.Machines[0].Reason != tt.want {
				t.Errorf("Reason = %d (%s), want %d", e.Machines[0].Reason, e.Machines[0].Text, tt.want)
			}
			if placed := len(q.Enqueue(r)) == 1; placed != (tt.want == Eligible) {
				t.Errorf("placed = %v with reason %d", placed, tt.want)
			}
			noSlots := tt.machine
			noSlots.MaxJobs = 0
			q.SetMachines([]Machine{noSlots})
			if got := q.Explain(r).Machines[0].Reason; tt.want == Eligible && got != NoSlots || tt.want != Eligible && got != tt.want {
				t.Errorf("with max-jobs 0: Reason = %d", got)
			}
		})
	}
}

// A caller with 200 queued builds delays another's single build by one build's length.
func TestOneBuildOfAnotherCallerIsNextAmongTwoHundred(t *testing.T) {
	q := New()
	q.SetMachines([]Machine{{ID: "m", Systems: []string{"x", "y"}, MaxJobs: 2, Staging: -1}})
	q.SetState("m", Up, "")
	for id := range BuildID(200) {
		// Requirements of both kinds: turns go over all queues of a caller.
		q.Enqueue(Request{ID: id, System: []string{"x", "y"}[id%2], Caller: "alice"})
	}
	q.Enqueue(Request{ID: 1000, System: "y", Caller: "bob"})
	if got := q.Remove(0); len(got) != 1 || got[0].Build != 1000 {
		t.Errorf("Remove(0) = %v, want bob's build placed", got)
	}
	if got := q.Remove(1); len(got) != 1 || got[0].Build != 2 {
		t.Errorf("Remove(1) = %v, want alice's oldest placed", got)
	}
}

func TestQueueKeepsNothingOfTheCallersSlices(t *testing.T) {
	q := New()
	systems, features := []string{"x"}, []string{"b", "a"}
	ms := []Machine{{ID: "m", Systems: systems, SupportedFeatures: features, MaxJobs: 1}}
	q.SetMachines(ms)
	q.SetState("m", Up, "")
	r := Request{ID: 1, System: "x", Features: []string{"b", "a"}, Exclude: []MachineID{"z", "y"}}
	q.Enqueue(r)
	if !slices.Equal(features, []string{"b", "a"}) || !slices.Equal(r.Features, []string{"b", "a"}) || !slices.Equal(r.Exclude, []MachineID{"z", "y"}) {
		t.Errorf("the caller's slices were changed")
	}
	systems[0], features[0], r.Features[0], r.Exclude[0] = "other", "other", "other", "m"
	if e, _ := q.ExplainBuild(1); e.Machines[0].Reason != Eligible && e.Machines[0].Reason != SlotsTaken {
		t.Errorf("the caller's later changes reached the queue: %s", e)
	}
}

// Names are told apart whatever bytes they hold.
func TestRequirementsAreNotMixedUp(t *testing.T) {
	q := New()
	q.SetMachines([]Machine{{ID: "m", Systems: []string{"x"}, SupportedFeatures: []string{"a", "b"}, MaxJobs: 9}})
	q.SetState("m", Up, "")
	for _, r := range []Request{
		{System: "x", Features: []string{"a", "b"}},
		{System: "x", Features: []string{"a,b"}},
		{System: "x", Features: []string{"a1:b"}},
		{System: "x", Features: []string{"a:b"}},
		{System: "x", Features: []string{"a\x00b"}},
		{System: "x1:a1:b"},
		{System: "x", Features: []string{"a", "m"}},
		{System: "x", Features: []string{"a"}, Exclude: []MachineID{"m"}},
	} {
		want := r.System == "x" && (slices.Equal(r.Features, []string{"a", "b"}) || slices.Equal(r.Features, []string{"a"}))
		if got := q.Explain(r).Machines[0].Reason == Eligible; got != want {
			t.Errorf("Explain(%+v): eligible = %v, want %v", r, got, want)
		}
	}
}

// Many requirements that come and go neither stay in memory nor harm those in use.
func TestIdleRequirementsAreForgotten(t *testing.T) {
	q := New()
	q.SetMachines([]Machine{{ID: "m", Systems: []string{"x"}, MaxJobs: 1, Staging: -1}})
	q.SetState("m", Up, "")
	q.Enqueue(Request{ID: 1, System: "x"})
	q.Enqueue(Request{ID: 2, System: "x"})
	for i := range 10_000 {
		q.Offer(Request{System: "x", Features: []string{fmt.Sprint(i)}}, false)
	}
	if n := q.Requirements(); n > 1000 {
		t.Errorf("%d requirements kept, want at most some hundreds", n)
	}
	if got := q.Remove(1); len(got) != 1 || got[0].Build != 2 {
		t.Errorf("Remove(1) = %v, want 2 placed", got)
	}
}

// What a build leaves behind is nothing.
func TestQueueIsEmptyAfterItsBuilds(t *testing.T) {
	q, _, _ := saturated(5, 50)
	for _, b := range q.Builds() {
		q.Remove(b.ID)
	}
	if builds, callers, systems, waiting := q.Sizes(); builds+callers+systems+waiting != 0 {
		t.Errorf("left over: %d builds, %d callers, %d systems, %d waiting", builds, callers, systems, waiting)
	}
}
