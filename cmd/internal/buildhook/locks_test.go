package buildhook

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"nixdispatch/cmd/internal/daemonsocket"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func handOver(outputs ...string) *dispatchv1.HookResponse {
	return &dispatchv1.HookResponse{Message: &dispatchv1.HookResponse_HandOver{HandOver: &dispatchv1.HandOver{Paths: outputs}}}
}

// askForLocks asks the hook for outputs and waits until it has handed over.
func askForLocks(s hookStream, outputs ...string) {
	s.Send(handOver(outputs...))
	for {
		if req, err := s.Recv(); err != nil || req.GetHandedOver() != nil {
			return
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// held reads what is in an open lock file: "d" marks it as stale.
func held(t *testing.T, f *os.File) string {
	t.Helper()
	buf := make([]byte, 16)
	n, _ := f.ReadAt(buf, 0)
	return string(buf[:n])
}

func TestHookHandsTheLocksOverOnce(t *testing.T) {
	var out, doc string
	type state struct{ out, doc, again bool }
	states := make(chan state, 1)
	d := building(t, func(s hookStream, _ *dispatchv1.Start) error {
		askForLocks(s, out, "/nix/store/0c0qmlv2ixdxvsazmkg3aj2jh4ajx4m7-not-ours")
		var st state
		st.out, st.doc = exists(out+".lock"), exists(doc+".lock")
		// An importer takes the new lock; asking again must not touch it.
		importer, err := os.Create(out + ".lock")
		if err != nil {
			return err
		}
		defer importer.Close()
		askForLocks(s, out)
		st.again = exists(out + ".lock")
		states <- st
		return s.Send(finished(dispatchv1.BuildStatus_BUILD_STATUS_BUILT, "", ""))
	})
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	out, doc = n.output(outBase), n.output(docBase)
	outLock, docLock := n.lock(outBase), n.lock(docBase)
	n.try(testSystem, true)
	n.begin()
	if status := n.wait(); status != 0 {
		t.Fatalf("exit status = %d, said %q", status, n.said(9))
	}
	if got, want := <-states, (state{out: false, doc: true, again: true}); got != want {
		t.Errorf("lock files: got %+v, want %+v", got, want)
	}
	if got := held(t, outLock); got != "d" {
		t.Errorf("the freed lock holds %q, want Nix's mark", got)
	}
	if got := held(t, docLock); got != "" {
		t.Errorf("the other lock holds %q", got)
	}
}

func TestHookLeavesAStrangersLockAlone(t *testing.T) {
	var out string
	d := building(t, func(s hookStream, _ *dispatchv1.Start) error {
		askForLocks(s, out)
		return s.Send(finished(dispatchv1.BuildStatus_BUILD_STATUS_BUILT, "", ""))
	})
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	out = n.output(outBase)
	ours := n.lock(outBase)
	n.try(testSystem, true)
	// Our Nix's lock goes and a stranger takes a new one of the same name.
	if err := os.Remove(out + ".lock"); err != nil {
		t.Fatal(err)
	}
	theirs := n.lock(outBase)
	n.begin()
	if status := n.wait(); status != 0 {
		t.Fatalf("exit status = %d, said %q", status, n.said(9))
	}
	if !exists(out + ".lock") {
		t.Error("the stranger's lock file is gone")
	}
	for name, f := range map[string]*os.File{"ours": ours, "theirs": theirs} {
		if got := held(t, f); got != "" {
			t.Errorf("%s holds %q, want nothing", name, got)
		}
	}
}

func TestHookFreesALockThatSomebodyWaitsFor(t *testing.T) {
	var out string
	d := building(t, func(s hookStream, _ *dispatchv1.Start) error {
		askForLocks(s, out)
		// What AddToStoreNar does next: a fresh lock, at once.
		f, err := os.OpenFile(out+".lock", os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return s.Send(finished(dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE, "", err.Error()))
		}
		return s.Send(finished(dispatchv1.BuildStatus_BUILD_STATUS_BUILT, "", ""))
	})
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket)
	out = n.output(outBase)
	n.lock(outBase)
	n.try(testSystem, true)
	n.begin()
	if status := n.wait(); status != 0 {
		t.Errorf("exit status = %d, said %q", status, n.said(9))
	}
}

func TestHookSaysWhenItCannotHandOver(t *testing.T) {
	l := &outputLocks{}
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/x.lock", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l.locks = []outputLock{{output: "x", path: dir + "/x.lock", fd: -1}} // so that looking at it fails
	if err := l.handOver([]string{"x"}); err == nil {
		t.Error("no error for a lock that cannot be looked at")
	}
	if !exists(dir + "/x.lock") {
		t.Error("the file was removed without knowing whose it is")
	}
}

func TestHookGivesTheStockHookWhatHasNoDerivation(t *testing.T) {
	d := answering(t, replyWith(dispatchv1.Reply_ACTION_ACCEPT, "", false))
	n := newFakeNix(t, testSettings(), daemonsocket.Env+"="+d.socket, stockHookEnv+"="+stockScript(t, `echo '# decline' >&2`))
	if err := os.WriteFile(string(n.drv), []byte("Derive(["), 0o644); err != nil {
		t.Fatal(err)
	}
	if reply, _ := n.try(testSystem, true); reply != "decline" {
		t.Errorf("reply = %q, want the stock hook's", reply)
	}
}
