package daemon

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/scheduler"
)

// TestRest has the only machine that is up fail a build.
func TestRest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, id := bareDaemon()
		const rest = 10 * time.Second
		b := bareBuild(d, 1)
		d.dispatcher.requeue(b, id, rest)
		if p := d.dispatcher.place(b); p.machine != "" {
			t.Fatalf("it is on %s at once", p.machine)
		}
		_, e := d.dispatcher.explainDrv(b.drvKey(), scheduler.Request{})
		until := time.Now().Add(rest).Format(time.TimeOnly)
		for _, want := range []string{"waits until " + until, "does not get it until " + until} {
			if got := e.Text(0); !strings.Contains(got, want) {
				t.Errorf("explained by %q, want %q", got, want)
			}
		}
		time.Sleep(rest / 2)
		d.dispatcher.requeue(b, id, rest) // a later rest is not ended by an earlier one
		time.Sleep(rest - time.Second)
		synctest.Wait()
		if p := d.dispatcher.place(b); p.machine != "" {
			t.Errorf("it is on %s before its rest is over", p.machine)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if p := d.dispatcher.place(b); p.machine != id {
			t.Errorf("it is on %q after its rest", p.machine)
		}
		d.dispatcher.requeue(b, id, rest)
		d.dispatcher.remove(b, func() {})
		time.Sleep(2 * rest) // an order for a build that is gone would be a panic
		synctest.Wait()
	})
}

// TestPassingTroubleOfTheOnlyMachine has the Nix of the only machine report failures that
// are the machine's, once.
func TestPassingTroubleOfTheOnlyMachine(t *testing.T) {
	t.Parallel()
	for _, words := range []string{"Cannot build 'DRV'.\nReason: missing system features\nRequired", "path 'INPUT' is not valid"} {
		eachScheme(t, func(t *testing.T, scheme string) {
			m := oneMachine(scheme)
			var mu sync.Mutex
			var at []time.Time
			var input nix.StorePath
			m.build = func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult {
				mu.Lock()
				at = append(at, time.Now())
				first := len(at) == 1
				mu.Unlock()
				if first {
					words := strings.ReplaceAll(words, "INPUT", string(input))
					return about(nix.BuildResult{Status: nix.MiscFailure, ErrorMsg: words}, req)
				}
				return m.site.recipe(req.DrvPath).build(m.store, req)
			}
			s := newSite(t, m)
			input = s.source("input")
			st := s.mustBuild(s.drv("thing", drvConfig{srcs: []nix.StorePath{input}}))
			if len(at) != 2 || at[1].Sub(at[0]) < restMin/2 {
				t.Errorf("tried at %v, want a pause of %v at least", at, restMin/2)
			}
			if !strings.Contains(st.log, "; the build is tried again, there not before ") {
				t.Errorf("the log does not tell of the pause: %q", st.log)
			}
		})
	}
}
