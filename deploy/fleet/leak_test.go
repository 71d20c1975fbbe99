package fleet_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// traces finds what is left of a fleet: its directory, mounts of it, processes in
// the network namespaces given.
func traces(dir string, networks []string) []string {
	var found []string
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		found = append(found, "directory "+dir)
	}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, proc := range procs {
		if text, err := os.ReadFile(proc + "/mountinfo"); err == nil && strings.Contains(string(text), dir) {
			found = append(found, "mount in "+proc)
		}
		ns, _ := os.Readlink(proc + "/ns/net")
		for _, network := range networks {
			if ns == network {
				cmdline, _ := os.ReadFile(proc + "/cmdline")
				found = append(found, fmt.Sprintf("process %s %q in %s", proc, cmdline, network))
			}
		}
	}
	return found
}

func networksOf(t *testing.T, f *fleet.Fleet) []string {
	t.Helper()
	var out []string
	for _, h := range f.Hosts() {
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.PID()))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, ns)
	}
	return out
}

func TestCloseLeavesNothing(t *testing.T) {
	f := newFleet(t)
	hs := hosts(t, f, fleet.HostConfig{Name: "a"}, fleet.HostConfig{Name: "b"}, fleet.HostConfig{Name: "c"})
	if _, err := f.Far(t.Context(), "far-b", hs[1], fleet.ProxyConfig{}); err != nil {
		t.Fatal(err)
	}
	networks := networksOf(t, f)
	if len(traces(f.Dir(), networks)) < 4 {
		t.Fatalf("traces of a running fleet: %q, so this test would see nothing", traces(f.Dir(), networks))
	}
	for _, h := range hs {
		running := h.Command(t.Context(), "alice", "sh", "-c", "setsid sleep 1000 & sleep 1000")
		if err := running.Start(); err != nil {
			t.Fatal(err)
		}
		go running.Wait() //nolint:errcheck // it ends with its host
	}
	if err := hs[0].Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := hs[1].CutOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if left := traces(f.Dir(), networks); left != nil {
		t.Errorf("left after Close: %q", left)
	}
}

// TestMain lets this binary be the process that the next test kills.
func TestMain(m *testing.M) {
	if os.Getenv("FLEET_TEST_OWNER") == "" {
		os.Exit(m.Run())
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	f, err := fleet.New(ctx, fleet.Options{})
	if err == nil {
		_, err = f.Host(ctx, fleet.HostConfig{Name: "a"})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", f.Hosts()[0].PID()))
	fmt.Println("fleet", f.Dir(), ns, err)
	<-ctx.Done()
}

func TestFleetDiesWithItsOwner(t *testing.T) {
	fleet.Require(t)
	owner := exec.Command(os.Args[0])
	owner.Stderr = t.Output()
	owner.Env = append(os.Environ(), "FLEET_TEST_OWNER=1")
	stdout, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	var dir, network string
	for lines := bufio.NewScanner(stdout); dir == "" && lines.Scan(); {
		fmt.Sscanf(lines.Text(), "fleet %s %s", &dir, &network) //nolint:errcheck // other lines do not match
	}
	owner.Process.Kill()
	owner.Wait()
	if dir == "" {
		t.Fatal("the owner made no fleet")
	}
	// The kernel kills the processes; Reap removes what is on disk.
	if err := fleet.Reap(t.Context(), slog.New(slog.NewTextHandler(t.Output(), nil))); err != nil {
		t.Fatal(err)
	}
	var left []string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if left = traces(dir, []string{network}); left == nil {
			return
		}
	}
	t.Errorf("left after the owner was killed: %q", left)
}
