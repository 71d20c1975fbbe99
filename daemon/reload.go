package daemon

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
	"nixdispatch/sshpool"
)

// reloadPoll is how often the builders setting's files are looked at for
// changes: at what they hold, for events tell nothing where a link is swapped.
const reloadPoll = 2 * time.Second

// A reloader reads the builders setting anew and puts it to use.
// Safe for concurrent use.
type reloader struct {
	mu   sync.Mutex // one at a time
	pool *sshpool.Pool
	// tried is what the setting held when it was last read, seen what it held when
	// it was last looked at.
	tried, seen [sha256.Size]byte

	lastMu sync.Mutex
	last   *reloadResult
	// lastList is what was last read, at the start or later.
	lastList *machineList
	// loaded is when the list in use was read.
	loaded     time.Time
	ok, failed int
}

// A reloadResult is what became of an attempt to read the setting anew.
type reloadResult struct {
	at   time.Time
	list *machineList // with errors, it is not in use
}

func (r reloadResult) success() bool { return len(r.list.errs) == 0 }

// begin puts the list that was read at the start to use, without its bad entries.
func (d *Daemon) begin(pool *sshpool.Pool) {
	r := &d.reload
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pool = pool
	list := d.readList(d.log)
	r.tried, r.seen = list.print, list.print
	for _, err := range list.errs {
		d.log.Error("bad entry in the builders setting is left out", "err", err)
	}
	d.useLocked(list)
	r.lastMu.Lock()
	defer r.lastMu.Unlock()
	r.loaded, r.lastList = time.Now(), list
}

// useLocked makes list the list in use. The reloader's mutex is held.
func (d *Daemon) useLocked(list *machineList) {
	for _, line := range list.others {
		d.log.Warn("machine is left to the stock hook", "machine", line.StoreURI, "reason", unsupported(line))
	}
	d.metrics.know(list)
	ms := d.machines.adopt(list, d.newMachine, d.reload.pool)
	d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.SetMachines(ms) })
	// What their hosts have told before the scheduler knew of them was ignored.
	d.syncStates("")
}

var errNotRunning = errors.New("the daemon is not running")

// reloadNow reads the setting and puts it to use unless anything is wrong in it.
func (d *Daemon) reloadNow(why string) (reloadResult, error) {
	r := &d.reload
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pool == nil || d.stopping() {
		return reloadResult{}, errNotRunning
	}
	result := d.tryLocked(d.readList(d.log), why)
	if result.success() {
		// Who asks for it may have changed ssh_config, too.
		for _, e := range d.machines.at(every) {
			e.m.host.Refresh()
		}
	}
	return result, nil
}

// tryLocked puts a list to use unless anything is wrong in it.
func (d *Daemon) tryLocked(list *machineList, why string) reloadResult {
	r := &d.reload
	r.tried, r.seen = list.print, list.print
	result := reloadResult{at: time.Now(), list: list}
	if result.success() {
		d.useLocked(list)
		d.log.Info("builders setting read anew", "why", why, "machines", len(list.lines))
	} else {
		for _, err := range list.errs {
			d.log.Error("builders setting not read anew, the machines stay as they are", "why", why, "err", err)
		}
	}
	r.lastMu.Lock()
	defer r.lastMu.Unlock()
	r.last, r.lastList = &result, list
	if result.success() {
		r.loaded = result.at
		r.ok++
	} else {
		r.failed++
	}
	return result
}

// look reads the setting and puts it to use if it holds something else than it
// did, and did so at the last look, too: it may be half written.
func (d *Daemon) look() {
	r := &d.reload
	r.mu.Lock()
	defer r.mu.Unlock()
	now := d.readList(slog.New(slog.DiscardHandler)).print
	changed, settled := now != r.tried, now == r.seen
	r.seen = now
	if changed && settled && !d.stopping() {
		d.tryLocked(d.readList(d.log), "its content changed")
	}
}

// watchMachines keeps the machines as the builders setting has them. It returns
// when ctx ends.
func (d *Daemon) watchMachines(ctx context.Context, poll time.Duration) {
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.opts.Hangup:
			_, _ = d.reloadNow("SIGHUP") // it is in the log and in the status
		case <-ticker.C:
			d.look()
		}
		d.retire()
	}
}

// retire closes the connections that nothing leads to any more.
func (d *Daemon) retire() {
	gone, uris := d.retired()
	for _, m := range gone {
		m.close()
		m.log.Info("connection to the machine closed: nothing leads there any more")
	}
	for _, uri := range uris {
		d.metrics.forget(uri)
	}
}

// retired takes them out of use.
func (d *Daemon) retired() (gone []*machine, uris []string) {
	d.reload.mu.Lock() // no machine comes into use meanwhile
	defer d.reload.mu.Unlock()
	if ms, dropped := d.machines.dropUnused(time.Now()); dropped {
		d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.SetMachines(ms) })
	}
	known := make(map[scheduler.MachineID]bool)
	for _, m := range d.dispatcher.machines() {
		known[m.ID] = true
	}
	return d.machines.retire(known, func(uri string) bool { return d.metrics.machine(uri) == uri })
}

// newMachine makes a machine that is looked after once it is connected to.
func (d *Daemon) newMachine(line nix.Machine) *machine {
	m := newMachine(line, d.checkedStore(), d.log)
	m.condition = newCondition(d.opts.Gates)
	m.keeper = newKeeper(m, d.opts.LoadInterval, func() { d.syncStates(line.StoreURI) })
	return m
}

// hostChanged passes a change of a connection's state on to the scheduler, and to
// those who look after the machine.
func (d *Daemon) hostChanged(s sshpool.Status) {
	d.syncStates(s.Name)
	for _, e := range d.machines.at(withURI(s.Name)) {
		e.m.absences.note(e.m.host.Status())
		e.m.keeper.kick()
	}
}

// syncStates tells the scheduler of the states that the machines with a URI, or
// all with "", have now.
func (d *Daemon) syncStates(uri string) {
	pick := every
	if uri != "" {
		pick = withURI(uri)
	}
	d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order {
		var orders []scheduler.Order
		drained := d.machines.drains()
		for _, e := range d.machines.at(pick) {
			state, reason := e.state(drained)
			orders = append(orders, q.SetState(e.id, state, reason)...)
		}
		return orders
	})
}

// state is what the scheduler is told of the entry's machine.
func (e *entry) state(drained map[string]drain) (scheduler.MachineState, string) {
	st := e.m.host.Status()
	dr, isDrained := drained[e.line.StoreURI]
	switch {
	case st.State == sshpool.Down:
		reason := "since " + moment(st.Since)
		if st.LastError != nil {
			// It names the machine, as does all that shows reasons.
			why := strings.TrimPrefix(st.LastError.Error(), e.line.StoreURI+": ")
			reason = fmt.Sprintf("%s (since %s)", why, moment(st.Since))
		}
		if isDrained {
			reason += "; it is drained, too"
		}
		return scheduler.Down, reason
	case isDrained:
		return scheduler.Draining, dr.String()
	case st.State == sshpool.Up:
		parked, reason := e.m.condition.parked(time.Now())
		if parked != "" {
			return scheduler.Parked, reason
		}
		if !st.SuspectSince.IsZero() {
			return scheduler.Suspect, "it does not answer since " + moment(st.SuspectSince)
		}
		return scheduler.Up, reason
	default:
		return scheduler.Connecting, ""
	}
}
