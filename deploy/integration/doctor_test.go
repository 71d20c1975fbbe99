package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"nixdispatch/deploy/fleet"
)

// doctor runs nix-dispatch doctor as a user and returns its findings by subject,
// each in a line that begins with its level.
func (s *site) doctor(user string) (findings map[string]string, ok bool) {
	s.t.Helper()
	out, err := s.client.RunAs(s.t.Context(), user, programs+"/nix-dispatch", "doctor", "--json")
	var got struct {
		OK       bool
		Findings []struct{ Level, Subject, Text, Fix string }
	}
	if jsonErr := json.Unmarshal([]byte(out.Stdout), &got); jsonErr != nil || got.OK != (err == nil) {
		s.t.Fatalf("doctor: %v, %v, printed %q and said %q", err, jsonErr, out.Stdout, out.Stderr)
	}
	findings = make(map[string]string)
	for _, f := range got.Findings {
		findings[f.Subject] += fmt.Sprintf("%s: %s; %s\n", f.Level, f.Text, f.Fix)
	}
	return findings, got.OK
}

// found compares findings: each wanted text is in what is said of its subject.
func (s *site) found(got map[string]string, want map[string][]string) {
	s.t.Helper()
	for subject, texts := range want {
		for _, text := range texts {
			if !strings.Contains("\n"+got[subject], "\n"+text) {
				s.t.Errorf("%s: said %q, want %q", subject, got[subject], text)
			}
		}
	}
}

// TestDoctor has the doctor look at a host where all is well, and at one where much
// is not, with the Nix versions that differ in what they make of build-hook.
func TestDoctor(t *testing.T) {
	t.Parallel()
	has := func(features ...string) fleet.HostConfig { return fleet.HostConfig{SystemFeatures: features} }
	// Trixie's Nix is the one that looks for the hook elsewhere.
	for _, suite := range shortOr([]string{fleet.Trixie}, suites) {
		t.Run(suite, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, siteConfig{client: suite, machines: []machineConfig{
				{name: "mac", suite: fleet.Sid, columns: "x86_64-linux - 2 1 kvm", host: has("kvm", "big")},
				{name: "old", suite: fleet.Bookworm, scheme: "ssh-ng", columns: "x86_64-linux,i686-linux - 2 1 big", host: has("big")},
				{name: "mid", suite: fleet.Trixie, user: "nix", columns: "x86_64-linux,riscv64-linux - 2 1 kvm big", host: has("big")},
			}})
			// What is said of mid is no fault of this host.
			got, _ := s.doctor("root")
			s.found(got, map[string][]string{
				"nix-dispatchd":     {"ok: "},
				"nix-daemon":        {"ok: Nix " + s.client.NixVersion() + " answers"},
				"socket":            {"ok: only root may use"},
				"trusted-users":     {"ok: nix-dispatchd runs as root"},
				"build-hook":        {"ok: nix-daemon runs " + hookSetting(suite) + " (set by "},
				"root's own builds": {"ok: they run " + hookSetting(suite)},
				"Nix's own hook":    {"ok: "},
				"builders":          {"ok: nix-daemon and nix-dispatchd have the same list (which is the default, @/etc/nix/machines)"},
				"ssh://root@mac":    {"ok: its Nix was reached in "},
				"ssh-ng://root@old": {"ok: its Nix was reached in "},
				"ssh://nix@mid": {
					"ok: its Nix was reached in ", "warning: trust: user not trusted: ",
					"problem: claims: its own Nix does not build for riscv64-linux, which the list says (it does for x86_64-linux",
					"problem: claims: its own Nix has no feature kvm, which the list says, and fails such builds (it has big)",
				},
			})
			for _, uri := range []string{"ssh://root@mac", "ssh-ng://root@old"} {
				if text := got[uri]; !strings.Contains(text, "no less than the list says") || strings.Count(text, "\n") != 1 {
					t.Errorf("%s: %q, want one finding, and its own features known", uri, text)
				}
			}
			s.doctorFindsWhatIsWrong(suite)
		})
	}
}

// doctorFindsWhatIsWrong breaks one thing after the other.
func (s *site) doctorFindsWhatIsWrong(suite string) {
	s.t.Helper()
	mac := s.machines["mac"]
	// A forced command tells nothing, and is no problem.
	key, err := mac.ReadFile("/root/.ssh/authorized_keys")
	if err == nil {
		err = mac.WriteFile("/root/.ssh/authorized_keys", []byte(`command="nix-store --serve --write" `+strings.TrimSpace(string(key))+"\n"), 0o600)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(machinesFile, "ssh://root@mac x86_64-linux - 2 1 kvm\nssh://root@nobody x86_64-linux\nunix:///elsewhere x86_64-linux\n")
	s.mustDispatch("reload")
	s.mustDispatch("drain", "mac")
	// Nix 2.25 to 2.33 look for the hook where others do not.
	conf := "build-hook = " + hookSetting(suite) + "\n"
	s.write("/etc/nix/nix.conf", "experimental-features = nix-command\n"+conf)
	s.write("/root/.config/nix/nix.conf", "")
	// What only nix-daemon's environment says is not what this one's does.
	env := []string{"NIX_CONFIG=builders = ssh://elsewhere", "NIX_DISPATCH_STOCK_HOOK=/nowhere"}
	if err := s.client.RestartNixDaemon(s.t.Context(), fleet.NixDaemon{Env: env}); err != nil {
		s.t.Fatal(err)
	}
	got, ok := s.doctor("root")
	want := map[string][]string{
		"build-hook":        {"ok: nix-daemon runs "},
		"root's own builds": {"ok: they run "},
		"ssh://root@mac":    {"warning: it is drained, since ", "ok: its Nix was reached in "},
		"ssh://root@nobody": {"problem: resolve: "},
		"unix:///elsewhere": {"warning: "},
		"builders": {"warning: nix-daemon's setting (set by NIX_CONFIG in nix-daemon's environment) is not the list that nix-dispatchd serves: " +
			"only Nix has ssh://elsewhere; only nix-dispatchd has ssh://root@mac, ssh://root@nobody; builds go by Nix's"},
		"Nix's own hook": {"warning: what nix-dispatch leaves to it would fail: NIX_DISPATCH_STOCK_HOOK names \"/nowhere\""},
	}
	if suite == fleet.Trixie {
		want["build-hook"] = []string{"problem: /etc/nix/nix.conf sets it, and Nix " + s.client.NixVersion() + " ignores it there; run 'nix-dispatch enable' as root"}
		want["root's own builds"] = []string{"warning: they do not pass nix-daemon"}
	}
	s.found(got, want)
	if ok || !strings.Contains(got["ssh://root@mac"], "own systems and features not known") || strings.Contains(got["ssh://root@mac"], "problem") {
		s.t.Errorf("ok %v; behind a forced command: %q", ok, got["ssh://root@mac"])
	}
	// alice may not ask the daemon, nor see what nix-daemon was started with.
	got, ok = s.doctor("alice")
	s.found(got, map[string][]string{"nix-dispatchd": {"problem: it cannot be asked: dial unix "}, "nix-daemon": {"ok: Nix "}})
	if text := got["build-hook"]; ok || suite == fleet.Trixie && !strings.HasPrefix(text, "warning: not known whether Nix runs nix-dispatch") {
		s.t.Errorf("alice: ok %v, build-hook %q", ok, text)
	}
}
