package sshpool

import (
	"fmt"
	"sync"
	"time"
)

// This file watches for silence. A connection on which nothing was received for
// KeepaliveCount intervals is ended. Long before that it is suspect: it may be
// dead, and whoever has a choice uses another host. The first byte received ends
// the suspicion.
//
// Silence means something only while an answer is due. So a host with open
// sessions is asked once it has said nothing for quiet, and an idle host is asked
// together with the first session that it gets.

const (
	// quiet is how long a host with open sessions may say nothing before it is asked.
	quiet = time.Second
	// A connection is suspect when nothing was received for rttPatience smoothed
	// round trips while an answer is due, but at least for minPatience.
	minPatience = time.Second
	rttPatience = 4
	// maxRTT bounds what one round trip counts for, so that a question that was
	// answered after a long outage does not make the next one last as long.
	maxRTT = 2500 * time.Millisecond
	// lateLook is how late a look may be. One that is later says that this process
	// did not run; what the host sent may be in the kernel's buffer.
	lateLook = 500 * time.Millisecond
)

// A question is a keepalive request and its answer. One at a time is open.
type question struct {
	mu    sync.Mutex // protects following fields
	asked time.Time  // zero if none is open
	over  chan struct{}
	rtt   time.Duration // smoothed; 0 before the first answer
}

// open returns when the open question was asked, zero if there is none, and the
// patience for its answer.
func (q *question) open() (asked time.Time, patience time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.asked, max(minPatience, rttPatience*q.rtt)
}

// begin opens a question, for the caller to ask and to end. If one is open already,
// it returns a channel that is closed when that has ended.
func (q *question) begin() (other <-chan struct{}) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.asked.IsZero() {
		return q.over
	}
	q.asked, q.over = time.Now(), make(chan struct{})
	return nil
}

func (q *question) end(answered bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if rtt := min(time.Since(q.asked), maxRTT); answered && q.rtt == 0 {
		q.rtt = rtt
	} else if answered {
		q.rtt += (rtt - q.rtt) / 8
	}
	q.asked = time.Time{}
	close(q.over)
}

// ask asks the peer for a sign of life, unless a question is open. It does not wait.
func (c *conn) ask() {
	if c.question.begin() == nil {
		c.host.wg.Go(c.sendQuestion)
	}
}

// askAnew asks once the open question has ended, and returns when the peer has
// answered or the connection has ended.
func (c *conn) askAnew() {
	for {
		other := c.question.begin()
		if other == nil {
			c.sendQuestion()
			return
		}
		<-other // at the latest when the connection ends
	}
}

// sendQuestion asks the question that was opened and ends it with its answer.
func (c *conn) sendQuestion() {
	// Sending can block as long as the peer takes nothing, and so can waiting;
	// the end of the connection ends both.
	_, _, err := c.ssh.SendRequest("keepalive@openssh.com", true, nil)
	c.question.end(err == nil)
}

// attend watches the connection until it ends.
//
// All connections with the same keepalive interval count its silence at the same
// moments: what many idle ones cost is mostly the waking of threads, which they
// share then.
func (c *conn) attend() {
	first := time.NewTimer(c.keepInterval - time.Duration(time.Now().UnixNano())%c.keepInterval)
	defer first.Stop()
	ticker := time.NewTicker(c.keepInterval)
	defer ticker.Stop()
	ticks := first.C
	var silence silence
	look := time.NewTimer(0)
	defer look.Stop()
	var w vigil
	c.ask() // for the first round trip
	for {
		select {
		case <-c.dying:
			return
		case <-ticks:
			if ticks == first.C {
				ticker.Reset(c.keepInterval)
				ticks, silence.received = ticker.C, c.net.received.Load()
			} else if !silence.tick(c) {
				return
			}
		case <-c.nudge:
		case <-look.C:
		}
		now := time.Now()
		if !w.due.IsZero() && now.Sub(w.due) > lateLook {
			w.floor = now
		}
		wait := c.look(&w, now)
		w.due = now.Add(wait)
		look.Reset(wait)
	}
}

// A silence counts the keepalive intervals in which nothing was received. Any byte
// counts as life: the answer to a request of ours may have to wait behind megabytes
// of data on a slow link.
type silence struct {
	received  int64
	intervals int
}

// tick ends the connection when the peer has been silent for too long, and returns
// false then. After the first silent interval it asks the peer.
func (s *silence) tick(c *conn) bool {
	received := c.net.received.Load()
	if received != s.received {
		s.received, s.intervals = received, 0
		return true
	}
	if s.intervals++; s.intervals >= c.keepCount {
		c.kill(fmt.Errorf("not a byte received for %v", time.Duration(s.intervals)*c.keepInterval))
		return false
	}
	c.ask()
	return true
}

// A vigil is what a connection's looks remember.
type vigil struct {
	due   time.Time // of the next look
	floor time.Time // silence before this moment does not count
	taken uint64    // see liveConn.taken
	doubt time.Time // since when the connection is suspect; zero if it is not
}

// look decides whether the connection is suspect, asks for a sign of life if one is
// needed, and returns when to look again at the latest.
func (c *conn) look(w *vigil, now time.Time) time.Duration {
	asked, patience := c.question.open()
	heard := c.net.lastReceived()
	if !w.doubt.IsZero() && (asked.IsZero() || !heard.Before(w.doubt)) {
		w.doubt = time.Time{}
		c.host.setSuspect(c, w.doubt)
	}
	if asked.IsZero() {
		if !c.host.works(c) {
			return time.Hour // takeLocked nudges
		}
		if rest := quiet - now.Sub(heard); rest > 0 {
			return rest
		}
		c.ask()
		asked = now
	}
	// While the way to the peer takes what was sent before the question, the
	// question is still on its way.
	taken, more := c.net.taken()
	if more && taken != w.taken {
		w.floor = now
	}
	w.taken = taken
	rest := patience - now.Sub(latest(asked, heard, w.floor))
	if rest <= 0 && w.doubt.IsZero() {
		w.doubt = now
		c.host.setSuspect(c, now)
		if c.net.lastReceived() != heard {
			signal(c.nudge) // a byte came too early to end the suspicion by itself
		}
	}
	if rest <= 0 {
		return quiet
	}
	return min(rest, patience/4)
}

func latest(times ...time.Time) time.Time {
	var last time.Time
	for _, t := range times {
		if t.After(last) {
			last = t
		}
	}
	return last
}

// works reports whether sessions are open, or being opened, on the host or on c,
// which the host may not know yet.
func (h *Host) works(c *conn) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return c.places > 0 || h.worksLocked()
}

func (h *Host) worksLocked() bool {
	for _, c := range h.conns {
		if c.places > 0 {
			return true
		}
	}
	return false
}

// setSuspect notes since when c is suspect, zero if it is no longer.
func (h *Host) setSuspect(c *conn, since time.Time) {
	c.net.doubted.Store(!since.IsZero())
	h.mu.Lock()
	defer h.mu.Unlock()
	c.suspect = since
	h.wakeLocked()
	signal(h.look)
}

// suspectLocked returns since when all connections of the host have been suspect;
// zero if one is not, or if there is none.
func (h *Host) suspectLocked() (since time.Time) {
	for _, c := range h.conns {
		if c.suspect.IsZero() {
			return time.Time{}
		}
		since = latest(since, c.suspect)
	}
	return since
}
