package webpage

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// A view is what page.html is filled in with.
type view struct {
	Host, Version, Now, Started string
	// Named tells whether derivations, users and words of machines are shown.
	Named  bool
	listed func(uri string) bool

	Up, Machines, InUse, Slots, Building, Queued int

	Notices      []string
	Shown        []machine
	MoreMachines int
	Queue        []build
	MoreQueued   int
	Recent       []ended
}

type machine struct {
	URI, State, Why string
	InUse, Slots    int
	Squares         []bool // one for each slot, whether it is in use
	Facts           []fact
	Builds          []build
	More            int // builds
}

// A fact is a number that a machine tells of itself.
type fact struct{ What, Text string }

type build struct {
	Name, Title             string
	Phase, For, System, Why string
	User                    string
}

type ended struct {
	Name, Title, Result, Machine, Took, Ago string
	Failed                                  bool
}

func newView(s Source, named bool, now time.Time) view {
	status := s.Status()
	v := view{
		Host: words(s.Host), Version: words(status.GetVersion()), Now: now.Format("15:04:05"),
		Started: span(now.Sub(status.GetStarted().AsTime())), Named: named, listed: s.Listed,
		Queued: int(status.GetQueued()), Machines: len(status.GetMachines()),
	}
	on := v.addBuilds(status, now)
	v.addMachines(status, on, now)
	v.addNotices(status)
	inProgress := make(map[uint64]bool)
	for _, b := range status.GetBuilds() {
		inProgress[b.GetId()] = true
	}
	for _, b := range s.Recent() {
		if !inProgress[b.GetId()] { // else it has ended since, and is shown above
			v.Recent = append(v.Recent, v.ended(b, now))
		}
	}
	return v
}

// addBuilds shows those that wait, and returns the others by machine.
func (v *view) addBuilds(status *dispatchv1.StatusResponse, now time.Time) map[string][]*dispatchv1.BuildInfo {
	on := make(map[string][]*dispatchv1.BuildInfo)
	for _, info := range status.GetBuilds() {
		switch {
		case info.GetPhase() == dispatchv1.Phase_PHASE_QUEUED:
			if len(v.Queue) < MaxQueued {
				v.Queue = append(v.Queue, v.build(info, now))
			}
			continue
		case info.GetPhase() == dispatchv1.Phase_PHASE_BUILDING:
			v.Building++
		}
		on[info.GetMachine()] = append(on[info.GetMachine()], info)
	}
	v.MoreQueued = max(0, v.Queued-len(v.Queue))
	return on
}

func (v *view) build(info *dispatchv1.BuildInfo, now time.Time) build {
	b := build{Phase: phases[info.GetPhase()], System: words(info.GetSystem())}
	since := cmp.Or(info.GetBuildingSince(), info.GetSince())
	b.For = span(now.Sub(since.AsTime()))
	b.Name, b.Title = v.name(info.GetId(), info.GetDrvPath())
	if v.Named {
		b.User, b.Why = words(info.GetUser()), words(info.GetReason())
	}
	return b
}

var phases = map[dispatchv1.Phase]string{
	dispatchv1.Phase_PHASE_QUEUED:   "waiting",
	dispatchv1.Phase_PHASE_COPYING:  "inputs are copied",
	dispatchv1.Phase_PHASE_STAGED:   "waiting for a slot",
	dispatchv1.Phase_PHASE_BUILDING: "building",
	dispatchv1.Phase_PHASE_FETCHING: "outputs are copied",
}

// name is what a build is called, and more of it for who looks closer.
func (v *view) name(id uint64, drvPath string) (name, title string) {
	number := fmt.Sprintf("build %d", id)
	if !v.Named {
		return number, number
	}
	name = strings.TrimSuffix(nix.StorePath(drvPath).Name(), ".drv")
	return cmp.Or(words(name), number), number + ": " + words(drvPath)
}

func (v *view) addMachines(status *dispatchv1.StatusResponse, on map[string][]*dispatchv1.BuildInfo, now time.Time) {
	var all, dull []*dispatchv1.MachineStatus
	crowded := len(status.GetMachines()) > maxMachines
	for _, st := range status.GetMachines() {
		isUp := st.GetState() == dispatchv1.MachineState_MACHINE_STATE_UP
		if isUp {
			v.Up++
			v.Slots += int(st.GetSlots())
		}
		v.InUse += int(st.GetRunning())
		// Where not all have room, those come first of which there is something to tell.
		if crowded && isUp && len(on[st.GetUri()]) == 0 {
			dull = append(dull, st)
		} else {
			all = append(all, st)
		}
	}
	all = append(all, dull...)
	for _, st := range all[:min(len(all), maxMachines)] {
		v.Shown = append(v.Shown, v.machine(st, on[st.GetUri()], now))
	}
	v.MoreMachines = len(all) - len(v.Shown)
}

func (v *view) machine(st *dispatchv1.MachineStatus, builds []*dispatchv1.BuildInfo, now time.Time) machine {
	m := machine{
		URI: v.uri(st.GetUri()), State: state(st),
		InUse: int(st.GetRunning()), Slots: int(st.GetSlots()),
	}
	for _, info := range builds[:min(len(builds), maxBuilds)] {
		m.Builds = append(m.Builds, v.build(info, now))
	}
	m.More = len(builds) - len(m.Builds)
	if m.Slots <= maxSquares {
		for n := range m.Slots {
			m.Squares = append(m.Squares, n < m.InUse)
		}
	}
	m.Why = v.why(st, m, now)
	if l := st.GetLoad(); l != nil {
		m.Facts = facts(l)
	}
	return m
}

// uri is what a machine is called; "" where there is none.
func (v *view) uri(uri string) string {
	if uri == "" || v.Named || v.listed(uri) {
		return words(uri)
	}
	return "a machine that a request named"
}

// state is a machine's state in a word, which is also its class in page.css.
func state(st *dispatchv1.MachineStatus) string {
	if st.GetDrained() && st.GetState() == dispatchv1.MachineState_MACHINE_STATE_DRAINING {
		return "drained"
	}
	return strings.ToLower(strings.TrimPrefix(st.GetState().String(), "MACHINE_STATE_"))
}

// why tells why a machine is given no builds; "" if it is given some.
func (v *view) why(st *dispatchv1.MachineStatus, m machine, now time.Time) string {
	since := ""
	if st.GetSince() != nil && m.State == "down" {
		since = "for " + span(now.Sub(st.GetSince().AsTime())) + ": "
	}
	switch {
	case v.Named && st.GetReason() != "":
		return since + words(st.GetReason())
	case m.State == "up" && m.Slots > 0 && m.InUse >= m.Slots:
		return "all slots are in use"
	case m.State == "up" && m.Slots == 0:
		return "it has no slots: its max-jobs is 0"
	case st.GetDown() != "":
		return since + strings.ReplaceAll(words(st.GetDown()), "_", " ")
	case st.GetParked() != "":
		return "short of " + words(st.GetParked())
	case m.State == "suspect":
		return "it does not answer"
	default:
		return ""
	}
}

func facts(l *dispatchv1.MachineLoad) []fact {
	var facts []fact
	switch {
	case l.Load1 == nil:
	case l.Cores == nil:
		facts = append(facts, fact{"load", fmt.Sprintf("%.1f", l.GetLoad1())})
	default:
		facts = append(facts, fact{"load", fmt.Sprintf("%.1f of %d cores", l.GetLoad1(), l.GetCores())})
	}
	if n, ok := l.Free(); ok {
		facts = append(facts, fact{"disk", nix.SizeText(n) + " free"})
	}
	if l.MemoryAvailableBytes != nil {
		facts = append(facts, fact{"memory", nix.SizeText(l.GetMemoryAvailableBytes()) + " free"})
	}
	return facts
}

// addNotices tells what is wrong with the daemon's own files.
func (v *view) addNotices(status *dispatchv1.StatusResponse) {
	broken := status.GetErrors()
	if r := status.GetReload(); r != nil && !r.GetSuccess() {
		v.Notices = append(v.Notices, "The list of machines has changed and is broken: the one before it is in use.")
		broken = r.GetErrors()
	} else if len(broken) > 0 {
		v.Notices = append(v.Notices, fmt.Sprintf("Entries that could not be used: %d.", len(broken)))
	}
	for _, e := range broken[:min(len(broken), maxNotices)] {
		if v.Named {
			v.Notices = append(v.Notices, words(e.GetMessage()))
		}
	}
	if n := status.GetUnplaceable(); n > 0 {
		v.Notices = append(v.Notices, fmt.Sprintf("Builds that no machine can ever run: %d.", n))
	}
}

func (v *view) ended(b *dispatchv1.FinishedBuild, now time.Time) ended {
	e := ended{
		Result: words(b.GetStatus()), Machine: v.uri(b.GetMachine()), Failed: b.GetFailed(),
		Took: span(b.GetBuilding().AsDuration()), Ago: roughly(now.Sub(b.GetEnded().AsTime())),
	}
	e.Name, e.Title = v.name(b.GetId(), b.GetDrvPath())
	if v.Named && b.GetError() != "" {
		e.Title += ": " + words(b.GetError())
	}
	return e
}

// words makes foreign text fit to be shown, in a line that is not too long.
func words(s string) string {
	s = strings.Join(strings.Fields(nix.PlainText(s[:min(len(s), 4*maxWords)])), " ")
	if len(s) > maxWords {
		return strings.ToValidUTF8(s[:maxWords], "") + "…"
	}
	return s
}

// roughly is a length of time in its greatest unit.
func roughly(d time.Duration) string {
	number, rest, _ := strings.Cut(span(d), " ")
	unit, _, _ := strings.Cut(rest, " ")
	return number + " " + unit
}

// span is a length of time for people, in its two greatest units.
func span(d time.Duration) string {
	s := int64(max(0, d) / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%d s", s)
	case s < 3600:
		return fmt.Sprintf("%d min %d s", s/60, s%60)
	case s < 24*3600:
		return fmt.Sprintf("%d h %d min", s/3600, s/60%60)
	default:
		return fmt.Sprintf("%d d %d h", s/(24*3600), s/3600%24)
	}
}
