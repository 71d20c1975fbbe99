package fleet_test

import (
	"context"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

func newFleet(t *testing.T) *fleet.Fleet {
	t.Helper()
	fleet.Require(t)
	f, err := fleet.New(t.Context(), fleet.Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

const derivation = `derivation { name = "%s"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo built on $(cat /proc/sys/kernel/hostname) > $out" ]; }`

func TestHostOfEverySuiteBuilds(t *testing.T) {
	f := newFleet(t)
	for _, suite := range fleet.Suites() {
		started := time.Now()
		h, err := f.Host(t.Context(), fleet.HostConfig{Name: suite, Suite: suite})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s (Nix %s): up in %v", suite, h.NixVersion(), time.Since(started))
		for _, user := range []string{"root", "alice"} {
			started := time.Now()
			out, err := h.RunAs(t.Context(), user, "nix-build", "--no-out-link", "-E", fmt.Sprintf(derivation, user))
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%q %q %v", out.Stdout, out.Stderr, time.Since(started))
		}
		started = time.Now()
		h.Run(t.Context(), "true")
		t.Log(time.Since(started))
		t.Log(h.Processes())
	}
	var _ context.Context
}
