package sshpool

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"nixdispatch/sshpool/sshtest"
)

// A krlBench makes keys, certificates and lists with ssh-keygen.
type krlBench struct {
	t   *testing.T
	dir string
}

func (b *krlBench) keygen(args ...string) {
	b.t.Helper()
	cmd := exec.Command("ssh-keygen", args...)
	cmd.Dir = b.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		b.t.Fatalf("ssh-keygen %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// cert makes a key and a host certificate for it.
func (b *krlBench) cert(name, authority, id, serial string) {
	b.t.Helper()
	b.keygen("-q", "-t", "ed25519", "-N", "", "-f", name)
	b.keygen("-q", "-h", "-s", authority, "-I", id, "-z", serial, "-n", "mac", name+".pub")
}

func (b *krlBench) public(file string) ssh.PublicKey {
	b.t.Helper()
	text, err := os.ReadFile(filepath.Join(b.dir, file))
	if err != nil {
		b.t.Fatal(err)
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(text)
	if err != nil {
		b.t.Fatal(err)
	}
	return key
}

// What ssh-keygen puts into a list, and says is in it, is found.
func TestRevocationListsOfSSHKeygen(t *testing.T) {
	t.Parallel()
	sshtest.RequireSSH(t)
	b := &krlBench{t, t.TempDir()}
	for _, name := range []string{"ca", "other-ca", "plain"} {
		b.keygen("-q", "-t", "ed25519", "-N", "", "-f", name)
	}
	b.keygen("-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", "rsa")
	b.cert("c5", "ca", "five", "5")
	b.cert("c15", "ca", "fifteen", "15")
	b.cert("c900", "ca", "nine hundred", "900")
	b.cert("c0", "ca", "zero", "0")
	b.cert("o5", "other-ca", "five", "5")
	keys := []string{"plain.pub", "rsa.pub", "c5.pub", "ca.pub", "c5-cert.pub", "c15-cert.pub", "c900-cert.pub", "c0-cert.pub", "o5-cert.pub"}
	key := func(name string) string { return strings.TrimSpace(keyLine(b.public(name))) }
	for _, tt := range []struct{ name, spec string }{
		{"nothing", "# nothing"},
		{"a key", "key: " + key("plain.pub")},
		{"the key in a certificate", "key: " + key("c5.pub")},
		{"an authority", "key: " + key("ca.pub")},
		{"a fingerprint, SHA-1", "sha1: " + key("rsa.pub")},
		{"a fingerprint, SHA-256", "sha256: " + key("rsa.pub")},
		{"a serial number", "serial: 5"},
		{"a range", "serial: 10-20"},
		{"many numbers", "serial: 1\nserial: 3\nserial: 5\nserial: 8\nserial: 12\nserial: 15\nserial: 17-23\nserial: 900"},
		{"a key id", "id: zero"},
		{"all of it", "serial: 15\nid: five\nkey: " + key("plain.pub") + "\nsha256: " + key("rsa.pub")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := &krlBench{t, b.dir}
			writeFile(t, filepath.Join(b.dir, "spec"), tt.spec+"\n")
			b.keygen("-q", "-k", "-f", "list", "-s", "ca.pub", "spec")
			text, err := os.ReadFile(filepath.Join(b.dir, "list"))
			if err != nil {
				t.Fatal(err)
			}
			if !isRevocationList(text) {
				t.Fatalf("ssh-keygen made %q", text)
			}
			list, err := parseRevocationList(text)
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range keys {
				query := exec.Command("ssh-keygen", "-Q", "-f", "list", name)
				query.Dir = b.dir
				out, err := query.CombinedOutput()
				if want := err != nil; list.revokes(b.public(name)) != want {
					t.Errorf("%s: revoked %v; but ssh-keygen -Q: %s", name, !want, out)
				}
			}
			for n := range len(text) {
				if _, err := parseRevocationList(text[:n]); err == nil && n < len(text)-1 && !atSection(text, n) {
					t.Errorf("the first %d of %d bytes are taken for a list", n, len(text))
				}
			}
		})
	}
}

// atSection tells whether a list may end after n bytes: where a section does.
func atSection(text []byte, n int) bool {
	const head = 8 + 4 + 3*8
	at := head
	for range 2 { // reserved, comment
		at += 4 + int(be32(text[at:]))
	}
	for at < n {
		at += 5 + int(be32(text[at+1:]))
	}
	return at == n
}

func be32(p []byte) uint32 {
	return uint32(p[0])<<24 | uint32(p[1])<<16 | uint32(p[2])<<8 | uint32(p[3])
}

func TestRevocationListsThatAreNotUnderstood(t *testing.T) {
	t.Parallel()
	list := func(version uint32, sections string) []byte {
		return append(ssh.Marshal(struct {
			Version             uint32
			Number, Date, Flags uint64
			Reserved, Comment   string
		}{Version: version}), sections...)
	}
	ext := func(critical bool) string {
		return string(ssh.Marshal(struct {
			Kind byte
			Data string
		}{krlExtension, string(ssh.Marshal(struct {
			Name     string
			Critical bool
			Contents string
		}{"new@example.org", critical, "x"}))}))
	}
	for _, tt := range []struct {
		name string
		text []byte
		want string
	}{
		{"a later version", list(2, ""), "version 2"},
		{"a section of another kind", list(1, "\x04\x00\x00\x00\x00"), "section 4"},
		{"an extension that matters", list(1, ext(true)), `the extension "new@example.org"`},
		{"an extension that may be passed over", list(1, ext(false)), ""},
		{"a length beyond the end", list(1, "\x02\xff\xff\xff\xff"), "cut short"},
	} {
		_, err := parseRevocationList(append([]byte(krlMagic), tt.text...))
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: error %v, want %q", tt.name, err, tt.want)
		}
	}
}

func FuzzParseRevocationList(f *testing.F) {
	f.Add([]byte(krlMagic))
	f.Add([]byte(krlMagic + "\x00\x00\x00\x01" + strings.Repeat("\x00", 32) + "\x01\x00\x00\x00\x0d\x00\x00\x00\x00\x00\x00\x00\x00\x20\x00\x00\x00\x00"))
	f.Add([]byte(krlMagic + "\x00\x00\x00\x01" + strings.Repeat("\x00", 32) + "\x02\x00\x00\x00\x05\x00\x00\x00\x01a"))
	key := sshtest.NewKey().PublicKey()
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := parseRevocationList(text)
		if err != nil {
			return
		}
		_ = list.revokes(key)
		_ = list.revokes(&ssh.Certificate{Key: key, SignatureKey: key, Serial: 7, KeyId: "a"})
	})
}
