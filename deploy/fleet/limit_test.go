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
	up := func() time.Duration {
		start := time.Now()
		run(t, client, "root", "sh", "-c", "head -c 300000 /dev/urandom | ssh mac 'cat >/dev/null'")
		return time.Since(start)
	}
	down := func() time.Duration {
		start := time.Now()
		run(t, client, "root", "sh", "-c", "ssh mac head -c 300000 /dev/urandom >/dev/null")
		return time.Since(start)
	}
	if err := mac.Limit(t.Context(), 100_000); err != nil {
		t.Fatal(err)
	}
	slowUp, slowDown := up(), down()
	if slowUp < 2*time.Second || slowDown < 2*time.Second {
		t.Errorf("300 kB at 100 kB/s took %v up, %v down; want more than 2 s each", slowUp, slowDown)
	}
	if err := mac.Limit(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if fast := up() + down(); fast > slowUp {
		t.Errorf("with the limit gone, 600 kB took %v, 300 kB with it %v", fast, slowUp)
	}
}
