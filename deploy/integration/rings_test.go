package integration

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// A way is one to send a build to the other host: scheme and user there, and as which
// user it would come back. A derivation chooses it by requiring the feature of its name.
type way struct{ scheme, there, back string }

func (w way) name() string { return w.scheme + "-" + w.there + "-" + w.back }

// mutualWays are those by which a build is sent there whole, so that the Nix there asks
// its own build hook, and one by which it is not, for which that Nix builds it itself.
var mutualWays = []way{
	{"ssh-ng", "nix", "root"}, {"ssh-ng", "nix", "nix"}, {"ssh", "nix", "root"}, {"ssh", "nix", "nix"}, {"ssh-ng", "root", "root"},
}

// mutualHosts makes a site whose machine has a nix-dispatchd of its own, which has the
// client in its list. theirs is the log of that.
func mutualHosts(t *testing.T) (s *site, theirs *syncBuffer) {
	t.Helper()
	fleet.Require(t)
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	names, lines, back := "", "", ""
	for _, w := range mutualWays {
		names += " " + w.name()
		lines += fmt.Sprintf("%s://%s@mac x86_64-linux - 1 1 %s %[3]s\n", w.scheme, w.there, w.name())
		back += fmt.Sprintf("ssh-ng://%s@client x86_64-linux - 1 1 %s %[2]s\n", w.back, w.name())
	}
	// nix-daemon refuses connections of its build users. Without such users builders run as
	// root, and may build.
	conf := "max-jobs = 1\nbuild-users-group =\nsystem-features =" + names + " here\n"
	s = newSite(t, siteConfig{jobs: 1, nixConf: conf, machines: []machineConfig{{name: "mac", host: fleet.HostConfig{
		NixConf:   conf,
		Binds:     map[string]string{programs: dir},
		NixDaemon: fleet.NixDaemon{Env: []string{"NIX_CONFIG=build-hook = " + hookSetting("")}},
	}}}})
	mac := s.machines["mac"]
	if err := mac.WriteFile(machinesFile, []byte(back), 0o644); err != nil {
		t.Fatal(err)
	}
	theirs = new(syncBuffer)
	cmd := mac.Command(context.WithoutCancel(t.Context()), "root", programs+"/nix-dispatchd", "--log-level", "debug", "--drain-timeout", "0s")
	cmd.Stdout, cmd.Stderr = theirs, theirs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = mac.Signal(cmd, syscall.SIGKILL)
		_ = cmd.Wait() // it was killed
	})
	s.eventually(time.Minute, "mac's daemon is connected to the client", func() bool {
		return strings.Contains(theirs.String(), `msg="ssh connection up" machine=ssh-ng://nix@client`) &&
			strings.Contains(theirs.String(), `msg="ssh connection up" machine=ssh-ng://root@client`)
	})
	s.write(machinesFile, lines)
	s.mustDispatch("reload")
	s.eventually(time.Minute, "all ways to mac are up", func() bool {
		up := 0
		for _, m := range s.status().Machines {
			if m.State == "up" {
				up++
			}
		}
		return up == len(s.status().Machines) && up > 2
	})
	return s, theirs
}

// TestHostsThatListEachOther has two hosts with one slot each have the other in their
// lists. What one sends to the other is built there: it is not sent back, where it would
// wait for the locks of its own caller. Then builders ask for builds themselves.
func TestHostsThatListEachOther(t *testing.T) {
	t.Parallel()
	s, theirs := mutualHosts(t)
	mac := s.machines["mac"]
	runs := make(map[string]*launched)
	for _, w := range mutualWays {
		by := func(who string) string { return shell(who+"-"+w.name(), "echo thing > $out", features(w.name())) }
		runs["hook-"+w.name()] = s.launch("alice", by("hook"))
		runs["direct-"+w.name()] = s.launchDispatch("build", s.drvOf(by("direct")))
	}
	for name, run := range runs {
		select {
		case <-run.done:
		case <-time.After(patience):
			t.Fatalf("%s has not ended; it printed:\n%s\nmac's daemon:\n%s", name, run.out().Stderr, theirs.String())
		}
		if run.err != nil {
			t.Errorf("%s: %v\n%s", name, run.err, run.out().Stderr)
		}
		if there, here := ran(t, mac, name), ran(t, s.client, name); there+here != 1 {
			t.Errorf("%s ran %d times on mac and %d times here, want once", name, there, here)
		}
		drv := "-" + name + ".drv"
		sentBack := strings.Contains(name, "-nix-") // to a host that asks its own hook
		for line := range strings.Lines(theirs.String()) {
			if strings.Contains(line, `msg="build accepted"`) && strings.Contains(line, drv) {
				t.Errorf("mac has sent it back: %s", line)
			}
			if strings.Contains(line, drv) && strings.Contains(line, "the build was sent here by ssh-ng://") {
				sentBack = false
			}
		}
		if sentBack && ran(t, mac, name) == 1 {
			t.Errorf("%s: mac does not say why it builds it itself", name)
		}
	}
	s.buildsWithinBuilds()
	if t.Failed() {
		t.Logf("mac's daemon:\n%s", theirs.String())
	}
	s.idle(time.Minute)
}

// buildsWithinBuilds has builders run nix-build by the nix-daemon of the host they are on,
// while they hold the only slot there is for what that asks for: a builder of mac's asks
// for a build that mac sends to the client, whose only slot for it is the builder's.
func (s *site) buildsWithinBuilds() {
	s.t.Helper()
	runs := make(map[string]*launched)
	for _, r := range []struct{ outer, inner string }{
		{"here", "ssh-ng-root-root"}, {"here", "here"}, {"ssh-ng-nix-nix", "ssh-ng-nix-nix"}, {"ssh-ng-root-root", "ssh-ng-root-root"},
	} {
		name := r.outer + "-within-" + r.inner
		file := "/srv/" + name + ".nix"
		inner := shell("inner-"+name, "echo inner > $out", features(r.inner))
		for _, h := range s.hosts() {
			if err := h.WriteFile(file, []byte(inner), 0o644); err != nil {
				s.t.Fatal(err)
			}
		}
		runs[name] = s.launch("alice", shell("outer-"+name, "export HOME=$TMPDIR NIX_REMOTE=daemon; p=$(nix-build --no-out-link "+file+"); cat $p > $out", features(r.outer)))
	}
	for name, run := range runs {
		for _, path := range run.succeed(patience) {
			s.contents(path, "inner\n")
		}
		for _, part := range []string{"inner-", "outer-"} {
			if n := ran(s.t, s.machines["mac"], part+name) + ran(s.t, s.client, part+name); n != 1 {
				s.t.Errorf("%s ran %d times, want once", part+name, n)
			}
		}
	}
}
