package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/scheduler"
)

// bareDaemon has a queue with one machine that is up, and nothing else.
func bareDaemon() (*Daemon, scheduler.MachineID) {
	log := slog.New(slog.DiscardHandler)
	d := &Daemon{log: log, handOverWait: handOverWait, dispatcher: newDispatcher(log), stores: &stores{own: new(localStore)}}
	d.life, d.end = context.WithCancelCause(context.Background())
	const id = "ssh://m1"
	d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order {
		return q.SetMachines([]scheduler.Machine{{ID: id, Systems: []string{"x86_64-linux"}, MaxJobs: 1, SpeedFactor: 1}})
	})
	d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.SetState(id, scheduler.Up, "") })
	return d, id
}

// bareBuild puts a build into the queue that nothing runs.
func bareBuild(d *Daemon, n int) *build {
	b := d.newBuild(d.stores.own, wiretest.Path(n, "x.drv"), &nix.Derivation{BasicDerivation: nix.BasicDerivation{Platform: "x86_64-linux"}}, false, caller{})
	b.cancel = func(error) {}
	d.dispatcher.mu.Lock()
	defer d.dispatcher.mu.Unlock()
	d.dispatcher.submitLocked(b)
	return b
}

func (d *Daemon) machine(id scheduler.MachineID) scheduler.MachineStatus {
	for _, m := range d.dispatcher.machines() {
		if m.ID == id {
			return m
		}
	}
	return scheduler.MachineStatus{}
}

func TestSlotOfALostBuildIsHeldForAWhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, id := bareDaemon()
		b := bareBuild(d, 1)
		d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.Staged(b.id, id) })
		d.holdSlot(b, id, func(ctx context.Context) string {
			_ = sleep(ctx, leftoverHold)
			return ""
		})
		d.dispatcher.remove(b, func() {})
		next := bareBuild(d, 2)
		time.Sleep(leftoverHold - time.Second)
		synctest.Wait()
		if got := d.machine(id).Held; got != 1 {
			t.Errorf("%d slots held, want 1", got)
		}
		d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.Staged(next.id, id) })
		if d.dispatcher.place(next).granted {
			t.Error("another build got the slot that is held")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := d.machine(id).Held; got != 0 || !d.dispatcher.place(next).granted {
			t.Errorf("%d slots held after %v, the next build has one: %v", got, leftoverHold, d.dispatcher.place(next).granted)
		}
		d.leftovers.Wait()
	})
}

func TestHeldSlotDoesNotHoldUpShutdown(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, id := bareDaemon()
		b := bareBuild(d, 1)
		d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.Staged(b.id, id) })
		d.holdSlot(b, id, func(ctx context.Context) string {
			<-ctx.Done()
			return ""
		})
		start := time.Now()
		d.end(errShutdown)
		d.leftovers.Wait()
		if took := time.Since(start); took != 0 {
			t.Errorf("shutdown waited %v for a held slot", took)
		}
	})
}

func TestStrandedBuildsAreEndedInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, id := bareDaemon()
		state := func(s scheduler.MachineState) {
			d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.SetState(id, s, "no route to host") })
		}
		state(scheduler.Down)
		var ended error
		b := bareBuild(d, 1)
		bareBuild(d, 2)
		var mu sync.Mutex
		b.cancel = func(err error) { mu.Lock(); defer mu.Unlock(); ended = err }
		end := func() error { synctest.Wait(); mu.Lock(); defer mu.Unlock(); return ended }
		const wait = 5 * time.Minute
		ctx, stop := context.WithCancel(t.Context())
		watching := make(chan struct{})
		go func() { defer close(watching); d.dispatcher.watchStranded(ctx, wait) }()
		time.Sleep(wait - time.Second)
		if err := end(); err != nil {
			t.Errorf("ended early: %v", err)
		}
		state(scheduler.Connecting) // its time begins anew
		time.Sleep(strandedPoll)
		state(scheduler.Down)
		time.Sleep(wait - time.Second)
		if err := end(); err != nil {
			t.Errorf("ended early, though the machine was coming in between: %v", err)
		}
		time.Sleep(2*strandedPoll + 2*time.Second)
		var stranded *noMachineError
		if !errors.As(end(), &stranded) {
			t.Fatalf("ended with %v, want a noMachineError", end())
		}
		for _, want := range []string{"5m0s", string(id), "no route to host"} {
			if !strings.Contains(stranded.Error(), want) {
				t.Errorf("error %q does not tell %q", stranded, want)
			}
		}
		stop()
		<-watching
	})
}

func TestHooksThatKeepTheirLocksAreNotWaitedForLong(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, id := bareDaemon()
		b := bareBuild(d, 1)
		b.store = &localStore{LocalStore: nix.LocalStore{RealDir: t.TempDir()}}
		free, paths := []nix.StorePath{wiretest.Path(4, "out")}, []nix.StorePath{wiretest.Path(5, "out")}
		holdLock(t, b.store.Real(paths[0])+".lock")
		a := &attempt{d: d, b: b, m: &machine{log: d.log}, place: placement{machine: id}}
		took := func() time.Duration {
			start := time.Now()
			if err := a.takeOverLocks(t.Context(), paths); err != nil {
				t.Errorf("takeOverLocks = %v", err)
			}
			return time.Since(start)
		}
		if got := took(); got != 0 {
			t.Errorf("waited %v for nobody", got)
		}
		join := func() *hookFollower {
			f := &hookFollower{follower: &follower{}}
			d.dispatcher.mu.Lock()
			defer d.dispatcher.mu.Unlock()
			d.dispatcher.joinHookLocked(f, b, caller{})
			return f
		}
		quick, stopped := join(), join()
		locked := paths
		paths = free
		if got := took(); got != 0 {
			t.Errorf("waited %v for hooks though no lock is held", got)
		}
		paths = append(free, locked...)
		time.AfterFunc(time.Second, func() { d.dispatcher.noLocks(quick) })
		if got := took(); got != handOverWait {
			t.Errorf("waited %v for a hook that was stopped, want %v", got, handOverWait)
		}
		time.AfterFunc(time.Second, func() { d.dispatcher.noLocks(stopped) })
		if got := took(); got != time.Second {
			t.Errorf("waited %v for a hook that took a second", got)
		}
		join()
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(errCancelled) })
		if err := a.takeOverLocks(ctx, paths); !errors.Is(err, errCancelled) {
			t.Errorf("takeOverLocks of a cancelled build = %v, want %v", err, errCancelled)
		}
	})
}

// holdLock takes Nix's lock of the name, as another process would. free ends that.
func holdLock(t *testing.T, name string) (free func()) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return func() { f.Close() }
}

// TestSecurityHookThatKeepsSilent has a caller follow somebody's build as a hook that
// holds no lock, and never say that it has handed over its locks.
func TestSecurityHookThatKeepsSilent(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		open := make(chan struct{})
		m.build = m.gated(open)
		s := newSiteWith(t, siteConfig{
			machines: []*fakeMachine{m},
			prepare:  func(s *site) { s.d.handOverWait = 10 * patience },
		})
		r := s.drv("watched", drvConfig{})
		mallory, honest := s.hook(), s.hook()
		mallory.keepLocks = true
		mallory.accepted(r)
		honest.accepted(r)
		free := holdLock(t, s.store().Real(r.out())+".lock")
		honest.onHandOver = func([]string) { free() }
		close(open)
		honest.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	})
}

func TestLockHeld(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "x.lock")
	check := func(what string, want bool) {
		t.Helper()
		if got, err := lockHeld(file); got != want || err != nil {
			t.Errorf("%s: lockHeld = %v, %v; want %v", what, got, err, want)
		}
	}
	check("no file", false)
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	check("nobody's", false)
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	check("held", true)
	check("still held: looking at it took nothing", true)
	if _, err := f.WriteString("d"); err != nil {
		t.Fatal(err)
	}
	check("marked as stale", false)
}

// TestImportWaitsForALockOfAStranger has another process build the same output.
func TestImportWaitsForALockOfAStranger(t *testing.T) {
	t.Parallel()
	for _, builds := range []bool{true, false} {
		s := newSite(t, oneMachine("ssh-ng"))
		r := s.drv("contested", drvConfig{})
		f, err := os.Create(filepath.Join(s.dir, r.out().Base()+".lock"))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		h := s.hook()
		h.accepted(r)
		done := make(chan *story)
		go func() { done <- h.finish() }()
		s.eventually("the outputs are to be fetched", func() bool {
			b := s.status().GetBuilds()
			return len(b) == 1 && b[0].GetPhase() == dispatchv1.Phase_PHASE_FETCHING
		})
		s.eventually("the hook has given up its locks", func() bool {
			s.d.dispatcher.mu.Lock()
			defer s.d.dispatcher.mu.Unlock()
			for _, b := range s.d.dispatcher.builds {
				return len(b.hooks) == 0
			}
			return false
		})
		// The first may belong to the wait for the hook, the second looks for the
		// stranger, and before the third that has found it.
		awaitOpens(t, f.Name(), 3)
		if got := s.local.imported(); len(got) != 0 {
			t.Errorf("imported %v under a stranger's lock", got)
		}
		if builds {
			r.put(s.local.store, "out", r.out())
		}
		f.Close()
		(<-done).mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if got := len(s.local.imported()) == 0; got != builds {
			t.Errorf("the stranger built it: %v; left out the import: %v", builds, got)
		}
	}
}

// awaitOpens waits until a file has been opened n times more.
func awaitOpens(t *testing.T, name string, n int) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, name, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	buf := make([]byte, 4096)
	for n > 0 {
		if got, err := unix.Poll(ready, int(time.Minute.Milliseconds())); got == 0 && err == nil {
			t.Fatalf("%s was not opened %d times more within a minute", name, n)
		} else if errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		// An event of a file that is watched itself has no name. Equal ones that nobody
		// has read yet are one.
		got, err := unix.Read(fd, buf)
		if err != nil {
			t.Fatal(err)
		}
		n -= got / unix.SizeofInotifyEvent
	}
}
