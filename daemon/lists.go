package daemon

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
	"nixdispatch/sshpool"
)

// Bounds on the lists that requests name.
const (
	// namedIdle is how long the machines of a list are kept that nobody uses.
	namedIdle = 2 * time.Minute
	// maxNamed is how many lists there may be.
	maxNamed = 32
	// maxNamedMachines is how many machines may stand in one of them.
	maxNamedMachines = 256
	// namedWait is how long an answer to a hook waits for machines that it named; the
	// hook waits a second for all of it. namedPoll is how often they are looked at.
	namedWait = 500 * time.Millisecond
	namedPoll = 10 * time.Millisecond
)

// A namedList is a list of machines that a request has named.
type namedList struct {
	list *machineList
	// uses counts the requests and builds that go by it; unused is since when there
	// is none.
	uses   int
	unused time.Time
}

// A lease keeps a list in use until it is released, and names it to the scheduler.
type lease struct {
	key  string // "" is the daemon's own list
	list *machineList
	set  *machines
}

// noList is the key of all lists without machines: the scheduler has none of it.
const noList = "none"

// Reasons for not using the list that a request names.
var (
	errMayNotName = errors.New("the builders setting is not the list this daemon serves, and the caller may not name machines")
	errBadList    = errors.New("the builders setting cannot be used")
)

// lease returns the list that a caller's builders setting means, for the caller
// to release. The error is errMayNotName or errBadList.
func (d *Daemon) lease(builders string, by caller) (*lease, error) {
	if current := d.machines.current(); current.same(builders) {
		return &lease{list: current}, nil
	}
	if !d.mayName(by) {
		return nil, errMayNotName
	}
	if path, ok := relativeInclude(builders); ok {
		return nil, fmt.Errorf("%w: the file %q is not named by its absolute path", errBadList, path)
	}
	list := readMachineList(builders, d.log)
	switch {
	case len(list.errs) > 0:
		return nil, fmt.Errorf("%w: %w", errBadList, list.errs[0])
	case len(list.all) > maxNamedMachines:
		return nil, fmt.Errorf("%w: it has %d machines, more than %d", errBadList, len(list.all), maxNamedMachines)
	case len(list.all) == 0:
		return &lease{key: noList, list: list}, nil // the scheduler knows no machine of it
	}
	l := &lease{key: hex.EncodeToString(list.print[:]), list: list, set: d.machines}
	if d.machines.use(l.key) {
		return l, nil
	}
	if err := d.adoptNamed(l); err != nil {
		return nil, err
	}
	return l, nil
}

// adoptNamed puts a list that is not in use to use, for a lease on it.
func (d *Daemon) adoptNamed(l *lease) error {
	r := &d.reload
	r.mu.Lock()
	defer r.mu.Unlock()
	if d.machines.use(l.key) {
		return nil // somebody was quicker
	}
	if d.refusing() {
		return errShutdown
	}
	ms, ok := d.machines.name(l, d.newMachine, r.pool)
	if !ok {
		return fmt.Errorf("%w: %d other lists are in use, more than that are not served", errBadList, maxNamed)
	}
	d.log.Info("machines named by a request", "machines", len(l.list.lines))
	d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.SetMachines(ms) })
	d.syncStates("")
	return nil
}

// relativeInclude finds a file in a builders setting that is not named by its
// absolute path: it would be another one here.
func relativeInclude(builders string) (string, bool) {
	for _, entry := range strings.FieldsFunc(builders, func(r rune) bool { return r == '\n' || r == ';' }) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(entry), "@"); ok && !strings.HasPrefix(strings.TrimSpace(path), "/") {
			return strings.TrimSpace(path), true
		}
	}
	return "", false
}

// mayName tells whether a caller may name machines, which is as much as to be
// root: the daemon connects to them with root's keys, and imports what they
// built without a signature.
func (d *Daemon) mayName(c caller) bool {
	if c.commands() {
		return true
	}
	if d.opts.MachinesGroup == "" {
		return false
	}
	gid, ok := d.groups.gid(d.opts.MachinesGroup)
	return ok && c.in(gid)
}

// use takes a lease on a list that is in use already.
func (s *machines) use(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.requested[key]
	if n == nil {
		return false
	}
	n.uses++
	return true
}

// retain is for a second user of the lease.
func (l *lease) retain() *lease {
	if l.set != nil {
		l.set.use(l.key)
	}
	return l
}

// release ends a use.
func (l *lease) release() {
	if l.set == nil {
		return
	}
	l.set.mu.Lock()
	defer l.set.mu.Unlock()
	n := l.set.requested[l.key]
	if n.uses--; n.uses == 0 {
		n.unused = time.Now()
	}
}

// name puts a list to use for a lease; false if there are too many. The list that
// has been unused for longest makes room.
func (s *machines) name(l *lease, made func(nix.Machine) *machine, pool *sshpool.Pool) ([]scheduler.Machine, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.requested) >= maxNamed {
		oldest := ""
		for key, n := range s.requested {
			if n.uses == 0 && (oldest == "" || n.unused.Before(s.requested[oldest].unused)) {
				oldest = key
			}
		}
		if oldest == "" {
			return nil, false
		}
		s.dropLocked(oldest)
	}
	s.requested[l.key] = &namedList{list: l.list, uses: 1}
	return s.adoptLocked(l.key, l.list, made, pool), true
}

func (s *machines) dropLocked(key string) {
	delete(s.requested, key)
	s.replaceLocked(key, nil)
}

// dropUnused forgets the lists that nobody has used for long, and returns what
// the scheduler needs to know then; false if there are none.
func (s *machines) dropUnused(now time.Time) ([]scheduler.Machine, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	dropped := false
	for key, n := range s.requested {
		if n.uses == 0 && now.Sub(n.unused) >= namedIdle {
			s.dropLocked(key)
			dropped = true
		}
	}
	if !dropped {
		return nil, false
	}
	return s.forSchedulerLocked(), true
}

// awaitNamed gives the machines of a list that a request names some time to come
// up, and tells whether one did or none can be hoped for any more. Nothing is
// known of them beforehand, and a caller that could build locally would do so.
func (d *Daemon) awaitNamed(l *lease) (settled bool) {
	if l.set == nil {
		return true
	}
	for end := time.Now().Add(namedWait); ; time.Sleep(namedPoll) {
		connecting, up := 0, 0
		for _, m := range d.dispatcher.machines() {
			switch {
			case m.List != l.key || m.Removed:
			case m.State == scheduler.Connecting:
				connecting++
			case m.State == scheduler.Up:
				up++
			}
		}
		switch {
		case connecting == 0 || up > 0:
			return true
		case time.Now().After(end):
			return false
		}
	}
}
