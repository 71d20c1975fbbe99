package sshpool

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"nixdispatch/sshpool/sshtest"
)

// startAgent serves an agent on a socket and returns the socket's name.
func startAgent(t *testing.T, keys ...agent.AddedKey) string {
	t.Helper()
	ring := agent.NewKeyring()
	for _, k := range keys {
		if err := ring.Add(k); err != nil {
			t.Fatal(err)
		}
	}
	return serveAgent(t, ring)
}

func serveAgent(t *testing.T, ring agent.Agent) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "agent")
	l, err := net.Listen("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				agent.ServeAgent(ring, c)
			}()
		}
	}()
	return name
}

func newAgentKey(t *testing.T, comment string) agent.AddedKey {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return agent.AddedKey{PrivateKey: private, Comment: comment}
}

func authorizedLine(t *testing.T, key agent.AddedKey) string {
	t.Helper()
	signer, err := ssh.NewSignerFromKey(key.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return keyLine(signer.PublicKey())
}

func testUser(t testing.TB) *localUser {
	t.Helper()
	me, err := currentUser()
	if err != nil {
		t.Fatal(err)
	}
	return me
}

// offers returns what would be offered, without fingerprints, and what not.
func offers(t *testing.T, cfg Config) (offered, unused string) {
	t.Helper()
	return offersOf(plainTarget(cfg, testUser(t)))
}

func offersOf(target *Target) (offered, unused string) {
	ids := loadIdentities(target, time.Now().Add(2*time.Minute))
	defer ids.close()
	var names []string
	for _, o := range ids.offered {
		name, _, _ := strings.Cut(o, " (SHA256:")
		names = append(names, name)
	}
	return strings.Join(names, "; "), strings.Join(ids.unused, "; ")
}

func TestOrderOfIdentities(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, args ...string) string {
		path := filepath.Join(dir, name)
		sshtest.Keygen(t, path, append(args, "-t", "ed25519")...)
		return path
	}
	one, two, locked, inAgent := file("one"), file("two"), file("locked", "-N", "secret", "-a", "1"), file("inAgent", "-N", "secret", "-a", "1")
	pem, err := os.ReadFile(inAgent)
	if err != nil {
		t.Fatal(err)
	}
	unlocked, err := ssh.ParseRawPrivateKeyWithPassphrase(pem, []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	socket := startAgent(t, newAgentKey(t, "laptop"), agent.AddedKey{PrivateKey: unlocked, Comment: "unlocked"})
	missing, garbage := filepath.Join(dir, "missing"), filepath.Join(dir, "garbage")
	if err := os.WriteFile(garbage, []byte("no key"), 0o600); err != nil {
		t.Fatal(err)
	}

	tests := []struct {
		name    string
		files   []string
		agent   string
		offered string
		unused  []string
	}{
		{"files in their order", []string{two, one}, "none", two + "; " + one, nil},
		{"a file twice", []string{one, one}, "none", one, nil},
		{"agent before the files", []string{one}, socket, `agent key "laptop"; agent key "unlocked"; ` + one, nil},
		{"agent for a file", []string{one, inAgent}, socket, inAgent + ` from the agent; agent key "laptop"; ` + one, nil},
		{"passphrase", []string{locked, one}, "none", one, []string{locked + ": has a passphrase: load it into an agent (ssh-add " + locked + ")"}},
		{"missing file", []string{missing, one}, "none", one, []string{"no such file"}},
		{"no key", []string{garbage}, "none", "", []string{garbage + ": ssh: no key found"}},
		{"no agent at the socket", []string{one}, missing, one, []string{"agent: dial unix " + missing}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			offered, unused := offers(t, Config{IdentityFiles: tt.files, AgentSocket: tt.agent})
			if offered != tt.offered {
				t.Errorf("offers %s, want %s", offered, tt.offered)
			}
			if len(tt.unused) == 0 && unused != "" {
				t.Errorf("cannot use %s", unused)
			}
			for _, want := range tt.unused {
				if !strings.Contains(unused, want) {
					t.Errorf("cannot use %q, want %q", unused, want)
				}
			}
		})
	}

	t.Run("agent from the environment, before default files", func(t *testing.T) {
		t.Setenv("SSH_AUTH_SOCK", socket)
		if offered, _ := offers(t, Config{}); !strings.HasPrefix(offered, `agent key "laptop"; agent key "unlocked"`) {
			t.Errorf("offers %s", offered)
		}
	})
}

func TestLoginWithSSHD(t *testing.T) {
	d := sshtest.StartSSHD(t)
	t.Log(d.Version)
	dir := t.TempDir()
	authorized := func(keyType string) string {
		name := filepath.Join(dir, keyType)
		d.Authorize(t, sshtest.Keygen(t, name, "-t", keyType))
		return name
	}
	agentKey := newAgentKey(t, "laptop")
	d.Authorize(t, authorizedLine(t, agentKey))
	socket := startAgent(t, agentKey)
	stranger := filepath.Join(dir, "stranger")
	sshtest.Keygen(t, stranger, "-t", "ed25519")

	for _, tt := range []struct {
		name  string
		files []string
		agent string
	}{
		{"ed25519", []string{d.Identity}, "none"},
		{"ecdsa", []string{authorized("ecdsa")}, "none"},
		{"rsa", []string{authorized("rsa")}, "none"},
		{"agent", []string{stranger}, socket},
		{"second file", []string{stranger, d.Identity}, "none"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := sshdConfig(d)
			cfg.IdentityFiles, cfg.AgentSocket = tt.files, tt.agent
			h := upHost(t, Options{}, cfg)
			if err := mustSession(t, h, "true").Wait(); err != nil {
				t.Error(err)
			}
		})
	}

	t.Run("refused", func(t *testing.T) {
		cfg := sshdConfig(d)
		cfg.IdentityFiles = []string{stranger, filepath.Join(dir, "missing")}
		p := New(Options{})
		defer p.Close()
		h := p.Add(cfg)
		st := awaitStatus(t, h, "down", func(st Status) bool { return st.State == Down })
		e := mustBe[*ConnectError](t, "LastError", st.LastError)
		for _, want := range []string{
			"ssh://mac: authenticate: as user", "offered " + stranger + " (SHA256:",
			"not usable: " + filepath.Join(dir, "missing") + ": ", "unable to authenticate",
		} {
			if !strings.Contains(e.Error(), want) {
				t.Errorf("error %q, want %q in it", e, want)
			}
		}
		if e.Step != StepAuthenticate || errors.Is(e, ErrClosed) {
			t.Errorf("LastError: %+v", e)
		}
	})
}
