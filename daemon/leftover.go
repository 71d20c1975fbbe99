package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"nixdispatch/scheduler"
	"nixdispatch/sshpool"
)

// This file sees to what a build may have left on a machine when its connection was
// lost: the machine may not have noticed, and run it on.
//
// All remote processes of a connection are children of the sshd process that serves
// it, of which the machine told when the connection was new. So on another
// connection a script can tell whether that process still runs, end what descends
// from it, and wait until all of it is gone. Nothing else is ever ended: a process
// counts as the same only with its number, its start in clock ticks and the
// machine's boot.

const (
	// leftoverHold is how long a slot stays taken once the machine is back, where the
	// machine cannot tell whether anything is left; leftoverAway bounds the wait for
	// it to be back.
	leftoverHold = 2 * time.Minute
	leftoverAway = 10 * time.Minute
	// leftoverMax bounds the wait for a machine that can tell.
	leftoverMax = time.Hour
	// leftoverLook is how often it is looked whether the machine is back.
	leftoverLook = 500 * time.Millisecond
	// endLimit bounds a run of the script, and its retries come at these intervals.
	endLimit              = 90 * time.Second
	endRetryMin, endRetry = time.Second, 30 * time.Second
	// daemonGrace is for machines whose builds may be run by a nix-daemon, which is not
	// our process: it ends a build when it sees that our nix-daemon --stdio has ended.
	daemonGrace = 5 * time.Second
)

// endScript ends what descends from the sshd process $old_pid that was started at
// $old_start, and prints "gone" when nothing is left. It needs Linux's /proc and no
// program but sleep(1).
const endScript = `echo ` + endGreeting + `
{ read -r x </proc/sys/kernel/random/boot_id; } 2>/dev/null || exit 1
[ "$x" = "$boot" ] || { echo gone; exit; }
info() { # of process $1: $ppid, $start; fails for one that has ended
	{ read -r x <"/proc/$1/stat"; } 2>/dev/null || return 1
	x=${x##*) }
	set -- $x
	ppid=$2 start=${20}
	case $1 in Z|X) return 1;; esac
}
all=$old_pid:$old_start orphaned=
info "$old_pid" && [ "$start" = "$old_start" ] || orphaned=1
kin() { # adds to $all what descends from those of it that live
	list= parents=
	for d in /proc/[0-9]*; do
		p=${d#/proc/}
		info "$p" || continue
		list="$list $p:$ppid:$start"
		case " $all " in *" $p:$start "*) parents="$parents $p";; esac
	done
	more=1
	while [ "$more" ]; do
		more=
		for e in $list; do
			p=${e%%:*} s=${e##*:} r=${e#*:}
			r=${r%%:*}
			case " $all " in *" $p:$s "*) continue;; esac
			case " $parents " in *" $r "*) all="$all $p:$s" parents="$parents $p" more=1;; esac
		done
	done
}
orphans() { # of an sshd process that has ended: they end by themselves
	[ "$orphaned" ] || return 1
	for e in $list; do
		case $e in *:1:*) ;; *) continue;; esac
		c=
		{ read -r c <"/proc/${e%%:*}/cmdline"; } 2>/dev/null
		case $c in *--serve*|*--stdio*) return 0;; esac
	done
	return 1
}
n=0
while :; do
	case $n in 0|1|10|20|40) kin;; esac # it takes a while
	left=
	for e in $all; do
		p=${e%%:*}
		[ "$e" != "$old_pid:$old_start" ] && info "$p" && [ "$start" = "${e#*:}" ] || continue
		left=1
		case $n in 0) kill "$p";; 10|20|40) kill -KILL "$p";; esac
	done 2>/dev/null
	if [ ! "$left" ]; then
		known=$all
		kin
		[ "$known" != "$all" ] || orphans || break
	fi
	[ $n -lt 60 ] || { echo left; exit; }
	n=$((n+1))
	sleep 1
done
info "$old_pid" && [ "$start" = "$old_start" ] && kill "$old_pid" 2>/dev/null
echo gone
`

// holdSlot keeps the slot of a running build whose transport died until gone returns
// why nothing of it need be feared any more, or the daemon ends.
func (d *Daemon) holdSlot(b *build, at scheduler.MachineID, gone func(context.Context) string) {
	d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.Lost(b.id) })
	log := d.log.With("build_id", b.id, "machine", at.URI())
	d.leftovers.Go(func() {
		start := time.Now()
		why := gone(d.life)
		if d.life.Err() != nil {
			return
		}
		log.Info("the slot of a lost build is free again", "why", why, "after", time.Since(start).Round(time.Millisecond))
		d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.Release(at) })
	})
}

// awaitGone waits until nothing that a session ran can be left, or for as long as is
// reasonable, and says which.
func (m *machine) awaitGone(ctx context.Context, s *sshpool.Session) (how string) {
	c := s.Connection()
	limited, cancel := context.WithTimeout(ctx, leftoverMax)
	defer cancel()
	select {
	case <-c.Ended():
	case <-limited.Done():
		return fmt.Sprintf("the remote process has not ended for %v", leftoverMax)
	case <-s.Done():
		select {
		case <-c.Ended():
		default: // sshd says so when the last process has closed its output
			return "the remote process has ended"
		}
	}
	sshd, _ := c.Tag().(process)
	if sshd == (process{}) || m.config.Local {
		return m.awaitLong(ctx)
	}
	switch err := m.keeper.tidy(limited, sshd); {
	case err == nil:
		return "nothing of it is left on the machine"
	case errors.Is(err, errNoScript):
		return m.awaitLong(ctx)
	default:
		return fmt.Sprintf("the machine has not been back for %v", leftoverMax)
	}
}

// tidyUp ends what a lost connection has left on the machine. Even where nothing was
// built, there may be remote processes that wait for the rest of an input, with a lock
// on it, and keep paths from being collected.
func (k *keeper) tidyUp(sshd process) {
	ctx, cancel := context.WithTimeout(k.ctx, leftoverMax)
	defer cancel()
	if k.tidy(ctx, sshd) == nil {
		k.m.log.Debug("nothing of a lost connection is left on the machine")
	}
}

// tidy waits for the machine to be back and has all ended that descends from the sshd
// process of a lost connection, however often that takes. The error is errNoScript, or
// that of ctx.
func (k *keeper) tidy(ctx context.Context, sshd process) error {
	retry := sshpool.Backoff{Min: endRetryMin, Max: endRetry}
	for {
		if err := k.m.awaitUp(ctx); err != nil {
			return err
		}
		err := k.endLeftovers(ctx, sshd)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			k.m.log.Warn("what a lost connection left on the machine may still run", "err", err)
		}
		if errors.Is(err, errNoScript) {
			return err
		}
		_ = sleep(ctx, retry.Next()) // its end is seen above
	}
}

// awaitLong is for machines that cannot tell.
func (m *machine) awaitLong(ctx context.Context) (how string) {
	away, cancel := context.WithTimeout(ctx, leftoverAway)
	defer cancel()
	if m.awaitUp(away) != nil {
		return fmt.Sprintf("the machine has not been back for %v", leftoverAway)
	}
	_ = sleep(ctx, leftoverHold)
	return fmt.Sprintf("the machine cannot tell whether anything is left, and has been back for %v", leftoverHold)
}

// awaitUp waits until the machine is connected to.
func (m *machine) awaitUp(ctx context.Context) error {
	for m.host.Status().State != sshpool.Up {
		if err := sleep(ctx, leftoverLook); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// errNoScript says that the script did not run.
var errNoScript = errors.New("the machine does not run the script that ends it")

// An endRun is a run of endScript.
type endRun struct {
	over chan struct{}
	err  error // valid after over is closed
}

// endLeftovers tries to end all that descends from the sshd process of a lost
// connection. For several that ask for the same one at once it does so once.
func (k *keeper) endLeftovers(ctx context.Context, sshd process) error {
	k.mu.Lock()
	e := k.ending[sshd]
	mine := e == nil
	if mine {
		e = &endRun{over: make(chan struct{})}
		k.ending[sshd] = e
	}
	k.mu.Unlock()
	if mine {
		e.err = k.runEndScript(ctx, sshd)
		k.mu.Lock()
		delete(k.ending, sshd)
		k.mu.Unlock()
		close(e.over)
		return e.err
	}
	select {
	case <-e.over:
		return e.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (k *keeper) runEndScript(ctx context.Context, sshd process) error {
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	s, err := k.m.host.Session(ctx, lookCommand)
	if err != nil {
		return err
	}
	text, err := converse(ctx, s, endInput(sshd), endLimit, maxLook)
	_, after, began := strings.Cut(string(text), endGreeting+"\n")
	switch {
	case err != nil:
		return err
	case !began:
		return errNoScript
	case strings.TrimSpace(after) != "gone":
		return errors.New("its processes do not end")
	}
	if k.m.ng {
		return sleep(ctx, daemonGrace)
	}
	return nil
}

func endInput(p process) string {
	return fmt.Sprintf("boot=%s old_pid=%s old_start=%s\n", shellQuote(p.boot), shellQuote(p.pid), shellQuote(p.start)) + scriptPath + endScript
}
