package scheduler_test

import (
	"fmt"
	"strings"
	"testing"

	. "nixdispatch/scheduler"
)

// TestOfferFollowsTheTableOfReplies has a case for each row, and one beside
// each border between two rows.
func TestOfferFollowsTheTableOfReplies(t *testing.T) {
	const local, remote, willing, unwilling = true, false, true, false
	// m is one machine: state, slots, and builds on it that are not done.
	type m struct {
		state  MachineState
		slots  int
		builds int
	}
	tests := []struct {
		name        string
		machines    []m
		queuedLocal int // builds of the system queued before that could be built locally
		queuedOther int // and that could not
		couldLocal  bool
		amWilling   bool
		want        Reply
		situation   Situation
		machine     MachineID
		why         string
	}{
		{"slot free", []m{{Up, 1, 0}}, 0, 0, remote, unwilling, Accept, SlotFree, "m0", "the only matching machine with a free slot"},
		{"slot free, though a local one is too", []m{{Up, 1, 0}}, 0, 0, local, willing, Accept, SlotFree, "m0", ""},
		{"slot free on the second", []m{{Up, 1, 1}, {Up, 1, 0}}, 0, 0, local, willing, Accept, SlotFree, "m1", ""},
		{"slot free beside a machine that is down", []m{{Down, 9, 0}, {Up, 1, 0}}, 0, 0, remote, unwilling, Accept, SlotFree, "m1", ""},

		{"no machines", nil, 0, 0, remote, unwilling, Decline, Impossible, "", "no machine can build it"},
		{"no machines, local", nil, 0, 0, local, unwilling, Decline, Impossible, "", ""},
		{"only a machine without slots", []m{{Up, 0, 0}}, 0, 0, remote, unwilling, Decline, Impossible, "", ""},

		{"full, local slot free", []m{{Up, 2, 2}}, 0, 0, local, willing, Decline, FullLocalFree, "", "all matching machines are full, and a local slot is free"},
		{"full, willing but not able", []m{{Up, 2, 2}}, 0, 0, remote, willing, AcceptQueued, Full, "", "waits: all matching machines are full"},

		{"full, no local slot, none queued", []m{{Up, 2, 2}}, 0, 0, local, unwilling, AcceptQueued, FullLocalBusy, "", "waits: all matching machines are full, and no local slot is free"},
		{"full, no local slot, one queued for two slots", []m{{Up, 2, 2}}, 1, 0, local, unwilling, AcceptQueued, FullLocalBusy, "", ""},
		{"full, no local slot, two queued for two slots", []m{{Up, 2, 2}}, 2, 0, local, unwilling, Postpone, FullLocalQueued, "", "all matching machines are full, and enough of the caller's builds wait that could be built locally"},
		{"full, no local slot, others queued do not count", []m{{Up, 2, 2}}, 1, 50, local, unwilling, AcceptQueued, FullLocalBusy, "", ""},
		{"full, slots of a coming machine count", []m{{Up, 2, 2}, {Connecting, 1, 0}}, 2, 0, local, unwilling, AcceptQueued, FullLocalBusy, "", ""},
		{"full, slots of a machine that is down do not", []m{{Up, 2, 2}, {Down, 9, 0}}, 2, 0, local, unwilling, Postpone, FullLocalQueued, "", ""},

		{"full, not local, 511 queued", []m{{Up, 2, 2}}, 0, 511, remote, unwilling, AcceptQueued, Full, "", "waits: all matching machines are full"},
		{"full, not local, 512 queued", []m{{Up, 2, 2}}, 0, 512, remote, unwilling, Postpone, FullQueue, "", "all matching machines are full, and too many of the caller's builds wait already"},
		{"full, not local, 512 queued of both kinds", []m{{Up, 2, 2}}, 1, 511, remote, unwilling, Postpone, FullQueue, "", ""},
		{"full, not local, 799 queued for 200 slots", []m{{Up, 200, 200}}, 0, 799, remote, unwilling, AcceptQueued, Full, "", ""},
		{"full, not local, 800 queued for 200 slots", []m{{Up, 200, 200}}, 0, 800, remote, unwilling, Postpone, FullQueue, "", ""},

		{"none up, local", []m{{Down, 2, 0}}, 0, 0, local, unwilling, Decline, NoneUpLocal, "", "no matching machine is up, and it can be built locally"},
		{"none up, not local", []m{{Down, 2, 0}, {Draining, 2, 0}}, 0, 0, remote, unwilling, AcceptQueued, NoneUp, "", "waits: no matching machine is up"},
		{"only parked and down, local", []m{{Parked, 2, 0}, {Down, 2, 0}}, 0, 0, local, unwilling, Decline, NoneUpLocal, "", "all matching machines that are up are parked, and it can be built locally"},
		{"only parked, not local", []m{{Parked, 2, 0}}, 0, 0, remote, unwilling, AcceptQueued, NoneUp, "", "waits: all matching machines that are up are parked"},
		{"slot free beside a machine that is parked", []m{{Parked, 9, 0}, {Up, 1, 0}}, 0, 0, remote, unwilling, Accept, SlotFree, "m1", ""},
		{"none up, not local, 512 queued", []m{{Down, 2, 0}}, 0, 512, remote, unwilling, Postpone, FullQueue, "", ""},
		{"coming is not down, not local", []m{{Connecting, 2, 0}}, 0, 0, remote, unwilling, AcceptQueued, Full, "", "waits: no matching machine is up, but some are still connecting"},
		{"coming is not down, local", []m{{Connecting, 2, 0}, {Down, 2, 0}}, 0, 0, local, unwilling, Postpone, ComingLocal, "", "no matching machine is up, but some are still connecting, and no local slot is free"},
		{"coming is not down, local slot free", []m{{Connecting, 2, 0}}, 0, 0, local, willing, Decline, FullLocalFree, "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := New()
			var ms []Machine
			for i, m := range tt.machines {
				ms = append(ms, Machine{ID: MachineID(fmt.Sprintf("m%d", i)), Systems: []string{"x", fmt.Sprint(i)}, MaxJobs: m.slots, Staging: -1})
			}
			q.SetMachines(ms)
			id := BuildID(0)
			enqueue := func(system string, couldLocal bool, n int) {
				for range n {
					id++
					q.Enqueue(Request{ID: id, System: system, CouldBuildLocally: couldLocal})
				}
			}
			for i, m := range tt.machines {
				q.SetState(ms[i].ID, Up, "")
				enqueue(fmt.Sprint(i), false, m.builds) // these fit this machine only
				q.SetState(ms[i].ID, m.state, "")
			}
			enqueue("x", true, tt.queuedLocal)
			enqueue("x", false, tt.queuedOther)

			r := Request{ID: 1 << 32, System: "x", CouldBuildLocally: tt.couldLocal}
			before := q.Snapshot()
			got := q.Offer(r, tt.amWilling)
			if got.Reply != tt.want || got.Situation != tt.situation || got.Machine != tt.machine {
				t.Errorf("Offer = %s in situation %d, machine %q; want %s, %d, %q",
					got.Reply, got.Situation, got.Machine, tt.want, tt.situation, tt.machine)
			}
			if got.Why == "" || tt.why != "" && got.Why != tt.why {
				t.Errorf("Why = %q, want %q", got.Why, tt.why)
			}
			if fmt.Sprint(q.Snapshot()) != fmt.Sprint(before) {
				t.Errorf("Offer changed the queue")
			}
			if orders := q.Enqueue(r); tt.want == Accept && (len(orders) != 1 || orders[0].Machine != tt.machine) {
				t.Errorf("Enqueue after Accept = %v, want it placed on %s", orders, tt.machine)
			}
		})
	}
}

// Builds for another system neither use the slots nor fill the queue of this one.
func TestOfferCountsTheSystemsApart(t *testing.T) {
	q := New()
	q.SetMachines([]Machine{
		{ID: "x", Systems: []string{"x"}, MaxJobs: 1, Staging: -1},
		{ID: "y", Systems: []string{"y"}, MaxJobs: 100, Staging: -1},
	})
	q.SetState("x", Up, "")
	for id := range BuildID(1 + 512) {
		q.Enqueue(Request{ID: id, System: "x"})
	}
	for id := range BuildID(3) {
		q.Enqueue(Request{ID: 1000 + id, System: "y", CouldBuildLocally: true})
	}
	if d := q.Offer(Request{System: "x"}, false); d.Situation != FullQueue {
		t.Errorf("x with 512 queued: situation %d, want FullQueue", d.Situation)
	}
	if d := q.Offer(Request{System: "y"}, false); d.Situation != Full {
		t.Errorf("y with 3 queued: situation %d, want Full", d.Situation)
	}
	if d := q.Offer(Request{System: "x", CouldBuildLocally: true}, false); d.Situation != FullLocalBusy {
		t.Errorf("x with no local build queued: situation %d, want FullLocalBusy", d.Situation)
	}
}

// The bounds are each caller's own: one that fills its own keeps nobody else out, who may
// then queue as many.
func TestOfferBoundsEachCaller(t *testing.T) {
	for _, tt := range []struct {
		name  string
		local bool
		most  int
		full  Situation
		taken Situation
	}{
		{"only machines can build it", false, 512, FullQueue, Full},
		{"it could be built locally", true, 2, FullLocalQueued, FullLocalBusy},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := New()
			q.SetMachines([]Machine{{ID: "m", Systems: []string{"x"}, MaxJobs: 2, Staging: -1}})
			q.SetState("m", Up, "")
			id := BuildID(0)
			enqueue := func(caller string) {
				id++
				q.Enqueue(Request{ID: id, System: "x", Caller: caller, CouldBuildLocally: tt.local})
			}
			offer := func(caller string) Situation {
				return q.Offer(Request{System: "x", Caller: caller, CouldBuildLocally: tt.local}, false).Situation
			}
			for range 2 + 20_000 { // two have the slots
				enqueue("mallory")
			}
			if got := offer("mallory"); got != tt.full {
				t.Errorf("who has 20,000 queued: situation %d, want %d", got, tt.full)
			}
			for n := range tt.most {
				if got := offer("alice"); got != tt.taken {
					t.Fatalf("another with %d queued: situation %d, want %d", n, got, tt.taken)
				}
				enqueue("alice")
			}
			if got := offer("alice"); got != tt.full {
				t.Errorf("another with %d queued: situation %d, want %d", tt.most, got, tt.full)
			}
			if got := offer("bob"); got != tt.taken {
				t.Errorf("one with nothing queued: situation %d, want %d", got, tt.taken)
			}
		})
	}
}

func TestExplainTextQuotesWhatCouldForgeLines(t *testing.T) {
	q := New()
	q.SetMachines([]Machine{
		{ID: "ssh://a\nssh://b", Systems: []string{"x\x1b[31m"}, MaxJobs: 1},
		{ID: "ssh://c", Systems: []string{"x"}, MaxJobs: 1},
		{ID: "ssh://d", Systems: []string{"x"}, SupportedFeatures: []string{"é"}, MandatoryFeatures: []string{"\xff"}, MaxJobs: 1},
		{ID: "ssh://e", MaxJobs: 1},
	})
	q.SetState("ssh://c", Down, "bad\r\nthing")
	got := q.Explain(Request{System: "x"}).String()
	want := `build for system x: no matching machine is up
  "ssh://a\nssh://b" does not support system x (it has "x\x1b[31m")
  ssh://c is down: "bad\r\nthing"
  ssh://d takes only builds that require feature "\xff"
  ssh://e does not support system x (it has none)`
	if got := strings.Replace(got, "waits: ", "", 1); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if got, want := q.Explain(Request{System: "", Features: []string{"a\nb", "é"}}).Text(1), `build for system "" requiring features "a\nb", é: no machine can build it
  "ssh://a\nssh://b" does not support system "" (it has "x\x1b[31m")
  and 3 more`; got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}
