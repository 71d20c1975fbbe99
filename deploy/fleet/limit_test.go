package fleet_test

import (
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

func TestLimitedLineIsSlowInBothDirections(t *testing.T) {
	f := newFleet(t)
	all := hosts(t, f, fleet.HostConfig{Name: "client"}, fleet.HostConfig{Name: "mac"})
	client, mac := all[0], all[1]
	up := func(bytes string) time.Duration {
		start := time.Now()
		run(t, client, "root", "sh", "-c", "head -c "+bytes+" /dev/urandom | ssh mac 'cat >/dev/null'")
		return time.Since(start)
	}
	down := func(bytes string) time.Duration {
		start := time.Now()
		run(t, client, "root", "sh", "-c", "ssh mac head -c "+bytes+" /dev/urandom >/dev/null")
		return time.Since(start)
	}
	if err := mac.Limit(t.Context(), 100_000); err != nil {
		t.Fatal(err)
	}
	slowUp, slowDown := up("300000"), down("300000")
	if slowUp < 2*time.Second || slowDown < 2*time.Second {
		t.Errorf("300 kB at 100 kB/s took %v up, %v down; want more than 2 s each", slowUp, slowDown)
	}
	if err := mac.Limit(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	// With the limit this would take 50 s; what a busy host takes is far from that.
	if up, down := up("5000000"), down("5000000"); up > 40*time.Second || down > 40*time.Second {
		t.Errorf("with the limit gone, 5 MB took %v up, %v down", up, down)
	}
}
