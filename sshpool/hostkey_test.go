package sshpool

import (
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	xknownhosts "golang.org/x/crypto/ssh/knownhosts"

	"nixdispatch/sshpool/sshtest"
)

func keyLine(key ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

// targetAt is the target of a host at host:port.
func targetAt(t testing.TB, cfg Config, addr string) *Target {
	t.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Host = host
	if cfg.Port, err = strconv.Atoi(port); err != nil {
		t.Fatal(err)
	}
	return plainTarget(cfg, testUser(t))
}

func hostCertificate(t *testing.T, ca ssh.Signer, key ssh.PublicKey, host string) ssh.PublicKey {
	t.Helper()
	cert := &ssh.Certificate{
		Key: key, CertType: ssh.HostCert, ValidPrincipals: []string{host},
		ValidBefore: ssh.CertTimeInfinity,
	}
	if err := cert.SignCert(rand.Reader, ca); err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestKnownHosts(t *testing.T) {
	good, other, ca := sshtest.NewKey(), sshtest.NewKey(), sshtest.NewKey()
	rsaPrivate, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := ssh.NewPublicKey(&rsaPrivate.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	goodLine, otherLine, caLine := keyLine(good.PublicKey()), keyLine(other.PublicKey()), keyLine(ca.PublicKey())
	cert := hostCertificate(t, ca, good.PublicKey(), "mac")

	tests := []struct {
		name  string
		addr  string        // "" means mac:22
		files []string      // contents; "missing" is not written
		key   ssh.PublicKey // nil means good
		want  string        // in the error; "" means accepted; FILEn is a file's name
		first string        // algorithm to ask for first, if any
		warn  int           // lines ignored
	}{
		{name: "known", files: []string{"mac " + goodLine}, first: "ssh-ed25519"},
		{name: "comment and blank lines", files: []string{"# mac\n\nmac " + goodLine + " me@here\n"}},
		{name: "hashed", files: []string{xknownhosts.HashHostname("mac") + " " + goodLine}},
		{name: "one of several names", files: []string{"pc,mac,10.0.0.1 " + goodLine}},
		{name: "pattern", addr: "a.example.org:22", files: []string{"*.example.org " + goodLine}},
		{name: "pattern that excludes it", addr: "a.example.org:22", files: []string{"*.example.org,!a.example.org " + goodLine}, want: "is not known"},
		{name: "port", addr: "mac:2222", files: []string{"[mac]:2222 " + goodLine}},
		{name: "other port", addr: "mac:2222", files: []string{"[mac]:2223 " + goodLine}, want: `is not known: "[mac]:2222" is not in FILE0`},
		{name: "known without its port", addr: "mac:2222", files: []string{"mac " + goodLine}, first: "ssh-ed25519"},
		{name: "other key known without its port", addr: "mac:2222", files: []string{"mac " + otherLine}, want: "is not known"},
		{name: "address", addr: "[2001:db8::1]:22", files: []string{"2001:db8::1 " + goodLine}},
		{name: "unknown", files: []string{"pc " + goodLine}, want: `is not known: "mac" is not in FILE0`},
		{name: "no files", files: []string{"missing", "missing"}, want: `"mac" is not in FILE0, FILE1`},
		{name: "in the second file", files: []string{"pc " + otherLine, "mac " + goodLine}},
		{name: "first file missing", files: []string{"missing", "mac " + goodLine}},
		{name: "two keys", files: []string{"mac " + otherLine + "\nmac " + goodLine}},
		{name: "changed", files: []string{"pc " + goodLine + "\n\nmac " + otherLine}, want: "has changed: it is now ssh-ed25519 SHA256:"},
		{name: "changed, place", files: []string{"pc " + goodLine + "\n\nmac " + otherLine}, want: "expected the key at FILE0:3"},
		{name: "key of another type", files: []string{"mac " + keyLine(rsaKey)}, want: "has changed", first: "rsa-sha2-512"},
		{name: "rsa", files: []string{"mac " + keyLine(rsaKey)}, key: rsaKey, first: "rsa-sha2-512"},
		{name: "revoked", files: []string{"mac " + goodLine + "\n@revoked * " + goodLine}, want: "is revoked at FILE0:2"},
		{name: "authority", files: []string{"@cert-authority mac " + caLine}, key: cert, first: "ssh-ed25519-cert-v01@openssh.com"},
		{name: "authority for others", files: []string{"@cert-authority pc " + caLine}, key: cert, want: "is not known"},
		{name: "authority's name as the host's", addr: "pc:22", files: []string{"@cert-authority pc " + caLine}, key: cert, want: "is not known"},
		{name: "revoked key in a certificate", files: []string{"@cert-authority mac " + caLine + "\n@revoked * " + goodLine}, key: cert, want: "is revoked at FILE0:2"},
		{name: "revoked authority", files: []string{"@cert-authority mac " + caLine + "\n@revoked mac " + caLine}, key: cert, want: "is revoked at FILE0:2"},
		{name: "damaged lines", files: []string{"mac ssh-ed25519 AAAA\nmac ssh-magic AAAA\nmac\n@what mac " + goodLine + "\nmac " + goodLine}, warn: 4},
		{name: "changed after damaged lines", files: []string{"pc " + goodLine, "nonsense\nmac " + otherLine}, want: "expected the key at FILE1:2", warn: 1},
		{name: "very long line", files: []string{strings.Repeat("x", 1<<20) + "\nmac " + goodLine}, warn: 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			var names []string
			var replace []string
			for i, text := range tt.files {
				name := filepath.Join(dir, "known_hosts"+string(rune('0'+i)))
				if text != "missing" {
					if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				names = append(names, name)
				replace = append(replace, "FILE"+string(rune('0'+i)), name)
			}
			addr, key := tt.addr, tt.key
			if addr == "" {
				addr = "mac:22"
			}
			if key == nil {
				key = good.PublicKey()
			}
			k, err := loadHostKeys(t.Context(), targetAt(t, Config{KnownHostsFiles: names}, addr), slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			if len(k.warnings) != tt.warn {
				t.Errorf("warnings %q, want %d", k.warnings, tt.warn)
			}
			if tt.first != "" && k.algorithms[0] != tt.first {
				t.Errorf("algorithms %v, want %s first", k.algorithms, tt.first)
			}
			for _, remote := range []net.Addr{&net.TCPAddr{IP: net.IPv4(10, 0, 0, 7), Port: 22}, &net.UnixAddr{}} {
				err = k.check(remote, key)
				want := strings.NewReplacer(replace...).Replace(tt.want)
				if tt.want == "" && err != nil {
					t.Errorf("check: %v", err)
				}
				if tt.want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
					t.Errorf("check: %v, want %q", err, want)
				}
			}
		})
	}
}

// A revoked key is refused whatever would let other keys pass: that it is given, that
// the host is this one, that nothing is strict.
func TestRevocationIsCheckedFirst(t *testing.T) {
	t.Parallel()
	sshtest.RequireSSH(t)
	good, ca := sshtest.NewKey().PublicKey(), sshtest.NewKey()
	cert := hostCertificate(t, ca, good, "mac")
	file := func(text string) string {
		name := filepath.Join(t.TempDir(), "file")
		writeFile(t, name, text+"\n")
		return name
	}
	waivers := map[string]func(*Target){
		"localhost":  func(t *Target) { t.TrustLocalhost = true },
		"not strict": func(t *Target) { t.Strict = StrictOff },
		"given":      func(t *Target) { t.given = []byte(keyLine(good)) },
		"known": func(t *Target) {
			t.OtherKnownHosts = []string{file("mac " + keyLine(good) + "\n@cert-authority mac " + keyLine(ca.PublicKey()))}
		},
	}
	revocations := map[string]func(*Target){
		"nothing":              func(*Target) {},
		"RevokedHostKeys":      func(t *Target) { t.RevokedHostKeys = []string{file(keyLine(good))} },
		"a list":               func(to *Target) { to.RevokedHostKeys = []string{revoking(t, keyLine(good))} },
		"@revoked":             func(t *Target) { t.UserKnownHosts = []string{file("@revoked mac " + keyLine(good))} },
		"@revoked, everywhere": func(t *Target) { t.OtherKnownHosts = append(t.OtherKnownHosts, file("@revoked * "+keyLine(good))) },
	}
	for waiver, waive := range waivers {
		for revocation, revoke := range revocations {
			for kind, key := range map[string]ssh.PublicKey{"key": good, "certificate": cert} {
				if waiver == "given" && kind == "certificate" && revocation == "nothing" {
					continue // what is given is a key
				}
				to := targetAt(t, Config{KnownHostsFiles: []string{os.DevNull}}, "mac:22")
				waive(to)
				revoke(to)
				k, err := loadHostKeys(t.Context(), to, slog.New(slog.DiscardHandler))
				if err != nil {
					t.Fatal(err)
				}
				err = k.check(&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 22}, key)
				refused, ok := errors.AsType[*hostKeyError](err)
				if revocation == "nothing" && err != nil || revocation != "nothing" && (!ok || refused.cause != CauseHostKeyRevoked) {
					t.Errorf("%s, %s revoked by %s: %v", waiver, kind, revocation, err)
				}
			}
		}
	}
}

func TestGivenHostKeys(t *testing.T) {
	good, other := sshtest.NewKey().PublicKey(), sshtest.NewKey().PublicKey()
	tests := []struct {
		name, text string
		load, want string // in the errors; "" means none
	}{
		{name: "one", text: keyLine(good)},
		{name: "comment and newline", text: keyLine(good) + " root@mac\n"},
		{name: "several", text: keyLine(other) + "\n# and\n\n" + keyLine(good) + "\n"},
		{name: "another", text: keyLine(other), want: "is not the one given for it"},
		{name: "nothing", text: "\n", load: "no key in it"},
		{name: "one word", text: "ssh-ed25519", load: "expected a type and a key"},
		{name: "no base64", text: "ssh-ed25519 !", load: "illegal base64"},
		{name: "no key", text: "ssh-ed25519 AAAA", load: "given host key"},
		{name: "wrong type", text: "ssh-rsa " + strings.Fields(keyLine(good))[1], load: `it is of type "ssh-ed25519"`},
		{name: "revoked", text: "@revoked * " + keyLine(good), load: "given host key"},
		{name: "with a host", text: "mac " + keyLine(good), load: "given host key"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			k, err := loadHostKeys(t.Context(), targetAt(t, Config{HostKey: []byte(tt.text)}, "mac:22"), slog.New(slog.DiscardHandler))
			if tt.load != "" {
				if err == nil || !strings.Contains(err.Error(), tt.load) {
					t.Errorf("load: %v, want %q", err, tt.load)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			err = k.check(&net.TCPAddr{}, good)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("check: %v, want %q", err, tt.want)
			}
		})
	}
}

// A host with several keys must be asked for the one that is known.
func TestKnownKeyOfSeveralWithSSHD(t *testing.T) {
	d := sshtest.StartSSHD(t)
	for i, line := range d.HostKeys() {
		known := filepath.Join(t.TempDir(), "known_hosts")
		if err := os.WriteFile(known, []byte(d.KnownHosts(i)), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg := sshdConfig(d)
		cfg.HostKey, cfg.KnownHostsFiles = nil, []string{known}
		h := upHost(t, Options{}, cfg)
		if err := mustSession(t, h, "true").Wait(); err != nil {
			t.Errorf("with only %s known: %v", line, err)
		}
	}
}

func FuzzParseHostKeys(f *testing.F) {
	key := keyLine(sshtest.NewKey().PublicKey())
	f.Add([]byte(key))
	f.Add([]byte(key + " comment\n#\n" + key))
	f.Add([]byte("mac " + key))
	f.Fuzz(func(t *testing.T, text []byte) {
		keys, err := parseHostKeys(text)
		if (err == nil) != (len(keys) > 0) {
			t.Fatalf("parseHostKeys(%q) = %v, %v", text, keys, err)
		}
		for _, k := range keys {
			again, err := parseHostKeys(ssh.MarshalAuthorizedKey(k))
			if err != nil || len(again) != 1 || !slices.Equal(again[0].Marshal(), k.Marshal()) {
				t.Errorf("%q: key does not survive being written and read: %v", text, err)
			}
		}
	})
}

// Whatever else is in a known_hosts file, a good line in it counts.
func FuzzKnownHosts(f *testing.F) {
	key := sshtest.NewKey().PublicKey()
	line := "\nmac " + keyLine(key) + "\n"
	f.Add([]byte("mac ssh-ed25519 AAAA"))
	f.Add([]byte("|1|x|y ssh-ed25519 AAAA\n[mac:22 " + keyLine(key) + "\n! " + keyLine(key)))
	f.Add([]byte("@cert-authority * " + keyLine(key)))
	f.Add([]byte("@revoked * " + keyLine(sshtest.NewKey().PublicKey())))
	f.Fuzz(func(t *testing.T, text []byte) {
		name := filepath.Join(t.TempDir(), "known_hosts")
		if err := os.WriteFile(name, append(text, line...), 0o600); err != nil {
			t.Fatal(err)
		}
		k, err := loadHostKeys(t.Context(), targetAt(t, Config{KnownHostsFiles: []string{name}}, "mac:22"), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		if err := k.check(&net.TCPAddr{}, key); err != nil && !strings.Contains(string(text), "@revoked") {
			t.Errorf("%q: %v", text, err)
		}
	})
}
