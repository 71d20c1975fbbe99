package sshpool

import (
	"encoding/pem"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
	xknownhosts "golang.org/x/crypto/ssh/knownhosts"

	"nixdispatch/sshpool/sshtest"
)

// matchPlainly is matchPattern in the simplest way there is.
func matchPlainly(pattern, s string) bool {
	switch {
	case pattern == "":
		return s == ""
	case pattern[0] == '*':
		return matchPlainly(pattern[1:], s) || s != "" && matchPlainly(pattern, s[1:])
	default:
		return s != "" && (pattern[0] == '?' || pattern[0] == s[0]) && matchPlainly(pattern[1:], s[1:])
	}
}

func FuzzMatchPattern(f *testing.F) {
	f.Add("*.example.org", "a.example.org")
	f.Add("a*b?c**", "aXbYcZ")
	f.Add("[mac]:*", "[mac]:22")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if len(pattern) > 12 || len(s) > 12 {
			return // the simplest way takes for ever
		}
		if got, want := matchPattern(pattern, s), matchPlainly(pattern, s); got != want {
			t.Errorf("matchPattern(%q, %q) = %v", pattern, s, got)
		}
	})
}

// A name is found again in its hash, another is not, and no text breaks it.
func FuzzMatchHosts(f *testing.F) {
	f.Add("mac,pc", "mac")
	f.Add("|1|a|b", "mac")
	f.Add("!mac,*", "[mac]:22")
	f.Fuzz(func(t *testing.T, field, name string) {
		_, _ = matchHosts(field, name)
		hashed := xknownhosts.HashHostname(name)
		if ok, err := matchHosts(hashed, name); !ok || err != nil {
			t.Errorf("%q is not found in %q: %v", name, hashed, err)
		}
		if ok, _ := matchHosts(hashed, name+"x"); ok {
			t.Errorf("%q is found in %q", name+"x", hashed)
		}
		if ok, _ := matchHosts("!"+strings.ToLower(name)+",*", strings.ToLower(name)); ok && !strings.ContainsAny(name, ",|!*?") {
			t.Errorf("%q is found where it is excluded", name)
		}
	})
}

// The public half in front of a private key is that key's, whatever follows.
func FuzzPublicOfPrivate(f *testing.F) {
	signer := sshtest.NewKey()
	head := func(public []byte) []byte {
		return append([]byte("openssh-key-v1\x00"), ssh.Marshal(struct {
			Cipher, KDF, KDFOptions string
			Keys                    uint32
			Public                  []byte
		}{"none", "none", "", 1, public})...)
	}
	f.Add(head(signer.PublicKey().Marshal()))
	f.Add(head(nil))
	f.Add([]byte("openssh-key-v1\x00\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, text []byte) {
		key := publicOfPrivate(pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: text}))
		if key != nil {
			if again, err := ssh.ParsePublicKey(key.Marshal()); err != nil || !sameKey(again, key) {
				t.Errorf("%q: key %s does not survive being written and read: %v", text, describe(key), err)
			}
		}
		whole := head(signer.PublicKey().Marshal())
		key = publicOfPrivate(pem.EncodeToMemory(&pem.Block{Type: "OPENSSH PRIVATE KEY", Bytes: append(whole, text...)}))
		if key == nil || !sameKey(key, signer.PublicKey()) {
			t.Errorf("followed by %q the key is not found", text)
		}
	})
}

// Words with every odd character escaped come back as they were.
func FuzzSplitArguments(f *testing.F) {
	f.Add("a b", "c'd")
	f.Add("\\", "\"")
	f.Fuzz(func(t *testing.T, one, two string) {
		_, _ = splitArguments(one)
		escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`, `'`, `\'`)
		text := `"` + escape.Replace(one) + "\"\t '" + escape.Replace(two) + "' "
		if words, err := splitArguments(text); err != nil || len(words) != 2 || words[0] != one || words[1] != two {
			t.Errorf("%q is split into %q, %v", text, words, err)
		}
	})
}
