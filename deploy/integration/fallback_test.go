package integration

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

const (
	// elsewhere is a store on the client itself that is a machine, named by its path.
	elsewhere = "/srv/elsewhere"
	// farSocket is where a nix-daemon of another store on the client listens, farURI
	// that as a machine, of a kind that the daemon does not serve.
	farSocket = "/srv/far.sock"
	farURI    = "unix://" + farSocket + "?root=/srv/far"
)

// What the daemon does not serve goes to Nix's own hook and works as without us.
func TestWhatGoesToTheStockHook(t *testing.T) {
	t.Parallel()
	for _, suite := range []string{fleet.Trixie, fleet.Sid} {
		t.Run(suite, func(t *testing.T) {
			const conf = "experimental-features = nix-command ca-derivations\nsandbox-paths = /bin /usr /lib /lib64\n"
			host := fleet.HostConfig{NixConf: conf}
			s := newSite(t, siteConfig{client: suite, nixConf: conf + "system-features = big-parallel ca-derivations special far\n",
				machines: []machineConfig{
					{name: "mac", suite: suite, columns: "x86_64-linux - 2 1 big-parallel,ca-derivations", host: host},
					{name: "mini", suite: suite, host: host},
				}})
			lines, err := s.client.ReadFile("/etc/nix/machines")
			if err != nil {
				t.Fatal(err)
			}
			mac, _, _ := strings.Cut(string(lines), "\n")
			s.stopDaemon(syscall.SIGTERM)
			s.write("/etc/nix/machines", mac+"\n"+elsewhere+" x86_64-linux - 1 1 - special\n"+farURI+" x86_64-linux - 1 1 - far\n")
			s.startDaemon()
			s.startFarNix()
			t.Run("floating content-addressed derivation", func(t *testing.T) { s.within(t).floating() })
			t.Run("another list of machines", func(t *testing.T) { s.within(t).otherBuilders() })
			t.Run("an ordinary user's list of machines", func(t *testing.T) { s.within(t).ignoredBuilders() })
			t.Run("another store", func(t *testing.T) { s.within(t).otherStore() })
			t.Run("a machine that is a path", func(t *testing.T) { s.within(t).pathMachine() })
			t.Run("a machine of another kind", func(t *testing.T) { s.within(t).farMachine() })
			t.Run("a binary cache in place of a store", func(t *testing.T) { s.within(t).intoBinaryCache() })
			t.Run("no machines", func(t *testing.T) { s.within(t).noBuilders() })
			t.Run("a bad line", func(t *testing.T) { s.within(t).badLine() })
		})
	}
}

// built fails the test unless a nix-build succeeded with one output of this
// content, and returns the output.
func (s *site) built(out fleet.Output, err error, want string) string {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("nix-build: %v\n%s", err, out.Stderr)
	}
	path := strings.TrimSpace(out.Stdout)
	s.contents(path, want)
	return path
}

// ranOn fails the test unless a derivation ran once, on this host.
func (s *site) ranOn(name, host string) {
	s.t.Helper()
	at := map[string]*fleet.Host{"client": s.client}
	for n, h := range s.machines {
		at[n] = h
	}
	for n, h := range at {
		want := 0
		if n == host {
			want = 1
		}
		if got := ran(s.t, h, name); got != want {
			s.t.Errorf("%s ran %d times on %s, want %d", name, got, n, want)
		}
	}
}

func (s *site) floating() {
	out, err := s.nixBuild("alice", shell("floating", "echo floating > $out",
		`__contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";`))
	path := s.built(out, err, "floating\n")
	s.ranOn("floating", "mac")
	s.verify(path)
	// What it is an input of knows its path by then, and is ours to build.
	out, err = s.nixBuild("alice", shell("after", "cat $dep > $out", "dep = "+shell("floating", "echo floating > $out",
		`__contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256";`)+";"))
	s.built(out, err, "floating\n")
	s.ranOn("after", "mac")
}

func (s *site) otherBuilders() {
	out, err := s.nixBuild("root", shell("other-builders", "echo mini > $out", ""), "--builders", "ssh://root@mini x86_64-linux")
	s.built(out, err, "mini\n")
	s.ranOn("other-builders", "mini")
}

// ignoredBuilders: Nix itself does not let users name machines who are not
// trusted.
func (s *site) ignoredBuilders() {
	out, err := s.nixBuild("alice", shell("ignored-builders", "echo mac > $out", ""), "--builders", "ssh://root@mini x86_64-linux")
	s.built(out, err, "mac\n")
	s.ranOn("ignored-builders", "mac")
}

func (s *site) otherStore() {
	out, err := s.nixBuild("root", shell("other-store", "echo there > $out", ""), "--store", "/srv/store")
	if err != nil {
		s.t.Fatalf("nix-build: %v\n%s", err, out.Stderr)
	}
	s.contents("/srv/store"+strings.TrimPrefix(strings.TrimSpace(out.Stdout), "/srv/store"), "there\n")
	s.ranOn("other-store", "mac")
}

func (s *site) pathMachine() {
	out, err := s.nixBuild("alice", shell("special", "echo special > $out", features("special")))
	path := s.built(out, err, "special\n")
	s.contents(elsewhere+path, "special\n")
	const uri = "local://" + elsewhere
	if n := builtOn(out.Stderr)[uri]; n != 1 {
		s.t.Errorf("built on %v, want %s", builtOn(out.Stderr), uri)
	}
	for _, m := range s.status().Machines {
		if m.URI == uri && m.State == "up" {
			return
		}
	}
	s.t.Errorf("status is %+v, want %s in it, up", s.status().Machines, uri)
}

// startFarNix starts a nix-daemon for another store, which ends with the client.
func (s *site) startFarNix() {
	s.t.Helper()
	cmd := s.client.Command(s.t.Context(), "root", "nix-daemon", "--store", "/srv/far", "--option", "builders", "", "--option", "max-jobs", "1")
	cmd.Env = append(cmd.Env, "NIX_DAEMON_SOCKET_PATH="+farSocket)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	})
	s.eventually(time.Minute, "the other nix-daemon listens", func() bool {
		_, err := s.client.Run(s.t.Context(), "test", "-S", farSocket)
		return err == nil
	})
}

func (s *site) farMachine() {
	out, err := s.nixBuild("alice", shell("far", "echo far > $out", features("far")))
	path := s.built(out, err, "far\n")
	s.contents("/srv/far"+path, "far\n")
	if n := builtOn(out.Stderr)[farURI]; n != 1 {
		s.t.Errorf("built on %v, want %s", builtOn(out.Stderr), farURI)
	}
	e, reasons := s.explain("--system", "x86_64-linux", "--features", "far")
	if want := "unsupported: store URI \"" + farURI + "\" is neither ssh:// nor ssh-ng:// nor a path; left to the stock hook"; reasons[farURI] != want {
		s.t.Errorf("explain = %+v, want %q of %s", e, want, farURI)
	}
}

// intoBinaryCache builds with a store that can build nothing by itself: only hooks
// bring outputs into it, and only Nix's own does.
func (s *site) intoBinaryCache() {
	before := s.started()
	expr := shell("cached", "echo cached > $out", "")
	out, err := s.client.Run(s.t.Context(), "nix", "build", "--store", "file:///srv/cache", "--no-link", "--print-out-paths", "--impure", "--expr", expr)
	if err != nil {
		s.t.Fatalf("nix build: %v\n%s", err, out.Stderr)
	}
	s.ranOn("cached", "mac")
	if n := s.started() - before; n != 0 {
		s.t.Errorf("the daemon took %d builds for a store that it does not serve", n)
	}
	path := strings.TrimSpace(out.Stdout)
	if text, err := s.client.Run(s.t.Context(), "nix", "store", "cat", "--store", "file:///srv/cache", path); err != nil || text.Stdout != "cached\n" {
		s.t.Errorf("the cache has %q of %s: %v\n%s", text.Stdout, path, err, text.Stderr)
	}
}

func (s *site) noBuilders() {
	expr := "[" + shell("local-1", "echo 1 > $out", "") + shell("local-2", "echo 2 > $out", "") + "]"
	out, err := s.nixBuild("root", expr, "--builders", "", "--max-jobs", "1", "-vvvvv")
	if err != nil {
		s.t.Fatalf("nix-build: %v\n%s", err, out.Stderr)
	}
	s.ranOn("local-1", "client")
	s.ranOn("local-2", "client")
	if n := strings.Count(out.Stderr, "hook reply is 'decline-permanently'"); n != 1 {
		s.t.Errorf("the hook declined permanently %d times, want once", n)
	}
}

func (s *site) badLine() {
	t := s.t
	lines, err := s.client.ReadFile("/etc/nix/machines")
	if err != nil {
		t.Fatal(err)
	}
	mac, _, _ := strings.Cut(string(lines), "\n")
	s.stopDaemon(syscall.SIGTERM)
	s.write("/etc/nix/machines", "# the machines\nssh://root@mini x86_64-linux - many\n"+mac+"\n")
	s.startDaemon()
	out, err := s.nixBuild("alice", shell("despite", "echo built > $out", ""))
	s.built(out, err, "built\n")
	s.ranOn("despite", "mac")
	const place = `/etc/nix/machines:2`
	shown, err := s.dispatch("status")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(shown.Stdout, "left out: "+place) || !strings.Contains(shown.Stdout, `found "many"`) {
		t.Errorf("status does not tell of the bad line:\n%s", shown.Stdout)
	}
	shown, err = s.dispatch("machines", "check")
	if code := exitCode(err); code != 1 {
		t.Errorf("machines check: exit %d, want 1", code)
	}
	for _, want := range []string{place, "max jobs", `"many"`} {
		if !strings.Contains(shown.Stderr, want) {
			t.Errorf("machines check says %q, want %s in it", shown.Stderr, want)
		}
	}
	if !strings.Contains(shown.Stdout, "ssh://root@mac") {
		t.Errorf("machines check leaves out the good machine:\n%s", shown.Stdout)
	}
}
