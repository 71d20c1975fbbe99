package integration

import (
	"fmt"
	"strings"
	"testing"

	"nixdispatch/deploy/fleet"
)

// memoryLimit is the most memory the daemon may ever take, in KiB.
const memoryLimit = 150 << 10

// peakMemory is the most memory nix-dispatchd ever took, in KiB.
func (s *site) peakMemory() int {
	s.t.Helper()
	pid := s.run("pgrep", "-x", "nix-dispatchd")
	status, err := s.client.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		var kib int
		if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kib); n == 1 {
			return kib
		}
	}
	s.t.Fatalf("no VmHWM in %q", status)
	return 0
}

// A path of any size passes through the daemon without filling its memory:
// 4 GiB, or in "make test" more than the daemon may have of memory.
func TestBigPathsTakeNoMemory(t *testing.T) {
	t.Parallel()
	size := shortOr(192<<20, 4<<30)
	s := newSite(t, siteConfig{machines: []machineConfig{
		{name: "mac", columns: "x86_64-linux - 1 1 - serve", host: fleet.HostConfig{SystemFeatures: []string{"serve"}}},
		{name: "mini", scheme: "ssh-ng", columns: "x86_64-linux - 1 1 - worker", host: fleet.HostConfig{SystemFeatures: []string{"worker"}}},
	}})
	// Holes cost no time to write here; what travels is as long as ever.
	s.run("sh", "-c", fmt.Sprintf("echo begin > /srv/big && truncate -s %d /srv/big && echo end >> /srv/big", size))
	input := s.run("nix-store", "--add", "/srv/big")
	for _, feature := range []string{"serve", "worker"} {
		t.Run(feature, func(t *testing.T) {
			s := s.within(t)
			before := s.peakMemory()
			out, err := s.nixBuild("root", shell("big-"+feature, "cat $big > $out; echo "+feature+" >> $out",
				features(feature)+`big = builtins.storePath "`+input+`";`))
			if err != nil {
				t.Fatalf("nix-build: %v\n%s", err, out.Stderr)
			}
			path := strings.TrimSpace(out.Stdout)
			s.verify(path)
			if got := s.run("stat", "-c", "%s", path); got != fmt.Sprint(size+len("end\n")+len(feature+"\n")) {
				t.Errorf("the output has %s bytes", got)
			}
			if got := s.run("tail", "-c", "20", path); !strings.HasSuffix(got, "end\n"+feature) {
				t.Errorf("the output ends in %q", got[max(0, len(got)-20):])
			}
			peak := s.peakMemory()
			t.Logf("%d MiB up and down: peak memory %d MiB, %d before", size>>20, peak>>10, before>>10)
			if peak > memoryLimit {
				t.Errorf("the daemon took %d MiB, more than %d", peak>>10, memoryLimit>>10)
			}
		})
	}
}
