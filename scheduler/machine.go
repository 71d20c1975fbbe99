package scheduler

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// A MachineID names a machine: its store URI, such as "ssh://mac". Machines with
// the same URI, which share its slots, are told apart by a '#' and what the
// caller likes after it: no store URI in a machines file has a '#'.
type MachineID string

// URI is the store URI that the machine is named after.
func (id MachineID) URI() string {
	uri, _, _ := strings.Cut(string(id), "#")
	return uri
}

// A Machine is what the scheduler needs to know of one machine.
type Machine struct {
	ID MachineID
	// List is the list of machines that it stands in; "" is a list, too. It takes
	// only builds that name the same.
	List string
	// Systems it builds for, such as "x86_64-linux". Every machine builds for "builtin".
	Systems []string
	// SupportedFeatures and MandatoryFeatures: see the package comment.
	SupportedFeatures []string
	MandatoryFeatures []string
	// MaxJobs is the number of build slots, of those that its URI has. A machine
	// with 0 (or less) is never used.
	MaxJobs int
	// SpeedFactor is relative to the other machines. 0, negative and NaN mean 1.
	SpeedFactor float64
	// Staging is the number of builds placed on the machine beyond MaxJobs, so that
	// their inputs travel while all slots are busy. 0 means half of MaxJobs, at least
	// one: enough to have the next inputs there when builds take longer than their
	// uploads, and few enough that little is bound to a machine early. Negative means none.
	// There are as many again for callers that have no build in line.
	Staging int
}

// A MachineState tells whether a machine takes builds.
type MachineState int

// The states of a machine. A new machine is Connecting.
const (
	// Connecting is the first attempt: the machine is coming, not down.
	Connecting MachineState = iota
	// Up takes builds.
	Up
	// Down is out of reach, or parked after failures.
	Down
	// Draining takes no new builds; those placed on it still get their slots.
	Draining
	// Parked is as Draining, but for a while only: the machine is short of something.
	Parked
	// Suspect is connected and does not answer. It is up for builds that no other
	// machine that is up or coming can take. The others that have no slot there leave it.
	Suspect
)

// String returns the state as status shows it.
func (s MachineState) String() string {
	switch s {
	case Connecting:
		return "connecting"
	case Up:
		return "up"
	case Down:
		return "down"
	case Draining:
		return "draining"
	case Parked:
		return "parked"
	case Suspect:
		return "suspect"
	default:
		return fmt.Sprintf("state %d", int(s))
	}
}

// A machine is a Machine with what is on it.
type machine struct {
	Machine
	pool      *pool
	systems   map[string]bool
	supported map[string]bool // includes the mandatory features
	state     MachineState
	reason    string
	// index is the place in Queue.machines, -1 once removed from the list.
	index   int
	running int
	placed  int
	held    int
	// line holds the placed builds without a slot, in the order of their placing.
	line []*build
	// reaches are those that it is in.
	reaches []*reach
	// bound is the place of slots() in pool.bounds.
	bound int
	// Derived by Queue.refresh, which counts them in the reaches:
	load    int       // how many of its slots are spoken for; see pool.free
	place   placeKind // the best that it has for another build; noPlace if it takes none
	doubted bool      // it is suspect: place counts in reach.doubtful, else in reach.free
	movable bool      // the builds in line may go elsewhere
}

// configure takes over m's settings, normalised, and copies its lists.
func (m *machine) configure(conf Machine) {
	conf.Systems = sortedSet(conf.Systems)
	conf.SupportedFeatures = sortedSet(conf.SupportedFeatures)
	conf.MandatoryFeatures = sortedSet(conf.MandatoryFeatures)
	conf.MaxJobs = max(0, conf.MaxJobs)
	if math.IsNaN(conf.SpeedFactor) || conf.SpeedFactor <= 0 {
		conf.SpeedFactor = 1
	}
	switch {
	case conf.Staging < 0:
		conf.Staging = 0
	case conf.Staging == 0:
		conf.Staging = max(1, conf.MaxJobs/2)
	}
	m.Machine = conf
	m.systems = make(map[string]bool, len(conf.Systems))
	for _, s := range conf.Systems {
		m.systems[s] = true
	}
	m.supported = make(map[string]bool, len(conf.SupportedFeatures)+len(conf.MandatoryFeatures))
	for _, f := range slices.Concat(conf.SupportedFeatures, conf.MandatoryFeatures) {
		m.supported[f] = true
	}
}

// takes tells whether new builds may be placed on m, room permitting.
func (m *machine) takes() bool { return m.index >= 0 && m.up() }

// up tells whether m is connected to and takes builds.
func (m *machine) up() bool { return m.state == Up || m.state == Suspect }

// grants tells whether builds on m may be given a slot.
func (m *machine) grants() bool {
	return (m.up() || m.state == Draining || m.state == Parked) && m.pool.free(m, m.pool.busy) > 0
}

// coming tells whether m is up or on its first connection attempt.
func (m *machine) coming() bool { return m.up() || m.state == Connecting }

// mismatch returns the first reason why m could never run a build that needs
// system and features (sorted), or Eligible.
func (m *machine) mismatch(system string, features []string) Reason {
	if system != "builtin" && !m.systems[system] {
		return SystemUnsupported
	}
	for _, f := range features {
		if !m.supported[f] {
			return FeatureMissing
		}
	}
	for _, f := range m.MandatoryFeatures {
		if _, found := slices.BinarySearch(features, f); !found {
			return MandatoryNotRequired
		}
	}
	if m.MaxJobs == 0 {
		return NoSlots
	}
	return Eligible
}

// A choiceRule is the rule that made one machine better than another.
type choiceRule int

const (
	ruleOnly choiceRule = iota // no other machine to compare with
	ruleLoadPerSpeed
	ruleSpeed
	ruleLoad
	ruleFirst
)

// compare tells which of a and b a build goes to, and by which rule; negative
// means a. The rules are tried in order. a and b differ.
func compare(a, b *machine) (int, choiceRule) {
	la, lb := float64(a.load)/a.SpeedFactor, float64(b.load)/b.SpeedFactor
	switch {
	case la != lb:
		return sign(la < lb), ruleLoadPerSpeed
	case a.SpeedFactor != b.SpeedFactor:
		return sign(a.SpeedFactor > b.SpeedFactor), ruleSpeed
	case a.load != b.load:
		return sign(a.load < b.load), ruleLoad
	default:
		return sign(a.index < b.index), ruleFirst
	}
}

func sign(negative bool) int {
	if negative {
		return -1
	}
	return 1
}

// A placeKind is what a machine has free for a build.
type placeKind int

const (
	slotPlace    placeKind = iota // a build slot
	stagingPlace                  // a staging place
	turnPlace                     // one for a caller that has no build in line
	placeKinds                    // how many there are
	noPlace      = placeKinds
)

// has tells whether m has a place of a kind, or a better one.
func (m *machine) has(k placeKind) bool { return m.place <= k }

// choose returns the machine for a build of class c: among those with a free
// slot, else among those with a free staging place, else, if its turn lets it,
// among those with a place for that; nil when there is none. The rule is the last
// one needed to set it apart from all others.
func (c *class) choose(turn bool) (best *machine, rule choiceRule) {
	kind := slotPlace
	switch {
	case c.free(slotPlace) > 0:
	case c.free(stagingPlace) > 0:
		kind = stagingPlace
	case turn && c.free(turnPlace) > 0:
		kind = turnPlace
	default:
		return nil, ruleOnly
	}
	avoids, doubts := c.avoids(), c.doubts()
	for _, m := range c.reach.machines {
		if !m.has(kind) || doubts && m.doubted || avoids && slices.Contains(c.excluded, m) {
			continue
		}
		if best == nil {
			best = m
			continue
		}
		// A rule that separates the new best from the old one also separates it from
		// all that lost to the old one by a later rule.
		if cmp, r := compare(m, best); cmp < 0 {
			best, rule = m, r
		} else {
			rule = max(rule, r)
		}
	}
	return best, rule
}

// sortedSet returns the elements of list sorted, each once, in a new slice.
func sortedSet(list []string) []string {
	list = slices.Clone(list)
	slices.Sort(list)
	return slices.Compact(list)
}
