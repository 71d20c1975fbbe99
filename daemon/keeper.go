package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"nixdispatch/sshpool"
)

// How a machine is looked after.
const (
	// lookLimit is how long a machine may take to tell how it is.
	lookLimit = 20 * time.Second
	// lookSoon is the shortest pause between two such questions.
	lookSoon = 2 * time.Second
	// lookBusy is how long after its last build a machine is asked as often as one in
	// use; lookIdle is the longest pause for one that is not.
	lookBusy = 2 * time.Minute
	lookIdle = 10 * time.Minute
	// hopeRetry is the longest pause between attempts to use a machine that something
	// waits for which nothing else can do.
	hopeRetry = 5 * time.Second
)

// A keeper looks after a machine in the background: it asks it how it is, at a low
// rate and over connections there are, and tries its Nix again after failures. Its
// condition is what comes of it. Safe for concurrent use.
type keeper struct {
	m *machine
	// every is how often a machine in use is asked; 0 for never, nor is any other
	// command of this file's run there then.
	every time.Duration
	// changed is called when the machine's state may be another one.
	changed func()

	kicked chan struct{}
	ctx    context.Context //nolint:containedctx // the keeper's own life
	cancel context.CancelFunc

	mu      sync.Mutex
	stopped bool
	work    sync.WaitGroup
	refused error // that the account runs no commands of ours; remembered
	allowed bool  // that it does
	asked   time.Time
	next    time.Time // when to ask
	used    time.Time // when a build last began or ended; zero if none has
	told    string    // the state that was last told
	ending  map[process]*endRun
}

func newKeeper(m *machine, every time.Duration, changed func()) *keeper {
	k := &keeper{m: m, every: every, changed: changed, kicked: make(chan struct{}, 1), ending: make(map[process]*endRun)}
	k.ctx, k.cancel = context.WithCancel(context.Background())
	return k
}

// start begins to look after the machine, which has a host now.
func (k *keeper) start() { k.do(k.run) }

// stop ends that, and waits for all that was begun.
func (k *keeper) stop() {
	k.mu.Lock()
	k.stopped = true
	k.mu.Unlock()
	k.cancel()
	k.work.Wait()
}

// do runs f beside all else, unless the keeper is stopped.
func (k *keeper) do(f func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.stopped {
		k.work.Go(f)
	}
}

// kick has the keeper see what is to be done.
func (k *keeper) kick() {
	select {
	case k.kicked <- struct{}{}:
	default: // one is there already, and not yet seen
	}
}

// use notes that a build begins or ends there. One that has not been asked for long
// is asked.
func (k *keeper) use() {
	now := time.Now()
	k.mu.Lock()
	k.used = now
	late := k.every > 0 && k.next.After(now.Add(k.every))
	if late {
		k.next = latest(now, k.asked.Add(k.every))
	}
	k.mu.Unlock()
	if late {
		k.kick()
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// askNow has the machine asked soon, but not more often than every lookSoon: any
// derivation can be the reason.
func (k *keeper) askNow() {
	k.mu.Lock()
	k.next = latest(time.Now(), k.asked.Add(lookSoon))
	k.mu.Unlock()
	k.kick()
}

// mayAsk tells whether the machine is known to run commands of ours.
func (k *keeper) mayAsk() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.allowed && k.refused == nil && k.every > 0
}

func (k *keeper) run() {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for k.ctx.Err() == nil {
		timer.Reset(k.tend())
		select {
		case <-k.ctx.Done():
		case <-k.kicked:
		case <-timer.C:
		}
	}
}

// tend does what is due and returns how long nothing will be.
func (k *keeper) tend() time.Duration {
	st := k.m.host.Status()
	if st.State != sshpool.Up {
		// A connection over which it was just asked may be on its way up.
		k.mu.Lock()
		past := k.asked.Before(st.Since)
		k.mu.Unlock()
		if past {
			k.m.condition.disconnected()
		}
		return time.Hour // its host tells of changes
	}
	if probe, _ := k.m.condition.due(); !probe.IsZero() && !probe.After(time.Now()) {
		k.m.condition.probed(k.tryNix(), time.Now())
	}
	k.askIfDue()
	k.tell()
	return k.untilNext()
}

func (k *keeper) untilNext() time.Duration {
	wait := time.Hour
	soonest := func(t time.Time) {
		if !t.IsZero() {
			wait = min(wait, max(0, time.Until(t)))
		}
	}
	probe, change := k.m.condition.due()
	soonest(probe)
	soonest(change)
	if k.mayAsk() {
		k.mu.Lock()
		defer k.mu.Unlock()
		soonest(k.next)
	}
	return wait
}

// tell tells of a change of what the machine is parked for.
func (k *keeper) tell() {
	word, reason := k.m.condition.parked(time.Now())
	k.mu.Lock()
	before := k.told
	k.told = word + ": " + reason
	changed := before != k.told
	k.mu.Unlock()
	if !changed {
		return
	}
	if was, _, _ := strings.Cut(before, ":"); was != word {
		if word != "" {
			k.m.log.Warn("machine parked", "reason", reason)
		} else {
			k.m.log.Info("machine not parked any more", "reason", reason)
		}
	}
	k.changed()
}

// tryNix does what a build would do first, on the connection there is.
func (k *keeper) tryNix() error {
	ctx, cancel := context.WithTimeout(k.ctx, handshakeTimeout)
	defer cancel()
	s, err := k.m.host.Session(ctx, k.m.command)
	if err != nil {
		return err
	}
	defer s.Close()
	r, err := k.m.startRemote(ctx, s)
	if err != nil {
		return err
	}
	r.hangUp()
	return nil
}

// connected asks the machine how it is for the first time on a connection, over which
// a session is open: where only one is allowed, that is found out without harm.
func (k *keeper) connected(ctx context.Context, c sshpool.Connection) {
	if k.every == 0 || k.isRefused() {
		return
	}
	s, err := c.Spare(ctx, lookCommand)
	if err != nil {
		k.couldNot(err)
		return
	}
	k.do(func() {
		k.hear(k.ctx, c, s)
		k.kick()
	})
}

func (k *keeper) isRefused() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.refused != nil
}

// askIfDue asks the machine how it is, and over a connection of which it is not known
// who serves it.
func (k *keeper) askIfDue() {
	if !k.mayAsk() {
		return
	}
	k.mu.Lock()
	due := !k.next.After(time.Now())
	k.mu.Unlock()
	conns := k.m.host.Connections()
	over := slices.DeleteFunc(slices.Clone(conns), func(c sshpool.Connection) bool { return c.Tag() != nil })
	if due {
		over = append(over, conns...)
	}
	var err error
	for _, c := range over {
		var s *sshpool.Session
		if s, err = c.Spare(k.ctx, lookCommand); err == nil {
			k.hear(k.ctx, c, s)
			return
		}
	}
	if due {
		k.couldNot(err)
	}
}

// hear gives the machine the script and notes what it tells.
func (k *keeper) hear(ctx context.Context, c sshpool.Connection, s *sshpool.Session) {
	began := time.Now()
	text, err := converse(ctx, s, lookInput(storeDirOf(k.m.line)), lookLimit, maxLook)
	l, ok := parseLook(text, began)
	k.mu.Lock()
	k.asked = began
	switch {
	case ok:
		k.allowed = true
	case err == nil && !k.allowed:
		k.refused = notOurs(text)
	}
	refused := k.refused
	k.mu.Unlock()
	defer k.putOff()
	switch {
	case ok:
		if c.Tag() == nil && l.sshd != (process{}) {
			c.AfterEnd(func(cause error) {
				if !errors.Is(cause, sshpool.ErrClosed) { // else the machine has been told
					k.do(func() { k.tidyUp(l.sshd) })
				}
			})
		}
		c.SetTag(l.sshd)
		k.m.absences.booted(l.sshd.boot)
		k.m.condition.told(l.load)
	case refused != nil:
		k.m.condition.notTold(refused.Error())
		k.m.log.Info("disk space and load of the machine are not known", "reason", refused)
	case ctx.Err() == nil:
		k.m.condition.notTold(fmt.Sprintf("asked for, and not told: %v", cmp.Or(err, errors.New("the answer is not as expected"))))
	}
}

// pauseLocked is how long the machine is not asked now, varied by a fifth.
func (k *keeper) pauseLocked() time.Duration {
	pause := k.every
	load, _ := k.m.condition.known()
	if idle := time.Since(k.used); load != nil && idle > lookBusy {
		pause = max(pause, min(idle, lookIdle))
	}
	if word, _ := k.m.condition.parked(time.Now()); word != "" {
		pause = k.every
	}
	return pause*4/5 + rand.N(pause*2/5+1)
}

// putOff has the machine be asked again after a pause.
func (k *keeper) putOff() {
	k.mu.Lock()
	k.next = time.Now().Add(k.pauseLocked())
	k.mu.Unlock()
}

// couldNot notes that there was no session to ask with.
func (k *keeper) couldNot(err error) {
	k.putOff()
	if load, _ := k.m.condition.known(); load == nil && errors.Is(err, sshpool.ErrNoPlace) {
		k.m.condition.notTold("no session can be spared for it")
	}
}

// converse gives a session's command something to read and returns what it prints,
// up to most bytes. The session is closed.
func converse(ctx context.Context, s *sshpool.Session, say string, limit time.Duration, most int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	defer s.Close()
	defer context.AfterFunc(ctx, func() { _ = s.Close() })()
	go io.Copy(io.Discard, s.Stderr) //nolint:errcheck // ends with the session
	go func() {                      // ends with the session
		_, _ = io.WriteString(s.Stdin, say) // it need not read all of it
		_ = s.Stdin.Close()
	}()
	text, err := io.ReadAll(io.LimitReader(s.Stdout, most+1))
	if err != nil {
		return text, contextCause(ctx, err)
	}
	if int64(len(text)) > most {
		return text, fmt.Errorf("more than %d bytes", most)
	}
	return text, nil
}
