package daemon

import (
	"errors"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/scheduler"
	"nixdispatch/sshpool"
)

// A machineStatus is what there is to see of a machine: of all lines with its
// URI together.
type machineStatus struct {
	uri    string
	state  scheduler.MachineState
	reason string
	since  time.Time
	// down is why, in a word of a bounded set; "" unless the state is Down.
	down string
	// parked is what it is short of, in a word; "" unless the state is Parked.
	parked string
	// load is what the machine last told of itself, nil if that is not known, for
	// the reason loadUnknown.
	load        *dispatchv1.MachineLoad
	loadUnknown string
	// drained tells that it is to take no builds, in whatever state it is.
	drained bool
	// removed tells that no line of the list has it any more.
	removed bool
	// own tells that it is, or was, in the daemon's own list.
	own bool
	// slots is how many builds may run there, inUse how many do or may do; held are
	// those of them whose connection was lost. staging is how many wait there for a
	// slot.
	slots, inUse, held, staging int
	connections                 int
}

// machineStatuses are the machines that lines lead to, or on which builds are, in
// the order of the list.
func (d *Daemon) machineStatuses(load []scheduler.MachineStatus) []*machineStatus {
	byURI := make(map[string]*machineStatus)
	var all []*machineStatus
	drained := d.machines.drains()
	for _, m := range load {
		uri := m.ID.URI()
		st := byURI[uri]
		if st == nil {
			_, isDrained := drained[uri]
			st = &machineStatus{uri: uri, state: m.State, reason: m.Reason, removed: m.Removed, drained: isDrained}
			if m.State == scheduler.Down {
				st.down = downOther
			}
			byURI[uri] = st
			all = append(all, st)
		} else if m.State == scheduler.Up && st.state != scheduler.Up && !m.Removed {
			st.state, st.reason, st.down = m.State, m.Reason, ""
		}
		if !m.Removed || st.removed {
			st.slots = max(st.slots, m.Slots)
		}
		st.inUse += m.Running + m.Held
		st.held += m.Held
		st.staging += m.Placed - m.Running
		st.own = st.own || m.List == ""
	}
	for _, st := range all {
		if !st.own && st.reason == "" {
			st.reason = "it is not in the daemon's list: a request named it"
		}
	}
	d.addConnections(byURI)
	return all
}

// addConnections adds what is to be seen of the connections.
func (d *Daemon) addConnections(byURI map[string]*machineStatus) {
	seen := make(map[*machine]bool)
	for _, e := range d.machines.at(every) {
		st := byURI[e.line.StoreURI]
		if st == nil || seen[e.m] {
			continue
		}
		seen[e.m] = true
		ssh := e.m.host.Status()
		st.connections += ssh.Connections
		if load, unknown := e.m.condition.known(); st.load == nil {
			st.load, st.loadUnknown = load, unknown
		}
		if st.state == scheduler.Parked && st.parked == "" {
			st.parked = e.m.condition.lastParked(time.Now())
		}
		if st.since.IsZero() {
			st.since = ssh.Since
			if st.state == scheduler.Down {
				st.down = downReason(ssh.LastError)
			}
		}
	}
}

// The words that downReason gives beside sshpool's steps.
const (
	downLost     = "lost"
	downOwnStore = "own_store"
	downOther    = "other"
)

// downReason is why a machine is down, in a word: one for each of sshpool's
// steps, or one of those above.
func downReason(err error) string {
	connect, isConnect := errors.AsType[*sshpool.ConnectError](err)
	_, isLost := errors.AsType[*sshpool.LostError](err)
	switch {
	case errors.Is(err, errOwnStore):
		return downOwnStore
	case isConnect:
		return strings.ReplaceAll(string(connect.Step), " ", "_")
	case isLost:
		return downLost
	default:
		return downOther
	}
}

// proto is the status for the API.
func (m *machineStatus) proto() *dispatchv1.MachineStatus {
	out := &dispatchv1.MachineStatus{
		Uri:         m.uri,
		State:       machineStates[m.state],
		Slots:       uint32(m.slots),       //nolint:gosec // the parser bounds it
		Running:     uint32(m.inUse),       //nolint:gosec // bounded by slots
		Staging:     uint32(m.staging),     //nolint:gosec // bounded by the scheduler
		Connections: uint32(m.connections), //nolint:gosec // a handful
		Reason:      m.reason,
		Drained:     m.drained,
		Removed:     m.removed,
		Down:        m.down,
		Load:        m.load,
		LoadUnknown: m.loadUnknown,
		Parked:      m.parked,
	}
	if !m.since.IsZero() {
		out.Since = timestamppb.New(m.since)
	}
	if m.removed && m.state != scheduler.Down {
		out.State = dispatchv1.MachineState_MACHINE_STATE_DRAINING
		out.Reason = "it is listed no more, and goes when its builds have ended"
	}
	return out
}

var machineStates = map[scheduler.MachineState]dispatchv1.MachineState{
	scheduler.Connecting: dispatchv1.MachineState_MACHINE_STATE_CONNECTING,
	scheduler.Up:         dispatchv1.MachineState_MACHINE_STATE_UP,
	scheduler.Down:       dispatchv1.MachineState_MACHINE_STATE_DOWN,
	scheduler.Draining:   dispatchv1.MachineState_MACHINE_STATE_DRAINING,
	scheduler.Parked:     dispatchv1.MachineState_MACHINE_STATE_PARKED,
	scheduler.Suspect:    dispatchv1.MachineState_MACHINE_STATE_SUSPECT,
}
