package fleet

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestLockIsHeldByOneAndWaitsForIt(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	unlock, err := lockFile(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := tryLockFile(name); second != nil || err != nil {
		t.Fatalf("a second owner got the lock (%v)", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := lockFile(ctx, name); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("waiting for a held lock: %v", err)
	}
	unlock()
	unlock, err = lockFile(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}

func TestProcessIsNotMistakenForALaterOneWithItsPID(t *testing.T) {
	cmd := exec.Command("sleep", "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	other := process{PID: p.PID, Start: p.Start + "1"}
	if !p.alive() || other.alive() || (process{}).alive() {
		t.Errorf("alive: %v, another with its pid %v, none %v", p.alive(), other.alive(), process{}.alive())
	}
	if err := other.signal(9); err != nil || !p.alive() {
		t.Errorf("signalled the wrong process (%v)", err)
	}
	if err := p.signal(9); err != nil {
		t.Fatal(err)
	}
	if err := p.waitGone(t.Context()); err != nil { // a zombie is gone
		t.Fatal(err)
	}
	cmd.Wait()
	if err := p.signal(9); err != nil {
		t.Errorf("signal to a process that has ended: %v", err)
	}
}

func TestListeningPortIsFoundInProcNetTCP(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0
   1: 0100007F:0050 0100007F:1234 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0
`
	if !listens(table, 22) || listens(table, 80) || listens(table, 16) {
		t.Errorf("22: %v, 80: %v, 16: %v", listens(table, 22), listens(table, 80), listens(table, 16))
	}
}

func TestShellQuoteMakesOneWord(t *testing.T) {
	for _, want := range []string{"", "plain", "a b", `it's "$HOME" \ * `, "new\nline", "'''"} {
		out, err := exec.Command("/bin/sh", "-c", "printf %s "+shellQuote(want)).Output()
		if err != nil || string(out) != want {
			t.Errorf("%q became %q (%v)", want, out, err)
		}
	}
}

func TestBootArchiveHoldsModesAndOwners(t *testing.T) {
	data, err := tarOf([]bootFile{{name: "/etc/x", text: "hi", mode: 0o640, uid: 1001}})
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(bytes.NewReader(data))
	header, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(header.Name, header.Mode, header.Uid, header.Gid, string(text)); got != fmt.Sprint("etc/x", 0o640, 1001, 1001, "hi") {
		t.Error(got)
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("after the last file: %v", err)
	}
}

// recorder is the TB that Require is tried with.
type recorder struct{ skipped, failed string }

func (r *recorder) Helper()                        {}
func (r *recorder) Skipf(format string, a ...any)  { r.skipped = fmt.Sprintf(format, a...) }
func (r *recorder) Fatalf(format string, a ...any) { r.failed = fmt.Sprintf(format, a...) }

func TestRequireFailsInsteadOfSkippingInCI(t *testing.T) {
	for _, test := range []struct {
		name        string
		unavailable error
		ci          string
		skip, fail  bool
	}{
		{"available", nil, "1", false, false},
		{"unavailable", errors.New("it needs root"), "", true, false},
		{"unavailable in CI", errors.New("it needs root"), "1", false, true},
	} {
		for _, variable := range []string{"CI", "NIX_DISPATCH_REQUIRE_FLEET"} {
			t.Run(test.name+" "+variable, func(t *testing.T) {
				t.Setenv("CI", "")
				t.Setenv("NIX_DISPATCH_REQUIRE_FLEET", "")
				t.Setenv(variable, test.ci)
				var r recorder
				require(&r, test.unavailable)
				if (r.skipped != "") != test.skip || (r.failed != "") != test.fail {
					t.Errorf("skipped %q, failed %q", r.skipped, r.failed)
				}
				if said := r.skipped + r.failed; test.unavailable != nil && !strings.Contains(said, "it needs root") {
					t.Errorf("the reason is missing: %q", said)
				}
			})
		}
	}
}

func TestOpenFindsNoFleetThatIsNotThere(t *testing.T) {
	t.Setenv("NIX_DISPATCH_FLEET_CACHE", t.TempDir())
	for _, name := range []string{"absent", "", "../x", "a/b"} {
		if _, err := Open(t.Context(), name, nil); !errors.Is(err, ErrNoFleet) {
			t.Errorf("Open(%q): %v, want ErrNoFleet", name, err)
		}
	}
	if names, err := List(); len(names) != 0 || err != nil {
		t.Errorf("List: %q, %v", names, err)
	}
}

func TestReapRemovesAHalfMadeFleetAndLeavesAnOwnedOne(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("NIX_DISPATCH_FLEET_CACHE", cache)
	for _, name := range []string{"dead", "owned"} {
		if err := os.MkdirAll(filepath.Join(cache, "run", name, "hosts"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	unlock, err := tryLockFile(filepath.Join(cache, "run", "owned", lockName))
	if err != nil || unlock == nil {
		t.Fatal(err)
	}
	defer unlock()
	if err := Reap(t.Context(), discard()); err != nil {
		t.Fatal(err)
	}
	if names, err := List(); err != nil || len(names) != 1 || names[0] != "owned" {
		t.Errorf("left: %q, %v; want the owned one", names, err)
	}
}

func TestClosingAHostLeavesTheGroupsOfOthers(t *testing.T) {
	require(t, Available())
	dir := t.TempDir() // no fleet has it
	sysd := cgroupPrefix(dir) + "sysd"
	for _, name := range []string{sysd + "/init.scope", sysd + "2"} {
		if err := os.MkdirAll(filepath.Join(cgroupMount(), name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	left := func() (names []string) {
		groups, err := filepath.Glob(filepath.Join(cgroupMount(), cgroupPrefix(dir)+"*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, group := range groups {
			names = append(names, filepath.Base(group))
		}
		return names
	}
	if err := removeCgroups(sysd); err != nil {
		t.Error(err)
	}
	if got := left(); len(got) != 1 || got[0] != sysd+"2" {
		t.Errorf("left when host sysd is closed: %q, want the group of sysd2", got)
	}
	if err := removeCgroups(cgroupPrefix(dir) + "*"); err != nil {
		t.Error(err)
	}
	if got := left(); got != nil {
		t.Errorf("left when the fleet is removed: %q", got)
	}
}
