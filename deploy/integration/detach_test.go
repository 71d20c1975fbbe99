package integration

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDetachedBuild has a build go on without its caller, over the death of the daemon,
// and its outputs survive the garbage collector until somebody asks for them.
func TestDetachedBuild(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: protocolMachines(1, 2)})
		bottom := recipe{name: "bottom", feature: "ssh", script: "echo bottom > $out"}
		top := recipe{name: "top", feature: "ssh-ng", attrs: "bottom = " + bottom.expr() + ";"}
		top.script = "echo 'this is top'; " + top.awaitGate() + "cat $bottom > $out"
		drv := s.instantiateRooted(top.expr(), "/root/drv")
		out, err := s.dispatch("build", "--detach", drv)
		if err != nil {
			t.Fatalf("build --detach: %v\n%s", err, out.Stderr)
		}
		id := strings.TrimSpace(out.Stdout)
		running := func() bool { return s.runs(top, s.allMachines()...) > 0 && len(s.status().Builds) == 1 }
		s.eventually(time.Minute, "its second derivation is being built", running)
		s.stopDaemon(syscall.SIGKILL)
		s.startDaemon()
		watched := s.launchDispatch("attach", "-L", id)
		s.eventually(time.Minute, "it is built again", func() bool { return strings.Contains(watched.out().Stderr, "this is top") })
		if st := s.detached(id); st.State != "building" || st.User != "root" || st.Planned != 1 {
			t.Errorf("status: %+v, want it building, one derivation", st)
		}
		s.openGate(top)
		paths := watched.succeed(time.Minute)
		// Nobody has made a root of it, and nix-dispatchd's own connections to
		// nix-daemon, which keep what they have brought, last some seconds.
		s.letGo(s.client.Name())
		time.Sleep(11 * time.Second)
		s.collectGarbage(s.client)
		s.verify(paths...)
		if out, err := s.dispatch("attach", "--out-link", "/root/result", id); err != nil || strings.Fields(out.Stdout)[0] != paths[0] {
			t.Errorf("attached when it has ended: %v, %q, want %q\n%s", err, out.Stdout, paths, out.Stderr)
		}
		if link := s.run("readlink", "/root/result"); link != paths[0] {
			t.Errorf("the link leads to %s, want %s", link, paths[0])
		}
		if st := s.detached(id); st.State != "built" {
			t.Errorf("status: %+v, want it built", st)
		}
		if log, err := s.dispatch("log", id); err != nil || !strings.Contains(log.Stdout, "this is top") {
			t.Errorf("log: %v, %q", err, log.Stdout)
		}

		endless := recipe{name: "endless", feature: "ssh", script: "sleep 70007"}
		out, err = s.dispatch("build", "--detach", s.drvOf(endless.expr()))
		if err != nil {
			t.Fatalf("build --detach: %v\n%s", err, out.Stderr)
		}
		id = strings.TrimSpace(out.Stdout)
		s.awaitRun(endless)
		if out, err := s.dispatch("cancel", id); err != nil {
			t.Errorf("cancel: %v\n%s", err, out.Stderr)
		}
		s.idle(time.Minute)
		s.eventually(patience, "nothing runs on the machine", func() bool { return runsOn(s.machines["ssh-1"], "sleep 70007") == 0 })
		if out, err := s.dispatch("attach", id); err == nil || !strings.Contains(out.Stderr, "cancelled") {
			t.Errorf("attached to what was cancelled: %v\n%s", err, out.Stderr)
		}
	})
}

// A detachedReport is a detached build in nix-dispatch status --json.
type detachedReport struct {
	ID      json.Number
	User    string
	State   string
	Planned int
}

// detached is what nix-dispatch status says of one.
func (s *site) detached(id string) detachedReport {
	s.t.Helper()
	for _, d := range s.status().Detached {
		if d.ID.String() == id {
			return d
		}
	}
	s.t.Errorf("nix-dispatch status knows of no detached build %s", id)
	return detachedReport{}
}
