package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// A userDaemon is a nix-dispatchd that an ordinary user of the client runs.
type userDaemon struct {
	s    *site
	user string
	log  syncBuffer
}

const runtimeDir = "/run/user/alice"

// startUserDaemon gives alice a runtime directory and a daemon there.
func (s *site) startUserDaemon(machines string) *userDaemon {
	s.t.Helper()
	if _, err := s.client.Run(s.t.Context(), "install", "-d", "-o", "alice", "-m", "700", runtimeDir); err != nil {
		s.t.Fatal(err)
	}
	d := &userDaemon{s: s, user: "alice"}
	ctx, cancel := context.WithCancel(context.WithoutCancel(s.t.Context()))
	cmd := s.client.Command(ctx, d.user, programs+"/nix-dispatchd", "--user", "--log-level", "debug", "--builders", machines)
	cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+runtimeDir)
	cmd.Stdout, cmd.Stderr = &d.log, &d.log
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // killed
		if s.t.Failed() {
			s.t.Logf("the user's nix-dispatchd:\n%s", d.log.String())
		}
	})
	s.eventually(time.Minute, "the user's daemon is ready", func() bool { return strings.Contains(d.log.String(), "msg=ready") })
	s.eventually(time.Minute, "its machine is up", func() bool {
		out, err := d.run(nil, programs+"/nix-dispatch", "status")
		return err == nil && strings.Contains(out.Stdout, "up")
	})
	return d
}

// run runs a command as the user, who finds the daemon by the runtime directory.
func (d *userDaemon) run(env []string, argv ...string) (fleet.Output, error) {
	cmd := d.s.client.Command(d.s.t.Context(), d.user, argv...)
	cmd.Env = append(append(cmd.Env, "XDG_RUNTIME_DIR="+runtimeDir), env...)
	var stdout, stderr syncBuffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	return fleet.Output{Stdout: stdout.String(), Stderr: stderr.String()}, err
}

func (d *userDaemon) must(env []string, argv ...string) fleet.Output {
	d.s.t.Helper()
	out, err := d.run(env, argv...)
	if err != nil {
		d.s.t.Fatalf("%v: %v\n%s", argv, err, out.Stderr)
	}
	return out
}

// state is the state of a machine, "" if the daemon has none whose URI ends so.
func (d *userDaemon) state(uri string) string {
	d.s.t.Helper()
	var r statusReport
	if err := json.Unmarshal([]byte(d.must(nil, programs+"/nix-dispatch", "status", "--json").Stdout), &r); err != nil {
		d.s.t.Fatal(err)
	}
	for _, m := range r.Machines {
		if strings.HasSuffix(m.URI, uri) {
			return m.State
		}
	}
	return ""
}

// TestUsersOwnDaemonServesPrivateStores has a user without any rights build into
// stores of her own, by nix-build and by nix-dispatch, beside root's daemon.
func TestUsersOwnDaemonServesPrivateStores(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: []machineConfig{{name: "mac", user: "alice", columns: "x86_64-linux - 2",
			host: fleet.HostConfig{NixConf: "trusted-users = root alice"}}}})
		d := s.startUserDaemon("ssh-ng://alice@mac x86_64-linux - 2")
		settings := []string{
			"NIX_CONFIG=build-hook = " + hookSetting(suite) + "\nmax-jobs = 0\nbuilders = ssh-ng://alice@mac x86_64-linux - 2\nsubstitute = false",
		}
		two := func(name string) string {
			dep := shell(name+"-dep", "echo dep of "+name+" > $out", "")
			return shell(name, "cat $dep > $out; echo "+name+" >> $out", "dep = "+dep+";")
		}
		built := func(what, file string) {
			t.Helper()
			text, err := storeFile(s.client, file)
			if err != nil || text != "dep of "+what+"\n"+what+"\n" {
				t.Errorf("%s holds %q, %v", file, text, err)
			}
			s.ranOn(what, "mac")
		}

		out := strings.TrimSpace(d.must(settings, "nix-build", "--store", "/home/alice/my-nix", "--no-out-link", "--expr", two("mine")).Stdout)
		built("mine", "/home/alice/my-nix"+out)

		// Where the store directory is another one, the machine's must be, too.
		machine := "ssh-ng://alice@mac?remote-store=local%3Fstore%3D/home/alice/store%26state%3D/home/alice/var%26log%3D/home/alice/log x86_64-linux - 2"
		out = strings.TrimSpace(d.must([]string{
			strings.Replace(settings[0], "ssh-ng://alice@mac x86_64-linux - 2", machine, 1),
			"NIX_STORE_DIR=/home/alice/store", "NIX_STATE_DIR=/home/alice/var", "NIX_LOG_DIR=/home/alice/log",
		}, "nix-build", "--no-out-link", "--expr", two("elsewhere")).Stdout)
		if !strings.HasPrefix(out, "/home/alice/store/") {
			t.Errorf("built %s", out)
		}
		built("elsewhere", out)

		drv := strings.TrimSpace(d.must(nil, "nix-instantiate", "--store", "/home/alice/my-nix", "--expr", two("asked")).Stdout)
		explained := d.must(nil, programs+"/nix-dispatch", "explain", "--store", "./my-nix", drv)
		if !strings.Contains(explained.Stdout, "ssh-ng://alice@mac") {
			t.Errorf("explain says %s", explained.Stdout)
		}
		out = strings.TrimSpace(d.must(nil, programs+"/nix-dispatch", "build", "--store", "./my-nix", drv).Stdout)
		built("asked", "/home/alice/my-nix"+out)
		if _, err := d.run(nil, "nix-store", "--store", "/home/alice/my-nix", "--verify-path", out); err != nil {
			t.Errorf("verify: %v", err)
		}

		// A machine that is the store itself would wait for itself for ever. Its line
		// makes it the first choice, for the second build at the latest: it is up then.
		loop := "/home/alice/my-nix x86_64-linux - 2 100 ; ssh-ng://alice@mac x86_64-linux - 2"
		for _, name := range []string{"not-here", "nor-later"} {
			drv = strings.TrimSpace(d.must(nil, "nix-instantiate", "--store", "/home/alice/my-nix", "--expr", two(name)).Stdout)
			out = strings.TrimSpace(d.must(nil, programs+"/nix-dispatch", "build", "--store", "/home/alice/my-nix", "--builders", loop, drv).Stdout)
			built(name, "/home/alice/my-nix"+out)
			s.eventually(patience, "the machine that is the store is up", func() bool { return d.state("/home/alice/my-nix") == "up" })
		}
		if !strings.Contains(d.log.String(), "this host's own") {
			t.Error("the store was not found to be the build's own")
		}

		// Nobody else uses her daemon, but root.
		for user, may := range map[string]bool{"bob": false, "root": true} {
			out, err := s.client.RunAs(t.Context(), user, programs+"/nix-dispatch", "status", "--socket", runtimeDir+"/nix-dispatch/socket")
			if (err == nil) != may {
				t.Errorf("%s may use it: %v\n%s", user, err == nil, out.Stderr)
			}
		}

		examined, err := d.run(settings, programs+"/nix-dispatch", "doctor")
		if want := "this user's builds run " + hookSetting(suite); !strings.Contains(examined.Stdout, want) {
			t.Errorf("doctor (%v) does not say %q:\n%s%s", err, want, examined.Stdout, examined.Stderr)
		}

		if n := strings.Count(s.daemon.log.String(), "build accepted"); n != 0 {
			t.Errorf("root's daemon took %d builds", n)
		}
		// Root's serves the other user's hooks as ever, and not her store.
		refused, err := d.run([]string{"NIX_DISPATCH_SOCKET=/run/nix-dispatch/socket"}, programs+"/nix-dispatch", "status")
		if err == nil {
			t.Errorf("root's daemon serves her: %s", refused.Stdout)
		}
		told, err := s.dispatch("build", "--store", "/home/alice/my-nix", drv)
		if err == nil || !strings.Contains(told.Stderr, "nix-dispatchd --user") {
			t.Errorf("root's daemon about her store: %v, %s", err, told.Stderr)
		}
	})
}

// TestSingleUserInstallation has a user who owns the store, and no nix-daemon.
func TestSingleUserInstallation(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{{name: "mac", user: "alice", columns: "x86_64-linux - 2"}}})
	if err := s.client.StopNixDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.client.Run(t.Context(), "sh", "-c", "rm -rf /nix/var/nix/daemon-socket && chown -R alice /nix"); err != nil {
		t.Fatal(err)
	}
	d := s.startUserDaemon("ssh://alice@mac x86_64-linux - 2")
	settings := []string{"NIX_CONFIG=build-hook = " + programs + "/nix-dispatch hook\nmax-jobs = 0\nbuilders = ssh://alice@mac x86_64-linux - 2"}
	var exprs []string
	for n := range 6 {
		exprs = append(exprs, shell(fmt.Sprintf("single-%d", n), fmt.Sprintf("echo %d > $out", n), ""))
	}
	out := d.must(settings, "nix-build", "-j0", "--no-out-link", "--expr", "["+strings.Join(exprs, " ")+"]")
	for n, path := range strings.Fields(out.Stdout) {
		if text, err := storeFile(s.client, path); err != nil || text != fmt.Sprintf("%d\n", n) {
			t.Errorf("%s holds %q, %v", path, text, err)
		}
	}
	examined := d.must(settings, programs+"/nix-dispatch", "doctor")
	if !strings.Contains(examined.Stdout, "opens this user's usual store") {
		t.Errorf("doctor says:\n%s", examined.Stdout)
	}
	if n := strings.Count(d.log.String(), "build accepted"); n != 6 {
		t.Errorf("the user's daemon took %d builds, want 6", n)
	}
}
