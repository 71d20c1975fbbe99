package integration

import (
	"fmt"
	"strings"
	"testing"

	"nixdispatch/deploy/fleet"
)

// suites are the clients' and machines' Nix versions: old, middle, new.
var suites = []string{fleet.Bookworm, fleet.Trixie, fleet.Sid}

// TestEveryPairBuilds builds one derivation for each pair of versions, protocol
// and way into Nix.
func TestEveryPairBuilds(t *testing.T) {
	eachClient(t, func(t *testing.T, client string) {
		var machines []machineConfig
		for _, suite := range suites {
			for _, scheme := range []string{"ssh", "ssh-ng"} {
				name := suite + "-" + scheme
				machines = append(machines, machineConfig{
					name: name, suite: suite, scheme: scheme,
					columns: "x86_64-linux - 2 1 - " + name, // only what asks for it
					host:    fleet.HostConfig{SystemFeatures: []string{name}},
				})
			}
		}
		s := newSite(t, siteConfig{client: client, machines: machines})
		t.Logf("client Nix %s", s.client.NixVersion())
		for _, m := range machines {
			for _, user := range []string{"alice", "root"} {
				out, err := s.nixBuild(user, fmt.Sprintf(`derivation {
						name = "%s-%s"; system = "x86_64-linux"; builder = "/bin/sh";
						requiredSystemFeatures = [ "%s" ];
						args = [ "-c" "echo hello from the builder; echo %s > $out" ];
					}`, m.name, user, m.name, user))
				if err != nil {
					t.Errorf("%s on %s (Nix %s): %v\n%s", user, m.name, s.machines[m.name].NixVersion(), err, out.Stderr)
					continue
				}
				s.verify(strings.Fields(out.Stdout)...)
				uri := strings.Fields(m.line())[0]
				if n := builtOn(out.Stderr)[uri]; n != 1 {
					t.Errorf("%s: built on %v, want once on %s", user, builtOn(out.Stderr), uri)
				}
			}
		}
	})
}
