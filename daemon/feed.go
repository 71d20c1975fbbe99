package daemon

import (
	"context"
	"sync"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A feed is what a build tells its followers: events, of which progress is
// overwritten by newer progress, and the log. The build never waits for a
// follower; each follower keeps a cursor of its own. Safe for concurrent use.
type feed struct {
	log *spool

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at each change
	events   []*dispatchv1.BuildEvent
	progress *dispatchv1.BuildEvent
	version  uint64    // counts progress
	builders int       // remote builds that run
	building time.Time // since when one does; zero if none does
	copying  time.Time // since when the inputs are brought to a machine
	handOver []string
	outcome  *outcome
	midLine  bool // the log does not end with a whole line
}

func newFeed(logDir string) *feed {
	return &feed{log: newSpool(logDir), changed: make(chan struct{})}
}

// A cursor is how far a follower has read.
type cursor struct {
	events  int
	version uint64
	log     int64
}

// A reading is what a feed holds beyond a cursor.
type reading struct {
	events   []*dispatchv1.BuildEvent // shared: not to be changed
	progress *dispatchv1.BuildEvent
	handOver []string
	outcome  *outcome
	changed  <-chan struct{}
}

// read returns what is new since c and moves c past the events. The log is for
// the caller to read, from c.log on.
func (f *feed) read(c *cursor) reading {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := reading{
		events:   f.events[c.events:],
		handOver: f.handOver,
		outcome:  f.outcome,
		changed:  f.changed,
	}
	if f.version > c.version {
		r.progress = f.progress
	}
	c.events, c.version = len(f.events), f.version
	return r
}

// awaitNews waits until there is something to read.
func (f *feed) awaitNews(ctx context.Context) {
	f.mu.Lock()
	changed, silent := f.changed, len(f.events) == 0 && f.outcome == nil && f.building.IsZero()
	f.mu.Unlock()
	if !silent {
		return
	}
	select {
	case <-changed:
	case <-ctx.Done():
	}
}

// endedWait bounds how long a caller who has ended a build waits to see it ended: a
// machine that does not answer any more may hold up the end.
const endedWait = 8 * time.Second

// awaitEnd waits until the outcome is known, for endedWait at most: the caller is about
// to be told of the end, or has asked for it.
func (f *feed) awaitEnd(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, endedWait)
	defer cancel()
	for {
		f.mu.Lock()
		changed, ended := f.changed, f.outcome != nil
		f.mu.Unlock()
		if ended {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// post appends an event. Progress of an earlier phase is dropped with it.
func (f *feed) post(e *dispatchv1.BuildEvent) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.events = append(f.events, e)
	f.progress = nil
	f.signalLocked()
}

// postProgress replaces the progress that followers see. They are woken for the
// first of a phase only after a while: most copies have ended by then.
func (f *feed) postProgress(e *dispatchv1.BuildEvent) {
	f.mu.Lock()
	defer f.mu.Unlock()
	first := f.progress == nil
	f.progress = e
	f.version++
	if first {
		time.AfterFunc(progressInterval, f.signal)
		return
	}
	f.signalLocked()
}

// Write appends to the log.
func (f *feed) Write(p []byte) (int, error) {
	n, err := f.log.Write(p)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(p) > 0 {
		f.midLine = p[len(p)-1] != '\n'
	}
	f.signalLocked()
	return n, err
}

// note appends a line of ours to the log.
func (f *feed) note(line string) {
	f.mu.Lock()
	begin := ""
	if f.midLine {
		begin = "\n"
	}
	f.mu.Unlock()
	_, _ = f.Write([]byte(begin + "nix-dispatch: " + line + "\n")) // a spool takes everything
}

// startBuilding notes that the remote build has begun: the followers' time
// limits count from here, unless another one runs.
func (f *feed) startBuilding(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.builders++; f.builders == 1 {
		f.building = now
	}
	f.signalLocked()
}

// stopBuilding ends what startBuilding began.
func (f *feed) stopBuilding() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.builders--; f.builders == 0 {
		f.building = time.Time{}
	}
	f.signalLocked()
}

// startCopying notes that a machine was chosen and the inputs are brought there:
// followers' timeouts count from here, apart from those of the build.
func (f *feed) startCopying(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.copying.Equal(now) {
		f.copying = now
		f.signalLocked()
	}
}

// stopCopying ends what startCopying began.
func (f *feed) stopCopying() { f.startCopying(time.Time{}) }

// limited returns since when something runs that limits end, and which of l apply to it;
// the zero time while nothing does.
func (f *feed) limited(l limits) (since time.Time, apply limits, changed <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.building.IsZero() {
		return f.copying, limits{timeout: l.timeout}, f.changed
	}
	return f.building, l, f.changed
}

// buildingSince is zero while no remote build runs.
func (f *feed) buildingSince() (since time.Time, changed <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.building, f.changed
}

// requestHandOver asks all followers, present and to come, to free the locks of
// the output paths.
func (f *feed) requestHandOver(paths []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.handOver = paths
	f.signalLocked()
}

// finish makes the outcome known. It is the last thing said.
func (f *feed) finish(o outcome) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.outcome = &o
	f.signalLocked()
}

func (f *feed) signal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.signalLocked()
}

func (f *feed) signalLocked() {
	close(f.changed)
	f.changed = make(chan struct{})
}
