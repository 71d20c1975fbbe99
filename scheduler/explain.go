package scheduler

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// A Reason is the first thing that keeps a build from a machine.
type Reason int

// The reasons, in the order they are looked at. The first four are for ever,
// as long as the machine and the build stay what they are.
const (
	Eligible Reason = iota // nothing does
	SystemUnsupported
	FeatureMissing
	MandatoryNotRequired
	NoSlots // max-jobs is 0
	StillConnecting
	OutOfReach
	BeingDrained
	IsParked
	IsSuspect // and others can take it
	FailedBefore
	SlotsTaken
)

// A Verdict is what is to be said of one machine for one build.
type Verdict struct {
	Machine MachineID
	Reason  Reason
	// Text says Reason in words, with what is found and needed.
	Text string
	// Place tells that, although all slots are taken, a staging place is free.
	Place bool
}

// An Explanation tells where a build can go, and why not elsewhere.
type Explanation struct {
	System   string
	Features []string
	// Situation is Impossible, SlotFree, Full or NoneUp.
	Situation Situation
	// Chosen is the machine it goes to now, or is on; "" if none has room.
	Chosen MachineID
	// Why says in a line what happens to the build.
	Why string
	// Machines has all machines of the build's list, in its order.
	Machines []Verdict
}

// Explain tells where a build such as r would go now. It changes nothing.
func (q *Queue) Explain(r Request) Explanation {
	n := q.requirement(r)
	c := n.reach.class(r)
	e := Explanation{System: r.System, Features: n.features}
	for _, m := range q.machines {
		if m.List == n.list {
			v := n.judge(m, c)
			if v.Reason == FailedBefore && c.rests {
				v.Text = "failed this build before, and does not get it " + printable(r.Rest)
			}
			e.Machines = append(e.Machines, v)
		}
	}
	t := n.reach.tally()
	u := q.callers[r.Caller]
	m, rule := c.choose(u == nil || u.hungry(r.Priority))
	e.Situation = t.situation()
	e.Why = c.why(r.Rest)
	if m != nil {
		e.Chosen = m.ID
		if m.has(slotPlace) {
			e.Situation = SlotFree
		}
		e.Why = "goes to " + printable(m.ID.URI()) + ": " + rule.text(m)
	}
	return e
}

// situation is that of builds for which there is no place.
func (t tally) situation() Situation {
	switch {
	case t.matching == 0:
		return Impossible
	case t.coming == 0:
		return NoneUp
	default:
		return Full
	}
}

// Possible tells whether a machine could ever build r. It is what Explain tells with
// its situation, without a word for each machine.
func (q *Queue) Possible(r Request) bool { return len(q.requirement(r).reach.machines) > 0 }

// ExplainBuild is Explain for a build the Queue knows, with the machines it
// failed on, and tells where it is if it is placed already; false if it knows
// none such.
func (q *Queue) ExplainBuild(id BuildID) (Explanation, bool) {
	b := q.builds[id]
	if b == nil {
		return Explanation{}, false
	}
	e := q.Explain(b.req)
	if b.machine != nil {
		e.Chosen = b.machine.ID
		e.Why = "is " + b.phase.String() + " on " + printable(b.machine.ID.URI())
	}
	return e, true
}

// judge tells what keeps builds of c, which ask for n, from m.
func (n *requirement) judge(m *machine, c *class) Verdict {
	v := Verdict{Machine: m.ID, Reason: m.mismatch(n.system, n.features)}
	switch {
	case v.Reason != Eligible:
	case m.state == Connecting:
		v.Reason = StillConnecting
	case m.state == Down:
		v.Reason = OutOfReach
	case m.state == Draining:
		v.Reason = BeingDrained
	case m.state == Parked:
		v.Reason = IsParked
	case m.state == Suspect && c.doubts():
		v.Reason = IsSuspect
	case !c.ok(m):
		v.Reason = FailedBefore
	case !m.has(slotPlace):
		v.Reason, v.Place = SlotsTaken, m.has(stagingPlace)
	}
	v.Text = m.words(v.Reason, n)
	return v
}

// words says reason in words.
func (m *machine) words(reason Reason, n *requirement) string {
	switch reason {
	case SystemUnsupported:
		return "does not support system " + printable(n.system) + " (it has " + listed(m.Systems) + ")"
	case FeatureMissing:
		missing := slices.DeleteFunc(slices.Clone(n.features), func(f string) bool { return m.supported[f] })
		return "does not support required " + features(missing)
	case MandatoryNotRequired:
		extra := slices.DeleteFunc(slices.Clone(m.MandatoryFeatures), func(f string) bool {
			_, found := slices.BinarySearch(n.features, f)
			return found
		})
		return "takes only builds that require " + features(extra)
	case NoSlots:
		return "has max-jobs 0"
	case StillConnecting:
		return "is still connecting" + because(m.reason)
	case OutOfReach:
		return "is down" + because(m.reason)
	case BeingDrained:
		return "is drained" + because(m.reason)
	case IsParked:
		return "is parked" + because(m.reason)
	case IsSuspect:
		return "is suspect" + because(m.reason) + ", and others can take it"
	case FailedBefore:
		return "failed this build before, and others can take it"
	case SlotsTaken:
		return m.loadWords()
	default:
		return fmt.Sprintf("is eligible: %d of %d slots taken, speed factor %s",
			m.load, m.MaxJobs, strconv.FormatFloat(m.SpeedFactor, 'g', -1, 64))
	}
}

// loadWords tells what takes m's slots, which are all taken.
func (m *machine) loadWords() string {
	words := fmt.Sprintf("is full: all %d slots are taken", m.MaxJobs)
	if m.MaxJobs == 1 {
		words = "is full: its only slot is taken"
	}
	sep := " ("
	for _, p := range []struct {
		n    int
		what string
	}{
		{m.pool.sum(func(m *machine) int { return m.running }), "running"},
		{m.pool.sum(func(m *machine) int { return len(m.line) }), "with inputs on the way or waiting for a slot"},
		{m.pool.sum(func(m *machine) int { return m.held }), "held after a lost connection"},
	} {
		if p.n > 0 {
			words += sep + strconv.Itoa(p.n) + " " + p.what
			sep = ", "
		}
	}
	words += ")"
	if len(m.pool.machines) > 1 {
		words += ", counted over all lines with this URI"
	}
	if m.has(stagingPlace) {
		words += "; a staging place is free"
	}
	return words
}

// String is Text without a limit.
func (e Explanation) String() string { return e.Text(0) }

// Text returns the explanation as lines without a final newline: what is
// needed, what happens, and a line for each machine; beyond limit machines
// (0: no limit) only their number.
func (e Explanation) Text(limit int) string {
	var b strings.Builder
	b.WriteString("build for system " + printable(e.System))
	if len(e.Features) > 0 {
		b.WriteString(" requiring " + features(e.Features))
	}
	b.WriteString(": " + e.Why)
	for i, v := range e.Machines {
		if limit > 0 && i == limit {
			fmt.Fprintf(&b, "\n  and %d more", len(e.Machines)-limit)
			break
		}
		b.WriteString("\n  " + printable(v.Machine.URI()) + " " + v.Text)
	}
	return b.String()
}

const (
	whyGrant    = "its inputs are there and a slot is free"
	whyMove     = "a slot is free there, and its machine has none for it"
	whyWithdraw = "the machines changed, and the machine may not build it any more"
	whySuspect  = "its machine does not answer, and others can take it"
)

// text says why m was chosen.
func (r choiceRule) text(m *machine) string {
	switch {
	case m.has(slotPlace):
		return slotTexts[r]
	case m.has(stagingPlace):
		return stagingTexts[r]
	default:
		return turnTexts[r]
	}
}

var slotTexts = [...]string{
	ruleOnly:         "the only matching machine with a free slot",
	ruleLoadPerSpeed: "a slot is free; lowest load/speed factor",
	ruleSpeed:        "a slot is free; fastest of those with the lowest load/speed factor",
	ruleLoad:         "a slot is free; least loaded of the fastest",
	ruleFirst:        "a slot is free; first in the list among equals",
}

var stagingTexts = [...]string{
	ruleOnly:         "no slot is free; the only matching machine with a staging place",
	ruleLoadPerSpeed: "no slot is free; lowest load/speed factor of those with a staging place",
	ruleSpeed:        "no slot is free; fastest of those with a staging place and the lowest load/speed factor",
	ruleLoad:         "no slot is free; least loaded of the fastest with a staging place",
	ruleFirst:        "no slot is free; first in the list among equals with a staging place",
}

var turnTexts = [...]string{
	ruleOnly:         "no slot is free; the only matching machine with a place for who has no build in line",
	ruleLoadPerSpeed: "no slot is free; lowest load/speed factor of those with a place for who has no build in line",
	ruleSpeed:        "no slot is free; fastest of those with a place for who has no build in line and the lowest load/speed factor",
	ruleLoad:         "no slot is free; least loaded of the fastest with a place for who has no build in line",
	ruleFirst:        "no slot is free; first in the list among equals with a place for who has no build in line",
}

// text says the situation in words.
func (s Situation) text(t tally) string {
	switch s {
	case SlotFree:
		return "a matching machine has a free slot"
	case Impossible:
		return "no machine can build it"
	case FullLocalFree:
		return t.full() + ", and a local slot is free"
	case ComingLocal:
		return t.full() + ", and no local slot is free"
	case FullLocalBusy:
		return "waits: " + t.full() + ", and no local slot is free"
	case FullLocalQueued:
		return t.full() + ", and enough of the caller's builds wait that could be built locally"
	case Full:
		return "waits: " + t.full()
	case FullQueue:
		return t.full() + ", and too many of the caller's builds wait already"
	case NoneUpLocal:
		return t.full() + ", and it can be built locally"
	case NoneUp:
		return "waits: " + t.full()
	default:
		return fmt.Sprintf("situation %d", int(s))
	}
}

// full says why none of the matching machines has a free slot.
func (t tally) full() string {
	switch {
	case t.coming == 0 && t.parked > 0:
		return "all matching machines that are up are parked"
	case t.coming == 0:
		return "no matching machine is up"
	case t.up == 0:
		return "no matching machine is up, but some are still connecting"
	case t.suspect > 0 && t.suspect < t.coming:
		return "all matching machines that answer are full or still connecting"
	case t.up < t.coming:
		return "all matching machines are full or still connecting"
	default:
		return "all matching machines are full"
	}
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + printable(reason)
}

func features(list []string) string {
	if len(list) == 1 {
		return "feature " + listed(list)
	}
	return "features " + listed(list)
}

func listed(list []string) string {
	if len(list) == 0 {
		return "none"
	}
	quoted := make([]string, len(list))
	for i, s := range list {
		quoted[i] = printable(s)
	}
	return strings.Join(quoted, ", ")
}

// printable quotes s unless it is plain text: what comes from derivations,
// files and machines must not steer a terminal or forge lines.
func printable(s string) string {
	plain := s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !unicode.IsPrint(r) || r == unicode.ReplacementChar
	})
	if plain {
		return s
	}
	return strconv.Quote(s)
}
