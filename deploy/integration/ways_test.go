package integration

import (
	"encoding/base64"
	"strings"
	"syscall"
	"testing"

	"nixdispatch/deploy/fleet"
)

// keySite is a site with one machine and, on the client, a second key that lets
// in as bob.
func keySite(t *testing.T, features []string) *site {
	const paths = "sandbox-paths = /bin /usr /lib /lib64\n"
	s := newSite(t, siteConfig{
		jobs:     1, // for the machines that are the client itself
		nixConf:  paths + "system-features = " + strings.Join(features, " ") + "\n",
		machines: []machineConfig{{name: "mac", host: fleet.HostConfig{NixConf: paths, SystemFeatures: features}}},
	})
	_, err := s.client.Run(t.Context(), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/root/second")
	if err != nil {
		t.Fatal(err)
	}
	key, err := s.client.ReadFile("/root/second.pub")
	if err != nil {
		t.Fatal(err)
	}
	mac := s.machines["mac"]
	if err := mac.WriteFile("/home/bob/.ssh/authorized_keys", key, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := mac.WriteFile("/usr/local/bin/other-nix-store", []byte("#!/bin/sh\necho ran >> /srv/other\nexec nix-store \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	hosts, err := s.client.ReadFile("/etc/hosts")
	if err != nil {
		t.Fatal(err)
	}
	s.write("/etc/hosts", string(hosts)+mac.Addr()+" stranger\n")
	return s
}

func TestWaysToReachAMachine(t *testing.T) {
	t.Parallel()
	ways := []struct {
		name, uri, key, hostKey string
		refused                 []string // words of the reason; nil if it is let in
	}{
		// PIN stands for the machine's host key, WRONG for another.
		{name: "unknown-host", uri: "ssh://root@stranger", refused: []string{"host key", "known_hosts"}},
		{name: "pinned", uri: "ssh-ng://root@stranger", hostKey: "PIN"},
		{name: "wrong-pin", uri: "ssh-ng://root@mac", hostKey: "WRONG", refused: []string{"host key"}},
		{name: "pin-in-uri", uri: "ssh://nix@stranger?base64-ssh-public-host-key=PIN"},
		{name: "key-refused", uri: "ssh://bob@mac", refused: []string{"bob", "authenticate"}},
		{name: "key-in-uri", uri: "ssh://bob@mac?ssh-key=/root/second"},
		{name: "key-in-column", uri: "ssh-ng://bob@mac", key: "/root/second"},
		// As ssh does, a key that is not there is told of and the others are tried.
		{name: "key-not-there", uri: "ssh://bob@mac?ssh-key=/root/third", refused: []string{"/root/third"}},
		{name: "another-key", uri: "ssh://root@mac?ssh-key=/root/third"},
		{name: "program", uri: "ssh://root@mac?remote-program=/usr/local/bin/other-nix-store"},
		{name: "store", uri: "ssh://root@mac?remote-store=/srv/store"},
		{name: "localhost", uri: "ssh://localhost?remote-store=/srv/local"},
		{name: "localhost-ng", uri: "ssh-ng://localhost?remote-store=/srv/local-ng"},
	}
	names := make([]string, len(ways))
	for n, w := range ways {
		names[n] = w.name
	}
	s := keySite(t, names)
	keys := strings.NewReplacer(
		"PIN", base64.RawStdEncoding.EncodeToString([]byte(s.machines["mac"].HostKey())),
		"WRONG", base64.RawStdEncoding.EncodeToString([]byte(s.client.HostKey())))
	var lines strings.Builder
	for n, w := range ways {
		ways[n].uri = keys.Replace(w.uri)
		columns := []string{w.uri, "x86_64-linux", w.key, "1", "1", "-", w.name, w.hostKey}
		for i, c := range columns {
			if c == "" {
				columns[i] = "-"
			}
		}
		lines.WriteString(keys.Replace(strings.Join(columns, " ")) + "\n")
	}
	s.stopDaemon(syscall.SIGTERM)
	s.write("/etc/nix/machines", lines.String())
	s.startDaemon()
	status := s.status()
	for n, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			s := s.within(t)
			m := status.Machines[n]
			if m.URI != w.uri {
				t.Fatalf("machine %d is %s", n, m.URI)
			}
			if w.refused != nil {
				if m.State != "down" {
					t.Errorf("state %q, want down", m.State)
				}
				for _, want := range w.refused {
					if !strings.Contains(m.Reason, want) {
						t.Errorf("reason %q, want %q in it", m.Reason, want)
					}
				}
				return
			}
			if m.State != "up" {
				t.Fatalf("state %q: %s", m.State, m.Reason)
			}
			out, err := s.nixBuild("alice", shell(w.name, "echo "+w.name+" > $out", features(w.name)))
			if err != nil {
				t.Fatalf("nix-build: %v\n%s", err, out.Stderr)
			}
			if builtOn(out.Stderr)[w.uri] != 1 {
				t.Errorf("built on %v, want %s", builtOn(out.Stderr), w.uri)
			}
			path := strings.TrimSpace(out.Stdout)
			s.verify(path)
			s.contents(path, w.name+"\n")
			s.wayTaken(w.name, path)
		})
	}
}

// wayTaken checks the traces that some ways leave.
func (s *site) wayTaken(name, path string) {
	t := s.t
	t.Helper()
	find := func(h *fleet.Host, file string) {
		t.Helper()
		if _, err := h.ReadFile(file); err != nil {
			t.Errorf("no trace on %s: %v", h.Name(), err)
		}
	}
	switch name {
	case "program":
		find(s.machines["mac"], "/srv/other")
	case "store":
		find(s.machines["mac"], "/srv/store"+path)
	case "localhost":
		find(s.client, "/srv/local"+path)
	case "localhost-ng":
		find(s.client, "/srv/local-ng"+path)
	}
}
