package nix

import (
	"crypto/sha256"
	"encoding/base64"
	"strings"
	"testing"
	"testing/quick"
)

const testHash = "s66mzxpvicwk07gjbjfw9izjfa797vsw"

func TestParseStorePathAcceptsWhatNixDoes(t *testing.T) {
	for _, tt := range []struct{ path, dir, name string }{
		{"/nix/store/" + testHash + "-hello-2.12.1", "/nix/store", "hello-2.12.1"},
		{"/nix/store/" + testHash + "-x", "/nix/store", "x"},
		{"/nix/store/" + testHash + "-" + strings.Repeat("n", 211), "/nix/store", strings.Repeat("n", 211)},
		{"/s/" + testHash + "-a", "/s", "a"},
		{"/home/me/my store/" + testHash + "-a+b_c?d=E.9", "/home/me/my store", "a+b_c?d=E.9"},
		{"/nix/store/" + testHash + "-.foo", "/nix/store", ".foo"},
		{"/nix/store/" + testHash + "-..foo", "/nix/store", "..foo"},
		{"/nix/store/" + testHash + "-...", "/nix/store", "..."},
		{"/nix/store/" + testHash + "--", "/nix/store", "-"},
	} {
		p, err := ParseStorePath(tt.path)
		if err != nil {
			t.Errorf("ParseStorePath(%q): %v", tt.path, err)
			continue
		}
		if string(p) != tt.path || p.Dir() != tt.dir || p.Name() != tt.name || p.Base() != testHash+"-"+tt.name {
			t.Errorf("ParseStorePath(%q) = %q with Dir %q, Base %q, Name %q", tt.path, p, p.Dir(), p.Base(), p.Name())
		}
	}
}

func TestParseStorePathRefuses(t *testing.T) {
	for _, s := range []string{
		"", "/", "/nix/store", "/nix/store/", testHash + "-x", "store/" + testHash + "-x", "./" + testHash + "-x",
		"/" + testHash + "-x",
		"/nix/store/../" + testHash + "-x", "/nix/store/./" + testHash + "-x", "/nix//store/" + testHash + "-x",
		"//nix/store/" + testHash + "-x",
		"/nix/store/x/../" + testHash + "-x",
		"/nix/store/" + testHash + "-x/", "/nix/store/" + testHash + "-x/bin/x", "/nix/store/" + testHash + "-x/..",
		"/nix/store/" + testHash, "/nix/store/" + testHash + "-", "/nix/store/" + testHash + "Xhello",
		"/nix/store/" + testHash[:31] + "-hello", "/nix/store/" + testHash + "0-hello",
		"/nix/store/" + "e" + testHash[1:] + "-x", "/nix/store/" + "o" + testHash[1:] + "-x",
		"/nix/store/" + "t" + testHash[1:] + "-x", "/nix/store/" + "u" + testHash[1:] + "-x",
		"/nix/store/" + "S" + testHash[1:] + "-x",
		"/nix/store/" + testHash + "-.", "/nix/store/" + testHash + "-..",
		"/nix/store/" + testHash + "-.-foo", "/nix/store/" + testHash + "-..-foo",
		"/nix/store/" + testHash + "-" + strings.Repeat("n", 212),
		"/nix/store/" + testHash + "-a b", "/nix/store/" + testHash + "-a\nb", "/nix/store/" + testHash + "-a\x00",
		"/nix/store/" + testHash + "-ä", "/nix/store/" + testHash + "-a!out", "/nix/store/" + testHash + "-a*",
	} {
		if p, err := ParseStorePath(s); err == nil {
			t.Errorf("ParseStorePath(%q) = %q, want an error", s, p)
		}
	}
}

func TestEmptyStorePathIsNoDerivationAndHasNoName(t *testing.T) {
	if p := StorePath(""); p.Name() != "" || p.IsDerivation() {
		t.Errorf("Name %q, IsDerivation %t", p.Name(), p.IsDerivation())
	}
}

func TestIsDerivation(t *testing.T) {
	for name, want := range map[string]bool{"x.drv": true, ".drv": true, "x.drv-1": false, "drv": false} {
		p, err := ParseStorePath("/nix/store/" + testHash + "-" + name)
		if err != nil {
			t.Fatal(err)
		}
		if p.IsDerivation() != want {
			t.Errorf("IsDerivation(%q) = %t, want %t", p, !want, want)
		}
	}
}

func FuzzParseStorePath(f *testing.F) {
	f.Add("/nix/store/" + testHash + "-hello-2.12.1.drv")
	f.Add("/nix/store/" + testHash + "-..")
	f.Add("//" + testHash + "-a/../b")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParseStorePath(s)
		if err != nil {
			return
		}
		if string(p) != s || p.Dir()+"/"+p.Base() != s || p.Base()[:32]+"-"+p.Name() != p.Base() {
			t.Errorf("parts of %q: Dir %q, Base %q, Name %q", s, p.Dir(), p.Base(), p.Name())
		}
		if n := p.Name(); n == "" || n == "." || n == ".." || strings.ContainsAny(n, "/ \n\x00") {
			t.Errorf("%q has the name %q", s, n)
		}
	})
}

// The SHA-256 of nothing, as nix-hash and "nix hash" print it.
const (
	emptyHex    = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	emptyBase32 = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
	emptyBase64 = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
)

func TestParseNarHashReadsEverySpelling(t *testing.T) {
	want := NarHash(sha256.Sum256(nil))
	for _, s := range []string{
		emptyHex, strings.ToUpper(emptyHex), emptyBase32, emptyBase64,
		"sha256:" + emptyHex, "sha256:" + emptyBase32, "sha256:" + emptyBase64,
		"sha256-" + emptyBase64, "sha256-" + strings.TrimSuffix(emptyBase64, "="),
	} {
		if h, err := ParseNarHash(s); err != nil || h != want {
			t.Errorf("ParseNarHash(%q) = %v, %v", s, h, err)
		}
	}
	if want.Hex() != emptyHex || want.Base32() != emptyBase32 || want.String() != "sha256:"+emptyBase32 {
		t.Errorf("Hex %q, Base32 %q, String %q", want.Hex(), want.Base32(), want)
	}
}

func TestParseNarHashRefuses(t *testing.T) {
	for _, s := range []string{
		"", "sha256:", "sha256-", "sha1:" + emptyHex, "sha512-" + emptyBase64,
		emptyHex[1:], emptyHex + "0", "g" + emptyHex[1:],
		emptyBase32[1:], "e" + emptyBase32[1:], "z" + emptyBase32[1:], // z: more than 256 bits
		"sha256:" + strings.TrimSuffix(emptyBase64, "="), "*" + emptyBase64[1:], "=" + emptyBase64[1:],
		"sha256-" + emptyHex, "sha256-" + emptyBase32, "sha256:sha256-" + emptyBase64, "sha256:sha256:" + emptyHex,
		" " + emptyHex,
	} {
		if h, err := ParseNarHash(s); err == nil {
			t.Errorf("ParseNarHash(%q) = %v, want an error", s, h)
		}
	}
}

func TestNarHashSpellingsRoundTrip(t *testing.T) {
	property := func(h NarHash) bool {
		for _, s := range []string{
			h.String(), h.Hex(), h.Base32(), "sha256-" + base64.StdEncoding.EncodeToString(h[:]),
		} {
			if got, err := ParseNarHash(s); err != nil || got != h {
				t.Errorf("ParseNarHash(%q) = %v, %v; want %v", s, got, err, h)
				return false
			}
		}
		return true
	}
	if err := quick.Check(property, nil); err != nil {
		t.Error(err)
	}
}

func FuzzParseNarHash(f *testing.F) {
	f.Add("sha256:" + emptyBase32)
	f.Add("sha256-" + emptyBase64)
	f.Add(emptyHex)
	f.Fuzz(func(t *testing.T, s string) {
		h, err := ParseNarHash(s)
		if err != nil {
			return
		}
		if again, err := ParseNarHash(h.String()); err != nil || again != h {
			t.Errorf("ParseNarHash(%q) = %v, which parses to %v, %v", s, h, again, err)
		}
	})
}

func TestBuildStatusNamesAndSuccess(t *testing.T) {
	succeed := map[BuildStatus]bool{Built: true, Substituted: true, AlreadyValid: true, ResolvesToAlreadyValid: true}
	seen := map[string]bool{}
	for s := BuildStatus(0); s <= NoSubstituters+1; s++ {
		if s.Success() != succeed[s] {
			t.Errorf("%v.Success() = %t", s, s.Success())
		}
		if seen[s.String()] {
			t.Errorf("two statuses are called %q", s)
		}
		seen[s.String()] = true
	}
	for status, name := range map[BuildStatus]string{
		Built: "Built", NotDeterministic: "NotDeterministic", NoSubstituters: "NoSubstituters", 99: "BuildStatus(99)",
	} {
		if status.String() != name {
			t.Errorf("String() = %q, want %q", status, name)
		}
	}
}

func TestContentAddressOfAFixedOutput(t *testing.T) {
	hex := strings.Repeat("0", 62) + "08"
	base32 := "02" + strings.Repeat("0", 50) // five bits a digit, the highest first, of 260
	for _, tt := range []struct {
		output DerivationOutput
		want   string
	}{
		{DerivationOutput{"/nix/store/x", "r:sha256", hex}, "fixed:r:sha256:" + base32},
		{DerivationOutput{"/nix/store/x", "sha256", hex}, "fixed:sha256:" + base32},
		{DerivationOutput{"/nix/store/x", "sha1", hex[:40]}, "fixed:sha1:" + hex[:40]},
		{DerivationOutput{"/nix/store/x", "text:sha256", hex}, "text:sha256:" + base32},
		{DerivationOutput{"/nix/store/x", "", ""}, ""},
		{DerivationOutput{"", "r:sha256", ""}, ""},
		{DerivationOutput{"", "r:sha256", "impure"}, ""},
	} {
		if got := tt.output.ContentAddress(); got != tt.want {
			t.Errorf("%+v: %q, want %q", tt.output, got, tt.want)
		}
	}
}
