package integration

import (
	"fmt"
	"strings"
	"testing"

	"nixdispatch/deploy/fleet"
)

// shell is a Nix expression for a derivation whose builder is a shell script. The
// host it runs on notes its name. attrs are more of its attributes.
func shell(name, script, attrs string) string {
	return fmt.Sprintf(`(derivation {
		name = "%s"; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/usr/bin:/bin"; %s
		args = [ "-c" ''set -e
			: > $(mktemp /tmp/ran.%[1]s.XXXXXX)
			%[3]s'' ];
	})`, name, attrs, script)
}

// features is the attribute that makes a derivation ask for system features.
func features(names ...string) string {
	return `requiredSystemFeatures = [ "` + strings.Join(names, `" "`) + `" ];`
}

// ran counts how often derivations with a name were begun on a host.
func ran(t *testing.T, h *fleet.Host, name string) int {
	t.Helper()
	files, err := h.ReadDir("/tmp")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, file := range files {
		if strings.HasPrefix(file, "ran."+name+".") {
			n++
		}
	}
	return n
}

// uri is the machine's store URI.
func (m machineConfig) uri() string { return strings.Fields(m.line())[0] }

// contents fails the test unless an output of the client's store is this file.
func (s *site) contents(path, want string) {
	s.t.Helper()
	got, err := storeFile(s.client, path)
	if err != nil || got != want {
		s.t.Errorf("%s holds %q (%v), want %q", path, got, err, want)
	}
}

// references fails the test unless path refers to all of wanted.
func (s *site) references(path string, wanted ...string) {
	s.t.Helper()
	out, err := s.client.Run(s.t.Context(), "nix-store", "--query", "--references", path)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, w := range wanted {
		if !strings.Contains(out.Stdout, w) {
			s.t.Errorf("%s refers to %q, want %s among it", path, strings.Fields(out.Stdout), w)
		}
	}
}

// nixUsers are machines of each version and protocol that are reached as the user
// nix, in "make test" of each version with one of the protocols. Each takes only what
// asks for a feature of its own name.
func nixUsers(trusted bool) []machineConfig {
	kind := "untrusted"
	if trusted {
		kind = "trusted"
	}
	var machines []machineConfig
	for n, suite := range suites {
		// What is trusted by one protocol in "make test" is not by the other.
		which := n
		if trusted {
			which++
		}
		for _, scheme := range shortOr(protocols[which%2:][:1], protocols) {
			name := kind + "-" + suite + "-" + scheme
			machines = append(machines, machineConfig{
				name: name, suite: suite, scheme: scheme, user: "nix",
				columns: "x86_64-linux - 2 1 - " + name,
				host:    fleet.HostConfig{SystemFeatures: []string{name}, NixTrusted: trusted},
			})
		}
	}
	return machines
}

// An input-addressed path can be sent to nobody who does not trust us, unless it
// is signed. Machines that do not trust us get the derivations instead and build
// the inputs again.
func TestUntrustedUser(t *testing.T) {
	t.Parallel()
	machines := nixUsers(false)
	all := append([]machineConfig{{name: "plain"}}, machines...)
	s := newSite(t, siteConfig{machines: all})
	for _, m := range machines {
		t.Run(m.name, func(t *testing.T) {
			s := s.within(t)
			if m.suite == fleet.Trixie {
				// Nothing to send: the distrust shows only when it is to be built.
				out, err := s.nixBuild("alice", shell("bare-"+m.name, "echo bare > $out", features(m.name)))
				s.built(out, err, "bare\n")
			}
			lib := shell("lib", `cat $src > $out; echo built >> $out`, `src = builtins.toFile "src" "a source\n";`)
			app := shell("app-"+m.name, `mkdir $out; cat $lib > $out/lib; echo $lib > $out/ref`,
				features(m.name)+"lib = "+lib+";")
			out, err := s.nixBuild("alice", app)
			if err != nil {
				t.Fatalf("nix-build: %v\n%s", err, out.Stderr)
			}
			if n := builtOn(out.Stderr)[m.uri()]; n != 1 {
				t.Errorf("built on %v, want app on %s", builtOn(out.Stderr), m.uri())
			}
			h := s.machines[m.name]
			if n := ran(t, h, "lib"); n != 1 {
				t.Errorf("the input was built %d times on the machine, which can have it in no other way", n)
			}
			paths := strings.Fields(out.Stdout)
			s.verify(paths...)
			s.contents(paths[0]+"/lib", "a source\nbuilt\n")
			s.references(paths[0], "-lib")
			t.Run("fixed output with a built input", func(t *testing.T) { s.within(t).fixedOutput(m) })
			t.Run("failing build", func(t *testing.T) { s.within(t).failsOn(m) })
		})
	}
	t.Run("inputs were built once on the machine that trusts us", func(t *testing.T) {
		if n := ran(t, s.machines["plain"], "lib"); n != 1 {
			t.Errorf("lib was built %d times there, want 1", n)
		}
	})
}

// within is the site as seen from a subtest: failures are the subtest's.
func (s *site) within(t *testing.T) *site {
	sub := *s
	sub.t = t
	return &sub
}

// fixedOutput builds a fixed-output derivation, as fetchers are: it may be built
// by everybody, but needs a program that is an input-addressed path.
func (s *site) fixedOutput(m machineConfig) {
	t := s.t
	t.Helper()
	tool := shell("tool", `echo 'cat' > $out`, "")
	out, err := s.nixBuild("alice", shell("fetched-"+m.name, `echo hello | sh $tool > $out`, features(m.name)+`
		tool = `+tool+`;
		outputHashMode = "flat"; outputHashAlgo = "sha256";
		outputHash = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";`))
	if err != nil {
		t.Fatalf("nix-build: %v\n%s", err, out.Stderr)
	}
	if n := builtOn(out.Stderr)[m.uri()]; n != 1 {
		t.Errorf("built on %v, want fetched on %s", builtOn(out.Stderr), m.uri())
	}
	path := strings.TrimSpace(out.Stdout)
	s.contents(path, "hello\n")
	info, err := s.client.Run(t.Context(), "nix", "path-info", "--json", path)
	if err != nil || !strings.Contains(info.Stdout, `"ca":"fixed:`) {
		t.Errorf("path-info says %s (%v), want the content address kept", info.Stdout, err)
	}
}

// failsOn checks that a build that fails on a machine fails once, with its log.
func (s *site) failsOn(m machineConfig) {
	t := s.t
	t.Helper()
	out, err := s.nixBuild("alice", shell("failing", `echo the last words; exit 3`, features(m.name)))
	if err == nil {
		t.Fatal("nix-build succeeded")
	}
	if !strings.Contains(out.Stderr, "the last words") {
		t.Errorf("the log is not shown:\n%s", out.Stderr)
	}
	if n := ran(t, s.machines[m.name], "failing"); n != 1 {
		t.Errorf("it was built %d times, want once", n)
	}
}

// A trusted user gets the inputs as they are.
func TestTrustedUser(t *testing.T) {
	t.Parallel()
	machines := nixUsers(true)
	all := append([]machineConfig{{name: "plain"}}, machines...)
	s := newSite(t, siteConfig{machines: all})
	for _, m := range machines {
		t.Run(m.name, func(t *testing.T) {
			s := s.within(t)
			lib := shell("lib", `echo built > $out`, "")
			app := shell("app-"+m.name, `cat $lib > $out; echo $lib >> $out`, features(m.name)+"lib = "+lib+";")
			out, err := s.nixBuild("alice", app)
			if err != nil {
				t.Fatalf("nix-build: %v\n%s", err, out.Stderr)
			}
			if n := builtOn(out.Stderr)[m.uri()]; n != 1 {
				t.Errorf("built on %v, want app on %s", builtOn(out.Stderr), m.uri())
			}
			if n := ran(t, s.machines[m.name], "lib"); n != 0 {
				t.Errorf("the input was built %d times on a machine that takes it as it is", n)
			}
			path := strings.TrimSpace(out.Stdout)
			s.verify(path)
			s.references(path, "-lib")
		})
	}
}
