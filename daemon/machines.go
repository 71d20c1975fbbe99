package daemon

import (
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"sync"

	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
	"nixdispatch/sshpool"
)

// An entry is a machine line in use. Lines with the same store URI that are
// reached in the same way share one machine.
type entry struct {
	// list is the key of the list it stands in; "" is the daemon's own.
	list string
	// id is what the scheduler calls it, as long as it leads to the same machine.
	id   scheduler.MachineID
	line nix.Machine
	m    *machine
}

// machines are the machine lines in use, and the connections they lead to. A
// line whose way to its machine changes becomes another entry: builds on the old
// one keep their connection to the end. Safe for concurrent use.
type machines struct {
	log *slog.Logger

	mu   sync.Mutex
	list *machineList
	// entries are the lines of the daemon's own list, in its order, then those of
	// the lists that requests have named; byID has those, too, that are listed no
	// more and may have builds on them.
	entries   []*entry
	byID      map[scheduler.MachineID]*entry
	requested map[string]*namedList
	serial    int
	// uses counts the attempts that run on a machine.
	uses map[*machine]int
	// past counts the connections of machines that are gone, by URI while others
	// with the same are in use, and for all that share the label "other".
	past map[string]connectCounts
	// drained are the machines that are to take no builds, by URI.
	drained map[string]drain
}

// connectCounts are attempts to connect to a machine.
type connectCounts struct{ ok, failed uint64 }

func (c connectCounts) plus(d connectCounts) connectCounts {
	return connectCounts{c.ok + d.ok, c.failed + d.failed}
}

// connectsOf counts a machine's.
func connectsOf(m *machine) connectCounts {
	st := m.host.Status()
	return connectCounts{uint64(st.Connects), uint64(st.ConnectFailures)} //nolint:gosec // counts
}

func newMachines(log *slog.Logger) *machines {
	return &machines{
		log: log, list: new(machineList),
		byID:      make(map[scheduler.MachineID]*entry),
		uses:      make(map[*machine]int),
		past:      make(map[string]connectCounts),
		requested: make(map[string]*namedList),
	}
}

// current is the list in use.
func (s *machines) current() *machineList {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list
}

// adopt makes list the daemon's own list.
func (s *machines) adopt(list *machineList, made func(nix.Machine) *machine, pool *sshpool.Pool) []scheduler.Machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list = list
	return s.adoptLocked("", list, made, pool)
}

// adoptLocked puts a list to use in place of the one with the same key, begins to
// connect to the machines that are new in it, and returns what the scheduler
// needs to know of all lists. made makes a machine of a line, not connected yet.
func (s *machines) adoptLocked(key string, list *machineList, made func(nix.Machine) *machine, pool *sshpool.Pool) []scheduler.Machine {
	candidates := make([]*machine, len(list.lines))
	for n, line := range list.lines {
		candidates[n] = made(line)
	}
	free := make(map[*entry]bool)
	for _, e := range s.byID {
		free[e] = e.list == key
	}
	entries := make([]*entry, len(list.lines))
	// A line that has not changed keeps its entry, whatever becomes of others with
	// its URI.
	for _, same := range []func(a, b nix.Machine) bool{sameLine, sameURI} {
		for n, line := range list.lines {
			if entries[n] != nil {
				continue
			}
			if e := match(free, line, candidates[n], same); e != nil {
				free[e] = false
				e.line = line
				entries[n] = e
			}
		}
	}
	for n, line := range list.lines {
		if entries[n] == nil {
			entries[n] = s.addLocked(key, line, candidates[n], pool)
		}
	}
	s.replaceLocked(key, entries)
	return s.forSchedulerLocked()
}

// replaceLocked makes entries those of the list with a key. The daemon's own come
// first.
func (s *machines) replaceLocked(key string, entries []*entry) {
	others := slices.DeleteFunc(slices.Clone(s.entries), func(e *entry) bool { return e.list == key })
	if key == "" {
		s.entries = slices.Concat(entries, others)
	} else {
		s.entries = slices.Concat(others, entries)
	}
}

func sameURI(a, b nix.Machine) bool { return a.StoreURI == b.StoreURI }

// match finds a free entry that leads where line does, the oldest first.
func match(free map[*entry]bool, line nix.Machine, m *machine, same func(a, b nix.Machine) bool) *entry {
	var found *entry
	for e, isFree := range free {
		if isFree && same(e.line, line) && sameWay(e.m, m) && (found == nil || older(e.id, found.id)) {
			found = e
		}
	}
	return found
}

func older(a, b scheduler.MachineID) bool {
	return len(a) < len(b) || len(a) == len(b) && a < b
}

// sameWay tells whether two machines are reached in the same way.
func sameWay(a, b *machine) bool {
	x, y := a.config, b.config
	x.Probe, y.Probe = nil, nil // each its own machine's
	return reflect.DeepEqual(x, y)
}

// addLocked makes an entry of a line. It connects unless another entry leads
// there in the same way.
func (s *machines) addLocked(key string, line nix.Machine, m *machine, pool *sshpool.Pool) *entry {
	e := &entry{list: key, id: scheduler.MachineID(line.StoreURI), line: line, m: m}
	if s.byID[e.id] != nil {
		s.serial++
		e.id = scheduler.MachineID(fmt.Sprintf("%s#%d", line.StoreURI, s.serial+1))
	}
	connected := false
	for _, other := range s.byID {
		if other.line.StoreURI == line.StoreURI && sameWay(other.m, m) {
			e.m, connected = other.m, true
		}
	}
	if !connected {
		m.connect(pool)
	}
	s.byID[e.id] = e
	return e
}

func (s *machines) forSchedulerLocked() []scheduler.Machine {
	out := make([]scheduler.Machine, len(s.entries))
	for n, e := range s.entries {
		out[n] = scheduler.Machine{
			ID:                e.id,
			List:              e.list,
			Systems:           e.line.SystemTypes,
			SupportedFeatures: e.line.SupportedFeatures,
			MandatoryFeatures: e.line.MandatoryFeatures,
			MaxJobs:           e.line.MaxJobs,
			SpeedFactor:       e.line.SpeedFactor,
		}
	}
	return out
}

// acquire is for an attempt on a machine, which must release it; nil if there is
// no such machine any more.
func (s *machines) acquire(id scheduler.MachineID) *machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.byID[id]
	if e == nil {
		return nil
	}
	s.uses[e.m]++
	return e.m
}

func (s *machines) release(m *machine) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.uses[m]--; s.uses[m] == 0 {
		delete(s.uses, m)
	}
}

// at returns the entries that a test picks, those of the list first, in its
// order. The entries are not to be changed.
func (s *machines) at(pick func(*entry) bool) []entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []entry
	for _, e := range s.entries {
		if pick(e) {
			out = append(out, *e)
		}
	}
	listed := len(out)
	for _, e := range s.byID {
		if pick(e) && !slices.Contains(s.entries, e) {
			out = append(out, *e)
		}
	}
	slices.SortFunc(out[listed:], func(a, b entry) int { return strings.Compare(string(a.id), string(b.id)) })
	return out
}

func withURI(uri string) func(*entry) bool {
	return func(e *entry) bool { return e.line.StoreURI == uri }
}

func every(*entry) bool { return true }

// retire forgets the entries that are listed no more and unknown to the
// scheduler, and returns the machines that nothing leads to any more, for the
// caller to close, and the URIs that are gone with them. labelled tells which
// URIs are a label of their own in the metrics.
func (s *machines) retire(known map[scheduler.MachineID]bool, labelled func(uri string) bool) (gone []*machine, uris []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	led := make(map[*machine]bool) // to
	here := make(map[string]bool)  // URIs
	var left []*entry
	for id, e := range s.byID {
		if known[id] || slices.Contains(s.entries, e) || s.uses[e.m] > 0 {
			led[e.m], here[e.line.StoreURI] = true, true
		} else {
			left = append(left, e)
		}
	}
	for _, e := range left {
		delete(s.byID, e.id)
		if !led[e.m] && !slices.Contains(gone, e.m) {
			gone = append(gone, e.m)
		}
	}
	for _, m := range gone {
		uri := m.line.StoreURI
		label := uri
		if !labelled(uri) {
			label = otherLabel
		}
		s.past[label] = s.past[label].plus(connectsOf(m))
		if !here[uri] {
			uris = append(uris, uri)
			delete(s.past, uri)
		}
	}
	return gone, uris
}

// connects counts the connections to machines, by URI.
func (s *machines) connects() map[string]connectCounts {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]connectCounts)
	for uri, c := range s.past {
		out[uri] = c
	}
	seen := make(map[*machine]bool)
	for _, e := range s.byID {
		if seen[e.m] {
			continue
		}
		seen[e.m] = true
		out[e.line.StoreURI] = out[e.line.StoreURI].plus(connectsOf(e.m))
	}
	return out
}

// close ends what the machine keeps open for the next build, then its connections.
func (m *machine) close() {
	if m.keeper != nil {
		m.keeper.stop()
	}
	m.idle.close()
	m.host.Close()
}
