package daemon

import (
	"errors"
	"fmt"
	"os/user"
	"strconv"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// An origin is whose build it is, as far as that is known: a user, or else a process.
// Users take turns by it, and it is shown. It gives no rights: that is the caller's.
type origin struct {
	uid     uint32
	process uint32 // instead, if it is not 0
}

// originOf is the caller, but for a Nix daemon's hook the one whom that serves. Only
// who could be anybody is believed that.
func originOf(c caller, client *dispatchv1.Client) origin {
	switch {
	case client == nil || !c.commands():
		return origin{uid: c.uid}
	case client.Uid == nil && client.GetPid() != 0:
		return origin{process: client.GetPid()}
	default:
		return origin{uid: client.GetUid()}
	}
}

// turn names it to the scheduler.
func (o origin) turn() string {
	if o.process != 0 {
		return "process " + strconv.FormatUint(uint64(o.process), 10)
	}
	return "uid " + strconv.FormatUint(uint64(o.uid), 10)
}

// String is the user's name, if there is one.
func (o origin) String() string {
	if o.process == 0 {
		if u, err := user.LookupId(strconv.FormatUint(uint64(o.uid), 10)); err == nil {
			return u.Username
		}
	}
	return o.turn()
}

// maxPriority bounds the priorities that callers may name, in both directions.
const maxPriority = 10

var errMayNotRaise = errors.New("only root and the user that nix-dispatchd runs as may ask for a priority above 0")

// priority checks what a caller asks for. To go before the builds of all others is not
// everyone's to ask for; to go behind them is.
func (c caller) priority(p int32) (int, error) {
	switch {
	case p < -maxPriority || p > maxPriority:
		return 0, fmt.Errorf("%w: priority %d is not between -%d and %d", errBadRequest, p, maxPriority, maxPriority)
	case p > 0 && !c.commands():
		return 0, errMayNotRaise
	default:
		return int(p), nil
	}
}

// wantedFor says whose build it is, and how urgent.
func (b *build) wantedFor(o origin, priority int) {
	b.user, b.turn, b.priority = o.String(), o.turn(), priority
	if b.users != nil {
		b.feed.log.use = b.users.Count(o.user(), usage.LogBytes, 0)
	}
}

// joinTurnLocked has a build in flight take the turn of another that is the same, if that
// comes sooner.
func (d *dispatcher) joinTurnLocked(b, other *build) {
	d.carryOutLocked(d.queue.Join(b.id, other.turn, other.priority))
	if s, ok := d.queue.Build(b.id); ok {
		b.turn, b.priority = s.Caller, s.Priority
	}
}
