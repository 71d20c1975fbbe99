package integration

import (
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// An alias is a name in root's ssh_config that leads to a host.
type alias struct {
	name   string
	scheme string   // "" for ssh
	config []string // beyond HostName
	// down is what the reason says if it must not be used; "" if it builds.
	down []string
}

func (a alias) uri() string {
	if a.scheme == "" {
		return "ssh://" + a.name
	}
	return a.scheme + "://" + a.name
}

// aliases are ways to one host, which only what asks for their name takes.
func aliases(changed string) []alias {
	key := func(name string) []string { return []string{"IdentityFile ~/keys/" + name, "IdentitiesOnly yes"} }
	return []alias{
		{name: "jumped", config: []string{"Port 2200", "ProxyJump alice@jump:22"}},
		{name: "jumped-ng", scheme: "ssh-ng", config: []string{"Port 2200", "ProxyJump jump2"}},
		{name: "proxied", config: []string{"Port 2200", "ProxyCommand ssh -W %h:%p alice@jump"}},
		{name: "in-agent", config: []string{"IdentityFile none", "IdentityAgent /run/agent"}},
		{name: "certified", config: key("certified")},
		{name: "hashed", config: []string{"UserKnownHostsFile ~/hashed", "GlobalKnownHostsFile none"}},
		{name: "host-alias", config: []string{"HostKeyAlias big", "UserKnownHostsFile ~/alias"}},
		{name: "accept-new", config: []string{"StrictHostKeyChecking accept-new", "UserKnownHostsFile ~/new", "GlobalKnownHostsFile none"}},
		{name: "changed", config: []string{"UserKnownHostsFile " + changed},
			down: []string{"the host's key has changed", changed + ":2"}},
		{name: "unknown", config: []string{"UserKnownHostsFile /dev/null", "GlobalKnownHostsFile none"},
			down: []string{"is not known", "/dev/null"}},
		{name: "locked", config: append(key("locked"), "IdentityAgent none"),
			down: []string{"/root/keys/locked: has a passphrase: load it into an agent"}},
		{name: "refused", config: []string{"Port 2299"}, down: []string{"connection refused", "start sshd there"}},
		{name: "no-proxy", config: []string{"ProxyCommand sh -c 'echo the tunnel is closed >&2; exit 3'"},
			down: []string{"exit status 3: the tunnel is closed"}},
		{name: "forced", config: key("forced")},
		{name: "forced-ng", scheme: "ssh-ng", config: key("forced-ng")},
		{name: "noted", config: key("noted")},
		{name: "noted-ng", scheme: "ssh-ng", config: key("noted-ng")},
	}
}

// TestSSHConfig reaches machines in the ways people have set up for stock Nix, in
// root's ssh_config and on the machine.
func TestSSHConfig(t *testing.T) {
	t.Parallel()
	all := aliases("/root/changed")
	var names []string
	for _, a := range all {
		names = append(names, a.name)
	}
	s := newSite(t, siteConfig{daemon: []string{"--machine-wait", "90s"}, machines: []machineConfig{
		{name: "mac", suite: fleet.Sid, host: fleet.HostConfig{
			SystemFeatures: names,
			SSHDConfig:     "Port 22\nPort 2200\nTrustedUserCAKeys /etc/ssh/authority.pub",
		}},
		{name: "jump", suite: fleet.Bookworm},
	}})
	s.layOutKeys()
	s.reconfigure(all)
	for _, a := range all {
		t.Run(a.name, func(t *testing.T) { s.in(t).reaches(a) })
	}
	t.Run("jump host", func(t *testing.T) { s.in(t).cameByJump() })
	t.Run("accepted key", func(t *testing.T) { s.in(t).acceptedKey() })
	t.Run("changed key", func(t *testing.T) { s.in(t).neverLoggedIn() })
	t.Run("forced commands", func(t *testing.T) { s.in(t).askedForNothingElse() })
	t.Run("NIX_SSHOPTS", func(t *testing.T) { s.in(t).followsSSHOpts() })
}

// layOutKeys makes keys on the client and lets them in on mac, each in its way.
func (s *site) layOutKeys() {
	s.t.Helper()
	mac := s.machines["mac"]
	s.run("sh", "-ec", `umask 077; mkdir ~/keys; cd ~/keys
		for k in authority agent certified forced forced-ng noted noted-ng; do ssh-keygen -q -t ed25519 -N '' -f $k; done
		ssh-keygen -q -t ed25519 -N secret -a 1 -f locked
		ssh-keygen -q -s authority -I test -n root certified.pub
		ssh-agent -a /run/agent >/dev/null; SSH_AUTH_SOCK=/run/agent ssh-add -q agent; rm agent
		grep '^mac' ~/.ssh/known_hosts >~/hashed; ssh-keygen -q -H -f ~/hashed; rm ~/hashed.old
		sed -n 's/^mac[^ ]* /big /p' ~/.ssh/known_hosts >~/alias
		{ echo '# what it was'; echo "mac $(cat agent.pub)"; } >~/changed`)
	public := func(name string) string { return strings.TrimSpace(s.run("cat", "/root/keys/"+name+".pub")) }
	authorized, err := mac.ReadFile("/root/.ssh/authorized_keys")
	if err != nil {
		s.t.Fatal(err)
	}
	serve, daemon := "nix-store --serve --write", "nix-daemon --stdio"
	note := "echo $SSH_ORIGINAL_COMMAND >>/tmp/asked; exec "
	lines := []string{
		strings.TrimSpace(string(authorized)),
		public("agent"),
		fmt.Sprintf("command=%q %s", serve, public("forced")),
		fmt.Sprintf("restrict,command=%q %s", daemon, public("forced-ng")),
		fmt.Sprintf("command=%q %s", note+serve, public("noted")),
		fmt.Sprintf("command=%q %s", note+daemon, public("noted-ng")),
	}
	for name, text := range map[string]string{
		"/root/.ssh/authorized_keys": strings.Join(lines, "\n") + "\n",
		"/etc/ssh/authority.pub":     public("authority") + "\n",
	} {
		if err := mac.WriteFile(name, []byte(text), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
}

// reconfigure makes the aliases the machines, and starts nix-dispatchd anew.
func (s *site) reconfigure(all []alias) {
	s.t.Helper()
	var config, lines strings.Builder
	for _, a := range all {
		fmt.Fprintf(&config, "Host %s\n  HostName mac\n  %s\n", a.name, strings.Join(a.config, "\n  "))
		fmt.Fprintf(&lines, "%s x86_64-linux - 2 1 - %s\n", a.uri(), a.name)
	}
	config.WriteString("Host jump2\n  HostName jump\nMatch originalhost jump2 exec true\n  User alice\n")
	s.write("/root/.ssh/config", config.String())
	s.write("/etc/nix/machines", lines.String())
	s.stopDaemon(syscall.SIGTERM)
	s.startDaemon()
}

// reaches builds on a machine, or finds it down for the right reason, with stock
// Nix of the same mind.
func (s *site) reaches(a alias) {
	uri := a.uri()
	if a.down == nil {
		out := s.mustBuild("alice", shell("via-"+a.name, "echo here > $out", features(a.name)))
		s.verify(out...)
		if ran(s.t, s.machines["mac"], "via-"+a.name) != 1 {
			s.t.Errorf("it was not built on the machine")
		}
	} else {
		reason := s.reason(uri)
		for _, want := range a.down {
			if !strings.Contains(reason, want) {
				s.t.Errorf("it is down because %q, want %q in it", reason, want)
			}
		}
	}
	// Whatever becomes of this, Nix's own ssh says the same.
	ping, err := s.client.Run(s.t.Context(), "nix", "--extra-experimental-features", "nix-command", "store", "ping", "--store", uri)
	if (err == nil) != (a.down == nil) {
		s.t.Errorf("stock Nix reaches it: %v\n%s", err, ping.Stderr)
	}
}

// reason is why a machine is not up.
func (s *site) reason(uri string) string {
	s.t.Helper()
	for _, m := range s.status().Machines {
		if m.URI == uri && m.State != "up" {
			return m.Reason
		}
	}
	s.t.Errorf("%s is up", uri)
	return ""
}

// cameByJump looks at where the logins on port 2200 came from.
func (s *site) cameByJump() {
	log, err := s.machines["mac"].SSHLog()
	if err != nil {
		s.t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(log) {
		if !strings.Contains(line, "port 2200") || !strings.HasPrefix(line, "Connection from") {
			continue
		}
		if n++; !strings.Contains(line, "Connection from "+s.machines["jump"].Addr()+" ") {
			s.t.Errorf("not by the jump host: %s", line)
		}
	}
	if n < 3 {
		s.t.Errorf("%d connections to port 2200, want three at least; sshd's log:\n%s", n, log)
	}
}

// acceptedKey looks at what accept-new has left.
func (s *site) acceptedKey() {
	if found := s.run("ssh-keygen", "-F", "mac", "-f", "/root/new"); !strings.Contains(found, s.machines["mac"].HostKey()) {
		s.t.Errorf("known_hosts has %q, want %q", found, s.machines["mac"].HostKey())
	}
	if log := s.daemon.log.String(); !strings.Contains(log, "unknown host key is taken and remembered") {
		s.t.Error("the log does not tell of the key that was taken")
	}
}

// neverLoggedIn makes sure that a machine whose key has changed stays out, by
// asking for a build that only it could do.
func (s *site) neverLoggedIn() {
	cmd, out := s.nixBuildCommand(s.t.Context(), "alice", shell("never", "echo > $out", features("changed")))
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.eventually(patience, "the build waits for its machine", func() bool {
		for _, b := range s.status().Builds {
			if strings.HasSuffix(b.DrvPath, "-never.drv") {
				return true
			}
		}
		return false
	})
	time.Sleep(3 * time.Second) // for what should not happen
	if ran(s.t, s.machines["mac"], "never") != 0 {
		s.t.Error("it was built on a machine whose key has changed")
	}
	if err := s.client.Signal(cmd, syscall.SIGINT); err != nil {
		s.t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		s.t.Errorf("it was built:\n%s", out().Stderr)
	}
	s.idle(time.Minute)
}

// askedForNothingElse looks at the commands that were asked for where another is
// forced: Nix's, and once of each machine whether it tells how it is. It does not, and
// is not asked again.
func (s *site) askedForNothingElse() {
	asked, err := s.machines["mac"].ReadFile("/tmp/asked")
	if err != nil {
		s.t.Fatal(err)
	}
	seen := make(map[string]int)
	for line := range strings.Lines(string(asked)) {
		seen[strings.TrimSpace(line)]++
	}
	for _, want := range []string{"nix-store --serve --write", "nix-daemon --stdio"} {
		if seen[want] == 0 {
			s.t.Errorf("%q was not asked for", want)
		}
		delete(seen, want)
	}
	const shell, noted = "exec /bin/sh", 2 // machines
	if n := seen[shell]; n > noted {
		s.t.Errorf("%q was asked for %d times of %d machines", shell, n, noted)
	}
	delete(seen, shell)
	if len(seen) > 0 {
		s.t.Errorf("also asked for: %v", seen)
	}
}

// followsSSHOpts gives another configuration file to ssh, whose name has a blank
// in it as Nix since 2.26 allows.
func (s *site) followsSSHOpts() {
	s.write("/root/my config", "Host mac-by-opts\n  HostName mac\n  User root\n")
	s.write("/etc/nix/machines", "ssh://mac-by-opts?compress=true x86_64-linux - 2 1 - jumped\n")
	s.stopDaemon(syscall.SIGTERM)
	s.env = []string{"NIX_SSHOPTS=-F '/root/my config' -o Compression=yes"}
	s.startDaemon()
	s.mustBuild("alice", shell("by-opts", "echo > $out", features("jumped")))
	for _, want := range []string{"ssh option compression yes is not followed", "compress=true in the machine's URI has no effect"} {
		if n := strings.Count(s.daemon.log.String(), want); n != 1 {
			s.t.Errorf("%d lines of the log have %q, want 1", n, want)
		}
	}
}

// TestSessionLimits has machines with many slots whose sshd allows few sessions on
// a connection.
func TestSessionLimits(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "one", suite: fleet.Sid, columns: "x86_64-linux - 16 1 - one", host: fleet.HostConfig{
			SystemFeatures: []string{"one"}, SSHDConfig: "MaxSessions 1"}},
		{name: "two", scheme: "ssh-ng", columns: "x86_64-linux - 16 1 - two", host: fleet.HostConfig{
			SystemFeatures: []string{"two"}, SSHDConfig: "MaxSessions 2"}},
	}})
	s.countBuilds()
	build := s.start("alice", all(slices.Concat(
		many(20, derivation{name: "one", features: []string{"one"}, script: awaitGo}),
		many(20, derivation{name: "two", features: []string{"two"}, script: awaitGo}),
	)))
	s.eventually(2*patience, "every slot builds", func() bool {
		return s.builds(s.machines["one"]).running == 16 && s.builds(s.machines["two"]).running == 16
	})
	s.letGo()
	build.wait(2 * patience)
	for name, least := range map[string]int{"one": 16, "two": 8} {
		if c := s.builds(s.machines[name]); c.total() != 20 || c.most != 16 {
			t.Errorf("%s built %d, %d at once; want 20, 16 at once", name, c.total(), c.most)
		}
		// A process that has just ended may still count as a session there.
		if n, err := s.machines[name].SSHConnections(); err != nil || n < least || n > 2*least+4 {
			t.Errorf("%s: %d connections (%v), want %d or a few more", name, n, err, least)
		}
	}
	s.idle(time.Minute)
}
