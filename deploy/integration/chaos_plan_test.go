package integration

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
	"time"
)

// A soakFault is one thing that goes wrong in a soak, for a while.
type soakFault struct {
	kind  string        // one of machineFaults or daemonFaults
	on    string        // the machine, or "nix-dispatchd"
	at    time.Duration // from the beginning of the soak
	lasts time.Duration
}

func (f soakFault) String() string {
	return fmt.Sprintf("%5.1f s: %s: %s, for %.1f s", f.at.Seconds(), f.on, f.kind, f.lasts.Seconds())
}

// The kinds of faults.
const (
	poweredOff     = "powered off"
	frozen         = "frozen"
	cutOff         = "cut off"
	flapping       = "link flaps" // becomes several of cutOff
	slowLine       = "slow line"
	sshdKilled     = "sshd killed and started"
	remotesKilled  = "processes of Nix killed"
	noNixDaemon    = "no nix-daemon"
	collects       = "garbage collected"
	daemonKilled   = "killed"
	daemonStopped  = "stopped"
	soakedDaemon   = "nix-dispatchd"
	daemonAwayMost = 8 * time.Second // hooks wait half a minute for it
)

var (
	machineFaults = []string{poweredOff, frozen, cutOff, flapping, slowLine, sshdKilled, remotesKilled, noNixDaemon, collects}
	daemonFaults  = []string{daemonKilled, daemonStopped}
)

// planFaults has one machine at a time suffer, and nix-dispatchd beside them, until
// total is over; each for longest at most. The same seed makes the same plan.
func planFaults(seed uint64, machines []string, total, longest time.Duration) []soakFault {
	onMachines, onDaemon := rand.New(rand.NewPCG(seed, 1)), rand.New(rand.NewPCG(seed, 2))
	plan := append(
		planTrack(onMachines, machineFaults, machines, total, longest, longest/5),
		// It has to come to something in between.
		planTrack(onDaemon, daemonFaults, []string{soakedDaemon}, total, min(longest, daemonAwayMost), longest)...)
	slices.SortStableFunc(plan, func(a, b soakFault) int { return cmp.Compare(a.at, b.at) })
	return plan
}

// planTrack makes faults that come one after the other, with a pause of between a
// half and three halves of pause before each.
func planTrack(random *rand.Rand, kinds, on []string, total, longest, pause time.Duration) []soakFault {
	var plan []soakFault
	upTo := func(d time.Duration) time.Duration { return time.Duration(random.Int64N(int64(d))) }
	for at := time.Duration(0); ; {
		at += pause/2 + upTo(pause)
		f := soakFault{kind: kinds[random.IntN(len(kinds))], on: on[random.IntN(len(on))], at: at, lasts: longest/10 + upTo(longest*9/10)}
		if at += f.lasts; at > total {
			return plan
		}
		if f.kind != flapping {
			plan = append(plan, f)
			continue
		}
		for end := f.at + f.lasts; f.at < end; f.at += 2 * flapsEvery {
			plan = append(plan, soakFault{kind: cutOff, on: f.on, at: f.at, lasts: flapsEvery})
		}
		at = max(at, f.at)
	}
}

// An order is what a caller of a soak asks for.
type order struct {
	way    int // see ask
	work   work
	leaves time.Duration  // when the caller is ended; 0 if it stays
	signal syscall.Signal // by which
}

func (o order) String() string {
	text := fmt.Sprintf("%s: way %d, %d pieces and %d that fail, %d bytes each, chain %d", o.work.name, o.way, o.work.good, o.work.bad, o.work.size, o.work.chain)
	if o.leaves > 0 {
		text += fmt.Sprintf(", gets %v after %.1f s", o.signal, o.leaves.Seconds())
	}
	return text
}

// orders are what one caller asks for, one after the other: the same for the same
// seed, however long each takes.
type orders struct {
	random *rand.Rand
	caller int
	n      int
}

func newOrders(seed uint64, caller int) *orders {
	return &orders{random: rand.New(rand.NewPCG(seed, uint64(100+caller))), caller: caller}
}

func (o *orders) next() order {
	o.n++
	r := o.random
	next := order{way: r.IntN(3), work: work{
		name: fmt.Sprintf("soak-%d-%d", o.caller, o.n), good: 2 + r.IntN(4), bad: r.IntN(2),
		size: 10_000 + r.IntN(300_000), chain: []int{0, 0, 3}[r.IntN(3)],
		script: fmt.Sprintf("sleep %.1f", 0.2+2*r.Float64()),
	}}
	if r.IntN(6) == 0 {
		next.leaves = 100*time.Millisecond + time.Duration(r.IntN(4000))*time.Millisecond
		next.signal = []syscall.Signal{syscall.SIGKILL, syscall.SIGINT, syscall.SIGTERM}[r.IntN(3)]
	}
	return next
}

// TestSoakReplays makes the plan of a soak twice: the seed alone decides it.
func TestSoakReplays(t *testing.T) {
	t.Parallel()
	plan := func(seed uint64) string {
		text := fmt.Sprint(planFaults(seed, soakedMachines, 10*time.Minute, time.Minute))
		o := newOrders(seed, 1)
		for range 50 {
			text += fmt.Sprintln(o.next())
		}
		return text
	}
	first, again := plan(7), plan(7)
	if first != again {
		t.Error("the same seed makes two plans")
	}
	if first == plan(8) {
		t.Error("two seeds make one plan")
	}
	busy := make(map[string]time.Duration) // until when
	for _, f := range planFaults(7, soakedMachines, 10*time.Minute, time.Minute) {
		track := "machines"
		if f.on == soakedDaemon {
			track = f.on
		}
		if f.at < busy[track] || f.at+f.lasts > 10*time.Minute+2*flapsEvery {
			t.Errorf("%s, but there is something until %s", f, busy[track])
		}
		busy[track] = f.at + f.lasts
	}
}
