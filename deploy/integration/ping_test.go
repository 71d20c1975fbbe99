package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// A pingReport is what nix-dispatch ping --json prints of a machine.
type pingReport struct {
	Machine, By, Error string
	OK                 bool
	Steps              []pingStep
}

type pingStep struct {
	Step, Verdict, Detail, Cause, Fix string
	MS                                float64
}

func (r pingReport) last() pingStep {
	if len(r.Steps) == 0 {
		return pingStep{}
	}
	return r.Steps[len(r.Steps)-1]
}

// detail is what a step found; "" if it was not reached.
func (r pingReport) detail(step string) string {
	for _, s := range r.Steps {
		if s.Step == step {
			return s.Detail
		}
	}
	return ""
}

// ping runs nix-dispatch ping as a user and returns its reports, in order, and its
// exit status.
func (s *site) ping(user string, args ...string) ([]pingReport, int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 3*time.Minute)
	defer cancel()
	out, err := s.client.RunAs(ctx, user, append([]string{programs + "/nix-dispatch", "ping", "--json"}, args...)...)
	code := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		code = exit.ExitCode()
	} else if err != nil {
		s.t.Fatal(err)
	}
	var reports []pingReport
	if err := json.Unmarshal([]byte(out.Stdout), &reports); err != nil {
		s.t.Fatalf("ping printed %q and said %q: %v", out.Stdout, out.Stderr, err)
	}
	return reports, code
}

// pingUsers are users of the machine mac, each with something of its own, all let
// in by the fleet's key: the login shell, and the ~/.bashrc.
var pingUsers = []struct{ name, shell, bashrc string }{
	{"nologin", "/usr/sbin/nologin", ""},
	{"no-shell", "/bin/false", ""},
	{"noisy", "/bin/bash", "echo 'Welcome, \x1b[1myou\x1b[0m!'"},
	{"no-path", "/bin/bash", "PATH=/usr/games"},
	{"denied", "/bin/bash", ""},
	{"stuck", "/bin/bash", "sleep 600"},
}

// A pingCase is a way to a machine, and how ping finds it. step is "" where
// nothing fails; then last is what the step "trust" says.
type pingCase struct {
	uri    string
	config []string // of root's ssh_config, for the URI's host
	// step, cause, detail and fix are what is told; the last two in part.
	step, cause, detail, fix string
	args                     []string
}

func (c pingCase) host() string {
	_, host, _ := strings.Cut(c.uri, "://")
	host, _, _ = strings.Cut(host, "?")
	return host[strings.IndexByte(host, '@')+1:]
}

// failing are the ways that fail, each for a reason of its own.
func failing() []pingCase {
	mac := func(more ...string) []string { return append([]string{"HostName mac"}, more...) }
	quick := []string{"--timeout", "3s"}
	var all []pingCase
	all = append(all,
		pingCase{"ssh://typo", []string{"HostName no-such-host.invalid"}, "resolve", "host unknown", "no-such-host.invalid", "correct the name", nil},
		pingCase{"ssh://closed", mac("Port 2299"), "connect", "connection refused", "connection refused", "start sshd there", nil},
		pingCase{"ssh://away", []string{"HostName cut", "ConnectTimeout 60"}, "connect", "timeout", "no answer within 3s", "firewall", quick},
		pingCase{"ssh://hung", []string{"HostName frozen"}, "handshake", "timeout", "no answer within 3s", "sshd there is stuck", quick},
		pingCase{"ssh://tunnel", mac("ProxyCommand sh -c 'echo the tunnel is closed >&2; exit 3'"), "connect", "proxy failed", "the tunnel is closed", "by hand", nil},
		pingCase{"ssh://new", mac("UserKnownHostsFile /root/none", "GlobalKnownHostsFile none"), "host key", "host key unknown", "is not known", "compare the fingerprint", nil},
		pingCase{"ssh://changed", mac("UserKnownHostsFile /root/changed"), "host key", "host key changed", "/root/changed:2", "ssh-keygen -R", nil},
		pingCase{"ssh://revoked", mac("UserKnownHostsFile /root/revoked"), "host key", "host key revoked", "/root/revoked:1", "new host key", nil},
		pingCase{"ssh://wrong-key", mac("IdentityFile /root/other", "IdentitiesOnly yes"), "authenticate", "key refused", "/root/other (SHA256:", "authorized_keys", nil},
		pingCase{"ssh://locked", mac("IdentityFile /root/locked", "IdentitiesOnly yes"), "authenticate", "no key", "has a passphrase", "load one into an agent", nil},
		pingCase{"ssh://root@no-sessions", nil, "open session", "session refused", "refuses the session", "MaxSessions", nil},
		pingCase{"ssh://client-too", []string{"HostName client"}, "store", "own store", "this host's own", "take the machine out", nil},
		pingCase{"ssh://too-old?remote-program=" + fakes + "/too-old", mac(), "protocol", "protocol version", "version 2.1", "Nix 2.8 or later", nil},
		pingCase{"ssh-ng://too-old-ng?remote-program=" + fakes + "/too-old", mac(), "protocol", "protocol version", "version 1.2", "Nix 2.8 or later", nil},
	)
	for _, scheme := range []string{"ssh", "ssh-ng"} {
		// nix-store greets before it looks for nix-daemon.
		program, late, denied := "nix-store", "store", "user not allowed"
		if scheme == "ssh-ng" {
			program, late, denied = "nix-daemon", "protocol", "no nix-daemon"
		}
		as := func(user, step, cause, detail, fix string, args ...string) pingCase {
			return pingCase{scheme + "://" + user + "@" + user + "-" + scheme, mac(), step, cause, detail, fix, args}
		}
		all = append(all,
			as("nologin", "find nix", "no login", "not available", "chsh"),
			as("no-shell", "find nix", "command ended", "status 1", "/bin/false"),
			as("noisy", "find nix", "shell noise", `printed "Welcome, \x1b[1myou\x1b[0m!\n" before`, "silent for non-interactive"),
			as("no-path", "find nix", "command not found", program+": command not found", "PATH has Nix"),
			as("denied", late, denied, "not let the user in", "allowed-users"),
			as("stuck", "find nix", "timeout", "no greeting came within", "start-up file", quick...),
			pingCase{scheme + "://nix@stopped", nil, late, "no nix-daemon", "does not answer", "start nix-daemon", nil},
			pingCase{scheme + "://root@full", nil, "store", "disk full", "No space left on device", "nix-collect-garbage", nil},
		)
	}
	return all
}

// TestPing meets every error text of ping, on real machines.
func TestPing(t *testing.T) {
	t.Parallel()
	fleet.Require(t)
	cases := failing()
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "mac", suite: fleet.Sid, host: fleet.HostConfig{
			NixConf: "allowed-users = root nix alice",
			Binds:   map[string]string{fakes: fakePrograms(t)},
		}},
		{name: "no-sessions", suite: fleet.Bookworm, host: fleet.HostConfig{SSHDConfig: "MaxSessions 0"}},
		{name: "stopped"}, {name: "full"}, {name: "cut"}, {name: "frozen"},
	}})
	s.layOutPing(cases)
	t.Run("well", func(t *testing.T) { s.in(t).pingsWhatIsWell() })
	s.breakMachines()
	for _, c := range cases {
		t.Run(strings.ReplaceAll(c.uri, "/", "_"), func(t *testing.T) { s.in(t).pingFails(c) })
	}
	t.Run("caller's own", func(t *testing.T) { s.in(t).pingsAsCaller() })
	s.write("/root/.ssh/config", "Host *\n  Ciphers nonsense\n")
	odd := pingCase{"ssh://root@mac", nil, "ssh config", "ssh config", "Bad SSH2 cipher spec 'nonsense'", "ssh -G root@mac", nil}
	t.Run("ssh_config that is broken", func(t *testing.T) { s.in(t).pingFails(odd) })
}

// layOutPing makes the users on mac, the keys and known_hosts on the client, and
// the cases the machines of the daemon.
func (s *site) layOutPing(cases []pingCase) {
	s.t.Helper()
	mac := s.machines["mac"]
	for _, u := range pingUsers {
		s.onHost(mac, fmt.Sprintf(`useradd -m -p '*' -s %s %s; cd ~%[2]s; mkdir -p .ssh
			cp /home/alice/.ssh/authorized_keys .ssh/; echo %s >.bashrc; chown -R %[2]s .`, u.shell, u.name, shellWord(u.bashrc)))
	}
	s.run("sh", "-ec", `umask 077; cd ~
		ssh-keygen -q -t ed25519 -N '' -f other
		ssh-keygen -q -t ed25519 -N secret -a 1 -f locked
		{ echo '# what it was'; echo "mac $(cat other.pub)"; } >changed
		sed -n 's/^mac[^ ]* /@revoked mac /p' .ssh/known_hosts >revoked
		cp other /home/alice/my-key; chown alice /home/alice/my-key`)
	var config, lines strings.Builder
	for _, c := range cases {
		if c.config != nil {
			fmt.Fprintf(&config, "Host %s\n  %s\n", c.host(), strings.Join(c.config, "\n  "))
		}
		lines.WriteString(c.uri + " x86_64-linux\n")
	}
	s.write("/root/.ssh/config", config.String())
	s.write("/etc/nsswitch.conf", "hosts: files\n") // there is no name server to say that a name is none
	old, err := s.client.ReadFile(machinesFile)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(machinesFile, string(old)+"ssh-ng://root@mac x86_64-linux\nssh-ng://nix@mac x86_64-linux\nssh://nix@mac x86_64-linux\n"+lines.String())
	s.mustDispatch("reload")
}

func shellWord(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

// onHost runs a script on a host.
func (s *site) onHost(h *fleet.Host, script string) {
	s.t.Helper()
	if out, err := h.Run(s.t.Context(), "sh", "-ec", script); err != nil {
		s.t.Fatalf("on %s: %v\n%s%s", h.Name(), err, out.Stdout, out.Stderr)
	}
}

// breakMachines makes of machines that were well such as are not.
func (s *site) breakMachines() {
	s.t.Helper()
	ctx := s.t.Context()
	s.onHost(s.machines["full"], `mount -t tmpfs -o size=8k tmpfs /nix/var/nix/temproots
		head -c 100000 /dev/zero >/nix/var/nix/temproots/filler || true`)
	if err := errors.Join(s.machines["stopped"].StopNixDaemon(ctx), s.machines["cut"].CutOff(ctx), s.machines["frozen"].Freeze(ctx)); err != nil {
		s.t.Fatal(err)
	}
}

// pingFails expects a machine of the daemon's to fail in one way.
func (s *site) pingFails(c pingCase) {
	s.t.Helper()
	reports, code := s.ping("root", append(c.args, c.uri)...)
	r := reports[0]
	last := r.last()
	if code != 1 || r.OK || r.By != "daemon" || last.Verdict != "failed" {
		s.t.Errorf("status %d, ok %v, asked by %q, verdict %q", code, r.OK, r.By, last.Verdict)
	}
	if last.Step != c.step || last.Cause != c.cause || !strings.Contains(last.Detail, c.detail) || !strings.Contains(last.Fix, c.fix) {
		s.t.Errorf("failed at %q: %q: %q; fix %q\nwant      %q: %q: %q; fix %q", last.Step, last.Cause, last.Detail, last.Fix, c.step, c.cause, c.detail, c.fix)
	}
}

// pingsWhatIsWell follows ping over both protocols, trusted and not.
func (s *site) pingsWhatIsWell() {
	s.t.Helper()
	mac := s.machines["mac"]
	uris := []string{"ssh://root@mac", "ssh-ng://root@mac", "ssh://nix@mac", "ssh-ng://nix@mac", "cut"}
	reports, code := s.ping("root", uris...)
	if code != 0 || len(reports) != len(uris) {
		s.t.Fatalf("status %d, %d reports: %+v", code, len(reports), reports)
	}
	for i, r := range reports {
		var steps []string
		for _, step := range r.Steps {
			steps = append(steps, step.Step)
		}
		const want = "ssh config,resolve,connect,handshake,host key,authenticate,open session,find nix,protocol,store,trust"
		if got := strings.Join(steps, ","); r.Machine != uris[i] || !r.OK || got != want {
			s.t.Errorf("%s: ok %v, steps %s", r.Machine, r.OK, got)
		}
	}
	for i, want := range []map[string]string{
		{"protocol": "serve protocol 2.7", "trust": "trusted (says its nix-daemon, Nix " + mac.NixVersion() + ")"},
		{"protocol": "worker protocol 1.38, Nix " + mac.NixVersion(), "trust": "trusted", "open session": "nix-daemon --stdio"},
		{"trust": "the user is not trusted there (says its nix-daemon"},
		{"trust": "the user is not trusted there: what follows from derivations is built"},
		{
			"ssh config": "root@cut:22", "handshake": "SSH-2.0-OpenSSH", "host key": "ssh-ed25519 SHA256:",
			"authenticate": `as user "root" with /root/.ssh/id_ed25519 (SHA256:`,
		},
	} {
		for step, begin := range want {
			if got := reports[i].detail(step); !strings.HasPrefix(got, begin) {
				s.t.Errorf("%s: %s: %q, want %q", uris[i], step, got, begin)
			}
		}
	}
	if got := reports[4].detail("host key"); !strings.Contains(got, ", known from /root/.ssh/known_hosts:") {
		s.t.Errorf("host key: %q", got)
	}
	if last := reports[2].last(); last.Verdict != "warning" || last.Cause != "user not trusted" || !strings.Contains(last.Fix, "trusted-users") {
		s.t.Errorf("not trusted: %+v", last)
	}
}

// pingsAsCaller has alice, whom the daemon does not serve, try a machine with a key
// of her own: not root's daemon goes there, but she does.
func (s *site) pingsAsCaller() {
	s.t.Helper()
	mac := s.machines["mac"]
	key := s.run("cat", "/root/other.pub")
	s.onHost(mac, "echo "+shellWord(key)+" >>/home/alice/.ssh/authorized_keys")
	config := "Match exec \"id -un >>/home/alice/who\"\n  IdentitiesOnly yes\n"
	if err := s.client.WriteFile("/home/alice/.ssh/config", []byte(config), 0o644); err != nil {
		s.t.Fatal(err)
	}
	uri := "ssh-ng://alice@mac?ssh-key=/home/alice/my-key"
	reports, code := s.ping("alice", uri, "mac")
	if code != 3 || !reports[0].OK || reports[0].By != "caller" || !strings.Contains(reports[0].detail("authenticate"), "with /home/alice/my-key (SHA256:") {
		s.t.Errorf("alice: status %d, %+v", code, reports[0])
	}
	if r := reports[1]; r.OK || !strings.Contains(r.Error, "permission denied") {
		s.t.Errorf("the daemon's machine for alice: %+v", r)
	}
	who, err := s.client.ReadFile("/home/alice/who")
	if err != nil || strings.Trim(string(who), "alice\n") != "" || len(who) == 0 {
		s.t.Errorf("her ssh configuration was read by %q (%v)", who, err)
	}
	if strings.Contains(s.daemon.log.String(), "my-key") {
		s.t.Error("the daemon had to do with it")
	}
	// So does root, whose daemon does not know the URI.
	if reports, code := s.ping("root", "ssh://root@mac?max-connections=2"); code != 0 || reports[0].By != "caller" {
		s.t.Errorf("root: status %d, %+v", code, reports)
	}
	if reports, code := s.ping("root", "no-such-machine", "ssh://mac?x", "http://mac"); code != 2 || reports[0].Error == "" || len(reports[2].Steps) != 0 {
		s.t.Errorf("what is no machine: status %d, %+v", code, reports)
	}
}
