// Package usage counts what each user of the daemon has in progress, and bounds it, so
// that no user takes from others what the daemon has only so much of.
//
// It knows nothing of the daemon: whoever takes something in for a user takes it from the
// [Ledger] and gives it back at its end.
package usage

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
)

// A User is whom something is in progress for: a user of the host, or where only the
// process is known that asks, that process.
type User struct {
	UID     uint32
	Process uint32 // instead of UID, if it is not 0
}

// String is for logs: the number, not the name.
func (u User) String() string {
	if u.Process != 0 {
		return "process " + strconv.FormatUint(uint64(u.Process), 10)
	}
	return "uid " + strconv.FormatUint(uint64(u.UID), 10)
}

// A Resource is something that users have in progress.
type Resource int

// The resources.
const (
	// Connections to the daemon's socket.
	Connections Resource = iota
	// Calls in progress, of any method.
	Calls
	// Streams are those of the calls that stay open: builds, hooks, logs and the like.
	Streams
	// RequestBytes are the bytes of the messages that calls in progress have brought.
	RequestBytes
	// ArrivingBytes are those of messages that have not come in whole.
	ArrivingBytes
	// DerivationBytes are the bytes of the derivations that builds in progress have read.
	DerivationBytes
	// Hooks are those calls that nix-daemon's hooks make for a user, and HookBytes what
	// they have brought.
	Hooks
	HookBytes
	// Builds are derivations that wait for a machine, are on one or on their way back.
	Builds
	// Pings to machines.
	Pings
	// DetachedBuilds in progress.
	DetachedBuilds
	// DetachedBytes are what these take in the state directory.
	DetachedBytes
	// LogBytes are the bytes on disk of logs of builds in progress.
	LogBytes
	// Resources is how many there are.
	Resources
)

// String names the resource, as a label of metrics does.
func (r Resource) String() string {
	if r < 0 || r >= Resources {
		return fmt.Sprintf("resource %d", int(r))
	}
	return words[r].name
}

// words are the names of the resources, what they are called in messages, and what to do
// when there are too many.
var words = [Resources]struct{ name, noun, do string }{
	Connections:     {"connections", "connections", "close some of them"},
	Calls:           {"calls", "calls in progress", "wait until some of them have ended"},
	Streams:         {"streams", "builds, hooks, logs and other streams open", "wait until some of them have ended"},
	RequestBytes:    {"request_bytes", "bytes of requests in progress", "wait until some of them have ended, or ask for less at once"},
	DerivationBytes: {"derivation_bytes", "bytes of derivations that builds in progress consist of", "wait until some of them have ended, or ask for fewer derivations at once"},
	ArrivingBytes:   {"arriving_bytes", "bytes of requests that are not complete", "ask for less at once"},
	Hooks:           {"hooks", "builds through nix-daemon in progress", "wait until some of them have ended"},
	HookBytes:       {"hook_bytes", "bytes of requests through nix-daemon in progress", "wait until some of them have ended"},
	Builds:          {"builds", "builds in progress", "wait until some of them have ended"},
	Pings:           {"pings", "pings in progress", "wait until one of them has ended"},
	DetachedBuilds:  {"detached_builds", "detached builds in progress", "wait for one, or cancel it"},
	DetachedBytes:   {"detached_bytes", "bytes of detached builds in progress", "wait for one or cancel it, or ask for less at once"},
	LogBytes:        {"log_bytes", "bytes of logs of builds in progress", "wait until some of these builds have ended"},
}

// Amounts are a number for each resource.
type Amounts [Resources]int64

// A BoundError says that a user has as much of something in progress as one user may.
type BoundError struct {
	Resource Resource
	Bound    int64
}

// Error tells which bound it is, its value, and what to do.
func (e *BoundError) Error() string {
	w := words[e.Resource]
	return fmt.Sprintf("too many %s: one user may have %d; %s", w.noun, e.Bound, w.do)
}

// A Ledger counts for each user, and in all. Safe for concurrent use.
type Ledger struct {
	bounds Amounts // 0 means none

	mu      sync.Mutex
	users   map[User]*account // those with anything in progress
	refused Amounts           // how often something was, by the bound
}

// An account is what a user has in progress.
type account struct {
	used    Amounts
	waiting [Resources][]chan struct{} // closed for the first when there may be room for it
}

// New makes a ledger with bounds for each user; 0 means that there is none.
func New(bounds Amounts) *Ledger {
	return &Ledger{bounds: bounds, users: make(map[User]*account)}
}

// Bounds are those that the ledger was made with.
func (l *Ledger) Bounds() Amounts { return l.bounds }

// A Use is what was taken from a ledger. Whoever took it must release it once it is at an
// end. A nil one is of nothing. Safe for concurrent use.
type Use struct {
	ledger   *Ledger
	user     User
	resource Resource
	n        int64
}

// Take counts n of a resource for the user, or returns a *BoundError if that were more
// than one user may have. Who has none of it in progress gets it in any case.
func (l *Ledger) Take(u User, r Resource, n int64) (*Use, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.fitsLocked(u, r, n) {
		l.refused[r]++
		return nil, &BoundError{Resource: r, Bound: l.bounds[r]}
	}
	return l.takeLocked(u, r, n), nil
}

// Count is Take without a bound, for those who are bounded elsewhere or not at all.
func (l *Ledger) Count(u User, r Resource, n int64) *Use {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.takeLocked(u, r, n)
}

// Wait is Take of one, but waits in turn until the user may have it, or ctx ends. The error is the
// cause of that.
func (l *Ledger) Wait(ctx context.Context, u User, r Resource) (*Use, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if a := l.users[u]; (a == nil || len(a.waiting[r]) == 0) && l.fitsLocked(u, r, 1) {
		return l.takeLocked(u, r, 1), nil
	}
	turn := make(chan struct{})
	a := l.users[u] // there is one: something of it is in progress
	a.waiting[r] = append(a.waiting[r], turn)
	l.mu.Unlock()
	select {
	case <-turn:
	case <-ctx.Done():
	}
	l.mu.Lock()
	if i := slices.Index(a.waiting[r], turn); i >= 0 { // ctx ended first
		a.waiting[r] = slices.Delete(a.waiting[r], i, i+1)
		return nil, context.Cause(ctx)
	}
	return &Use{ledger: l, user: u, resource: r, n: 1}, nil // counted when the turn came
}

func (l *Ledger) fitsLocked(u User, r Resource, n int64) bool {
	a := l.users[u]
	return l.bounds[r] == 0 || a == nil || a.used[r] == 0 || a.used[r]+n <= l.bounds[r]
}

func (l *Ledger) takeLocked(u User, r Resource, n int64) *Use {
	l.addLocked(u, r, n)
	return &Use{ledger: l, user: u, resource: r, n: n}
}

// addLocked changes what the user has of a resource, and serves those who wait for it.
func (l *Ledger) addLocked(u User, r Resource, n int64) {
	a := l.users[u]
	if a == nil {
		a = new(account)
		l.users[u] = a
	}
	a.used[r] += n
	for len(a.waiting[r]) > 0 && l.fitsLocked(u, r, 1) {
		close(a.waiting[r][0])
		a.waiting[r] = a.waiting[r][1:]
		a.used[r]++
	}
	if a.used == (Amounts{}) {
		delete(l.users, u)
	}
}

// Release gives all of it back. It may be called more than once.
func (u *Use) Release() {
	if u == nil {
		return
	}
	u.ledger.mu.Lock()
	defer u.ledger.mu.Unlock()
	n := u.n
	u.n = 0
	u.ledger.addLocked(u.user, u.resource, -n)
}

// Grow counts n more of it, and tells whether the user may have them; if not, nothing
// changes. Without bounded they may.
func (u *Use) Grow(n int64, bounded bool) bool {
	u.ledger.mu.Lock()
	defer u.ledger.mu.Unlock()
	if bounded && !u.ledger.fitsLocked(u.user, u.resource, n) {
		u.ledger.refused[u.resource]++
		return false
	}
	u.n += n
	u.ledger.addLocked(u.user, u.resource, n)
	return true
}

// Move counts it for another user and as another resource from now on, without a bound.
func (u *Use) Move(to User, as Resource) {
	u.ledger.mu.Lock()
	defer u.ledger.mu.Unlock()
	u.ledger.addLocked(u.user, u.resource, -u.n)
	u.ledger.addLocked(to, as, u.n)
	u.user, u.resource = to, as
}

// A UserUsage is what a user has in progress.
type UserUsage struct {
	User User
	Used Amounts
}

// Users returns all users with anything in progress, by number.
func (l *Ledger) Users() []UserUsage {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := make([]UserUsage, 0, len(l.users))
	for u, a := range l.users {
		list = append(list, UserUsage{User: u, Used: a.used})
	}
	slices.SortFunc(list, func(a, b UserUsage) int {
		return cmp.Or(cmp.Compare(a.User.Process, b.User.Process), cmp.Compare(a.User.UID, b.User.UID))
	})
	return list
}

// Of is what a user has of a resource.
func (l *Ledger) Of(u User, r Resource) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if a := l.users[u]; a != nil {
		return a.used[r]
	}
	return 0
}

// Refused counts, for each resource, how often something was refused because its user had
// as much as one user may.
func (l *Ledger) Refused() Amounts {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.refused
}
