package nix

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseStoreReference(t *testing.T) {
	kv := func(s ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(s); i += 2 {
			m[s[i]] = s[i+1]
		}
		return m
	}
	const long = "fea5:23e1:3916:fc24:cb52:2837:2ecb:ea8e"
	for _, tt := range []struct {
		in     string
		want   StoreReference
		render string // "" where it is the same as in
	}{
		// Words.
		{"", StoreReference{Scheme: "auto", Word: true}, "auto"},
		{"auto", StoreReference{Scheme: "auto", Word: true}, ""},
		{"auto?root=/r", StoreReference{Scheme: "auto", Word: true, Params: kv("root", "/r")}, ""},
		{"?root=/r", StoreReference{Scheme: "auto", Word: true, Params: kv("root", "/r")}, "auto?root=/r"},
		{"daemon", StoreReference{Scheme: "daemon", Word: true}, ""},
		{"daemon?trusted=true&a=b", StoreReference{Scheme: "unix", Params: kv("trusted", "true", "a", "b")}, "unix://?a=b&trusted=true"},
		{"daemon?noequals", StoreReference{Scheme: "daemon", Word: true}, "daemon"},
		{"local", StoreReference{Scheme: "local", Word: true}, ""},
		{"local?root=/r", StoreReference{Scheme: "local", Params: kv("root", "/r")}, "local://?root=/r"},
		{"auto://", StoreReference{Scheme: "auto"}, ""},

		// Paths.
		{"/foo/bar?trusted=true", StoreReference{Scheme: "local", Path: "/foo/bar", Params: kv("trusted", "true")}, "local:///foo/bar?trusted=true"},
		{"rel/./x/../path/", StoreReference{Scheme: "local", Path: "/rel/path"}, "local:///rel/path"},
		{"/a b%20#c", StoreReference{Scheme: "local", Path: "/a b%20#c"}, "local:///a%20b%2520%23c"},
		{"local:///foo%20bar", StoreReference{Scheme: "local", Path: "/foo bar"}, ""},
		{"local:/foo", StoreReference{Scheme: "local", Path: "/foo"}, "local:///foo"},
		{"unix://", StoreReference{Scheme: "unix"}, ""},
		{"unix:///run/nix.sock", StoreReference{Scheme: "unix", Path: "/run/nix.sock"}, ""},
		{"http://cache:8080/a?b=c", StoreReference{Scheme: "http", Host: "cache", Port: 8080, Path: "/a", Params: kv("b", "c")}, ""},

		// Hosts.
		{"ssh://localhost", StoreReference{Scheme: "ssh", Host: "localhost"}, ""},
		{"ssh-ng://me@mac.example:2222", StoreReference{Scheme: "ssh-ng", User: "me", Host: "mac.example", Port: 2222}, ""},
		{"ssh://h:", StoreReference{Scheme: "ssh", Host: "h"}, "ssh://h"},
		{"ssh://h:0022", StoreReference{Scheme: "ssh", Host: "h", Port: 22}, "ssh://h:22"},
		{"ssh://h:65535", StoreReference{Scheme: "ssh", Host: "h", Port: 65535}, ""},
		{"ssh://10.0.0.1:1", StoreReference{Scheme: "ssh", Host: "10.0.0.1", Port: 1}, ""},
		{"ssh://a%40b@h", StoreReference{Scheme: "ssh", User: "a@b", Host: "h"}, ""},
		{"ssh://u:p@h", StoreReference{Scheme: "ssh", User: "u", Password: "p", Host: "h"}, ""},
		{"ssh://my_host~x!", StoreReference{Scheme: "ssh", Host: "my_host~x!"}, "ssh://my_host~x%21"},
		{"ssh:h?ssh-key=/k", StoreReference{Scheme: "ssh", Host: "h", Params: kv("ssh-key", "/k")}, "ssh://h?ssh-key=/k"},
		{"ssh://h#fragment", StoreReference{Scheme: "ssh", Host: "h"}, "ssh://h"},

		// IPv6.
		{"ssh://[::1]", StoreReference{Scheme: "ssh", Host: "::1"}, ""},
		{"ssh://[::1]:22", StoreReference{Scheme: "ssh", Host: "::1", Port: 22}, ""},
		{"ssh://u@[fe80::1%25eth0]:22", StoreReference{Scheme: "ssh", User: "u", Host: "fe80::1%eth0", Port: 22}, ""},
		{"ssh://::1", StoreReference{Scheme: "ssh", Host: "::1"}, "ssh://[::1]"},
		{"ssh://u@" + long, StoreReference{Scheme: "ssh", User: "u", Host: long}, "ssh://u@[" + long + "]"},
		{"ssh://u@" + long + "?a=b&c=d", StoreReference{Scheme: "ssh", User: "u", Host: long, Params: kv("a", "b", "c", "d")}, "ssh://u@[" + long + "]?a=b&c=d"},
		{"ssh://u@[" + long + "%eth0]?a=b", StoreReference{Scheme: "ssh", User: "u", Host: long + "%eth0", Params: kv("a", "b")}, "ssh://u@[" + long + "%25eth0]?a=b"},
		{"ssh://u@[" + long + "%25eth0]?a=b", StoreReference{Scheme: "ssh", User: "u", Host: long + "%eth0", Params: kv("a", "b")}, ""},
		{"ssh://u@" + long + "%eth0", StoreReference{Scheme: "ssh", User: "u", Host: long + "%eth0"}, "ssh://u@[" + long + "%25eth0]"},
		// Without brackets the zone is taken literally: it is "25" here.
		{"ssh://" + long + "%25", StoreReference{Scheme: "ssh", Host: long + "%25"}, "ssh://[" + long + "%2525]"},
		// Greedy: this is no port.
		{"ssh://fe80::1:22", StoreReference{Scheme: "ssh", Host: "fe80::1:22"}, "ssh://[fe80::1:22]"},

		// Parameters.
		{"ssh://h?b=2&a=1&b=3&c", StoreReference{Scheme: "ssh", Host: "h", Params: kv("a", "1", "b", "2")}, "ssh://h?a=1&b=2"},
		{"ssh://h?", StoreReference{Scheme: "ssh", Host: "h"}, "ssh://h"},
		{"ssh://h?a=", StoreReference{Scheme: "ssh", Host: "h", Params: kv("a", "")}, ""},
		{"ssh://h?a=b=c", StoreReference{Scheme: "ssh", Host: "h", Params: kv("a", "b=c")}, "ssh://h?a=b%3Dc"},
		{"ssh://h?a=x+y%20z%2Bw", StoreReference{Scheme: "ssh", Host: "h", Params: kv("a", "x+y z+w")}, "ssh://h?a=x%2By%20z%2Bw"},
		{"ssh://h?p=sudo nix-store&q=\"x\"", StoreReference{Scheme: "ssh", Host: "h", Params: kv("p", "sudo nix-store", "q", `"x"`)}, "ssh://h?p=sudo%20nix-store&q=%22x%22"},
		{
			"ssh://localhost?remote-store=/x/m1?system-features=foo",
			StoreReference{Scheme: "ssh", Host: "localhost", Params: kv("remote-store", "/x/m1?system-features=foo")},
			"ssh://localhost?remote-store=/x/m1?system-features%3Dfoo",
		},
		{"ssh://h?k%65y=%2f%3F%40%3a", StoreReference{Scheme: "ssh", Host: "h", Params: kv("key", "/?@:")}, "ssh://h?key=/?@:"},
	} {
		t.Run(tt.in, func(t *testing.T) {
			got, err := ParseStoreReference(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("ParseStoreReference(%q) (-want +got):\n%s", tt.in, diff)
			}
			want := tt.render
			if want == "" {
				want = tt.in
			}
			if got.String() != want {
				t.Errorf("String() = %q, want %q", got, want)
			}
		})
	}
}

func TestParseStoreReferenceRefuses(t *testing.T) {
	for _, tt := range []struct{ in, message string }{
		{"host", "no scheme"},
		{"user@host?ssh-key=/root/k", "no scheme"},
		{"://host", "no scheme"},
		{"1ssh://host", "no scheme"},
		{"ssh://", "no host name"},
		{"ssh-ng://?a=b", "no host name"},
		{"ssh://u@", "no host name"},
		{"ssh://@h", "empty user name"},
		{"ssh://@::1", "empty user name"},
		{"ssh://-oProxyCommand=x", "begins with '-'"},
		{"ssh://%2doProxyCommand=x", "begins with '-'"},
		{"ssh-ng://-l@h", "begins with '-'"},
		{"ssh://h%0aHost%20x", "control character"},
		{"ssh://u%00@h", "control character"},
		{"ssh://h/path", "unexpected path"},
		{"ssh://h/", "unexpected path"},
		{"ssh://h:0", "port"},
		{"ssh://h:65536", "port"},
		{"ssh://h:+22", "port"},
		{"ssh://h:ssh", "port"},
		{"ssh://a:b:c", "port"},
		{"ssh://h|x", "illegal character"},
		{"ssh://h ost", "illegal character"},
		{"ssh://hö", "illegal character"},
		{"ssh://h%zz", "hexadecimal"},
		{"ssh://h%4", "hexadecimal"},
		{"ssh://[::1", "no ']'"},
		{"ssh://[::1]x", "after ']'"},
		{"ssh://[host]", "IPv6"},
		{"ssh://[fe80::1%eth0]:22", "IPv6"},
		{"ssh://fe80::1%a b", "zone"},
		{"ssh://h?a=%", "hexadecimal"},
		{"ssh://h?a=<", "illegal character"},
		{"daemon?a=<", "illegal character"},
		{"local:///a%2fb", "encoded slash"},
		{"unix:///a%00b", "encoded slash or NUL"},
	} {
		got, err := ParseStoreReference(tt.in)
		if err == nil {
			t.Errorf("ParseStoreReference(%q) = %+v, want an error", tt.in, got)
		} else if !strings.Contains(err.Error(), tt.message) {
			t.Errorf("ParseStoreReference(%q): %v; want it to say %q", tt.in, err, tt.message)
		}
	}
}

func TestParameterWithoutEqualSignIsReported(t *testing.T) {
	for in, want := range map[string][]string{
		"ssh://h?compress&a=b&x": {`parameter "compress" has no '=' and is ignored`, `parameter "x" has no '=' and is ignored`},
		"daemon?trusted":         {`parameter "trusted" has no '=' and is ignored`},
		"ssh://h?a=b&":           nil,
	} {
		var got []string
		if _, err := ParseStoreReferenceWarn(in, func(m string) { got = append(got, m) }); err != nil {
			t.Errorf("%q: %v", in, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("warnings for %q (-want +got):\n%s", in, diff)
		}
	}
}

func TestCompleteStoreURI(t *testing.T) {
	for in, want := range map[string]string{
		"host": "ssh://host", "u@host:2222": "ssh://u@host:2222", "::1": "ssh://::1", "host?compress=true": "ssh://host?compress=true",
		"autobahn": "ssh://autobahn", "localhost": "ssh://localhost", "daemon2": "ssh://daemon2",
		"ssh-ng://host": "ssh-ng://host", "/path": "/path", "rel/path": "rel/path",
		"u@host?ssh-key=/root/k": "u@host?ssh-key=/root/k",
		"auto":                   "auto", "daemon": "daemon", "local": "local", "auto?a=b": "auto?a=b", "daemon?": "daemon?", "local?a=b": "local?a=b",
		"?a=b": "?a=b",
	} {
		if got := CompleteStoreURI(in); got != want {
			t.Errorf("CompleteStoreURI(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestFakeSSHOnlyForBareLocalhost(t *testing.T) {
	for in, want := range map[string]bool{
		"ssh://localhost": true, "ssh-ng://localhost?remote-store=/x": true,
		"ssh://u@localhost": false, "ssh://localhost:22": false, "ssh://127.0.0.1": false, "http://localhost": false, "local": false,
	} {
		ref, err := ParseStoreReference(in)
		if err != nil || ref.FakeSSH() != want {
			t.Errorf("FakeSSH of %q = %t, %v; want %t", in, ref.FakeSSH(), err, want)
		}
	}
}

func FuzzParseStoreReference(f *testing.F) {
	for _, s := range []string{
		"", "auto?a=b", "daemon?x=y", "local", "/a/../b?c=d", "ssh://u:p@h:22?a=b&c", "ssh://[fe80::1%25e]:1",
		"ssh://u@fe80::1%e?a=%20", "unix:///s", "a:b:c", "x:y@z/p?q=r#f", "ssh://%3A%3A1", "local:////a//b", "x://h?=v",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := ParseStoreReference(s)
		if err != nil {
			return
		}
		printed := ref.String()
		again, err := ParseStoreReference(printed)
		if err != nil {
			t.Fatalf("%q prints as %q, which does not parse: %v", s, printed, err)
		}
		if diff := cmp.Diff(ref, again); diff != "" {
			t.Errorf("%q prints as %q, which parses to something else (-first +again):\n%s", s, printed, diff)
		}
		for i := range len(printed) {
			if c := printed[i]; c <= ' ' || c >= 0x7f || c == '#' || c == ';' {
				t.Fatalf("%q prints as %q, which a machines file can't hold", s, printed)
			}
		}
		ssh := ref.Scheme == "ssh" || ref.Scheme == "ssh-ng"
		if ssh && (ref.Host == "" || ref.Host[0] == '-' || strings.HasPrefix(ref.User, "-") || ref.Path != "") {
			t.Errorf("%q gives ssh the user %q, host %q, path %q", s, ref.User, ref.Host, ref.Path)
		}
	})
}
