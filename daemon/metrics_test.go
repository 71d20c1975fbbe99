package daemon

import (
	"context"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	dto "github.com/prometheus/client_model/go"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/scheduler"
	"nixdispatch/sshpool"
)

// metric is the sum of a metric's values over all series with these labels.
func (s *site) metric(name string, labels map[string]string) float64 {
	s.t.Helper()
	families, err := s.d.metrics.registry.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if hasLabels(m, labels) {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

func hasLabels(m *dto.Metric, want map[string]string) bool {
	found := 0
	for _, l := range m.GetLabel() {
		if v, ok := want[l.GetName()]; ok && v == l.GetValue() {
			found++
		}
	}
	return found == len(want)
}

func TestMetricsAreWellFormed(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"), namedMachine("ssh-ng", "m2"))
	s.mustBuild(s.drv("thing", drvConfig{srcs: []nix.StorePath{s.source("src")}}))
	problems, err := testutil.GatherAndLint(s.d.metrics.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestMetricsTellWhatHappened(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.slots = 3
	open := make(chan struct{})
	m.build = m.gated(open)
	s := newSite(t, m)
	type labels = map[string]string
	here := labels{"machine": m.uri()}
	h := s.hook()
	h.accepted(s.drv("thing", drvConfig{}))
	s.eventually("it is being built", func() bool { return m.building() == 1 })
	check := func(when, name string, l labels, want float64) {
		t.Helper()
		if got := s.metric("nix_dispatch_"+name, l); got != want {
			t.Errorf("%s: %s%v = %v, want %v", when, name, l, got, want)
		}
	}
	check("during", "build_info", labels{"version": "0.test"}, 1)
	check("during", "machine_up", here, 1)
	check("during", "machine_slots", here, 3)
	check("during", "machine_slots_in_use", here, 1)
	check("during", "machine_slots_held", here, 0)
	check("during", "machine_builds_running", here, 1)
	check("during", "machine_builds_staging", here, 0)
	check("during", "builds_in_progress", nil, 1)
	check("during", "builds_queued_oldest_age_seconds", nil, 0)
	check("during", "ssh_connects_total", labels{"machine": m.uri(), "result": "ok"}, 1)
	check("during", "build_queue_duration_seconds", labels{"system": nixSystem()}, 1)
	close(open)
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	r := s.drv("broken", drvConfig{})
	r.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "no"}
	s.build(r)
	s.idle()
	check("after", "machine_slots_in_use", here, 0)
	check("after", "machine_builds_running", here, 0)
	check("after", "builds_in_progress", nil, 0)
	check("after", "attempts_failed_total", here, 0)
	check("after", "builds_total", labels{"machine": m.uri(), "system": nixSystem(), "result": "built"}, 1)
	check("after", "builds_total", labels{"machine": m.uri(), "system": nixSystem(), "result": "failed"}, 1)
	check("after", "build_duration_seconds", here, 2)
	m.vanish()
	s.eventually("the machine is down", func() bool { return s.metric("nix_dispatch_machine_up", here) == 0 })
	s.eventually("failures are counted", func() bool {
		return s.metric("nix_dispatch_ssh_connects_total", labels{"machine": m.uri(), "result": "failed"}) > 0
	})
}

// TestMetricsOfAttemptsThatFail loses a connection under a build.
func TestMetricsOfAttemptsThatFail(t *testing.T) {
	t.Parallel()
	m, m2 := oneMachine("ssh"), namedMachine("ssh", "m2")
	m.build = func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
		m.ssh.Cut() // and is back at once
		return untilGone(ctx, req)
	}
	s := newSite(t, m, m2)
	s.mustBuild(s.drv("thing", drvConfig{}))
	here := map[string]string{"machine": m.uri()}
	for name, want := range map[string]float64{
		"machine_slots_in_use": 1, "machine_slots_held": 1, "machine_builds_running": 0, "attempts_failed_total": 1,
	} {
		if got := s.metric("nix_dispatch_"+name, here); got != want {
			t.Errorf("%s = %v, want %v", name, got, want)
		}
	}
	if got := s.metric("nix_dispatch_attempts_failed_total", map[string]string{"machine": m.uri(), "reason": failureLost}); got != 1 {
		t.Errorf("%v attempts failed for want of the connection, want 1", got)
	}
}

func TestFailureReason(t *testing.T) {
	t.Parallel()
	lost := &sshpool.LostError{Host: "m", Err: io.EOF}
	for _, tt := range []struct {
		doing string
		err   error
		want  string
	}{
		{doingInputs, io.EOF, "copy_inputs"},
		{doingInputs, lost, "connection_lost"},
		{doingBuild, fmt.Errorf("say: %w", lost), "connection_lost"},
		{doingBuild, io.EOF, "build"},
		{doingOutputs, io.EOF, "copy_outputs"},
		{"start nix-store --serve --write --store '/x'", io.EOF, "start"},
	} {
		if got := failureReason(&machineError{"ssh://m", tt.doing, tt.err}); got != tt.want {
			t.Errorf("failureReason(%s: %v) = %q, want %q", tt.doing, tt.err, got, tt.want)
		}
	}
}

func TestLoadKnowsTheOldestWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, id := bareDaemon() // one slot, one staging place
		state := func(st scheduler.MachineState) {
			d.dispatcher.do(func(q *scheduler.Queue) []scheduler.Order { return q.SetState(id, st, "") })
		}
		check := func(when string, builds int, want time.Time) {
			t.Helper()
			if got := d.dispatcher.load(func() {}); got.builds != builds || !got.waiting.Equal(want) {
				t.Errorf("%s: %d builds, the oldest waits since %v, want %d since %v", when, got.builds, got.waiting, builds, want)
			}
		}
		start := time.Now()
		state(scheduler.Down)
		check("nothing", 0, time.Time{})
		var builds []*build
		for n := range 3 {
			builds = append(builds, bareBuild(d, n))
			time.Sleep(time.Second)
		}
		check("all wait", 3, start)
		d.dispatcher.remove(builds[0], func() {})
		check("the first is gone", 2, start.Add(time.Second))
		state(scheduler.Up)
		check("both are placed", 2, time.Time{})
		state(scheduler.Down)
		time.Sleep(time.Second)
		d.dispatcher.requeue(builds[2], id, 0)
		check("one is put back", 2, start.Add(4*time.Second))
		d.end(nil)
	})
}

// TestMetricLabelsAreBounded has callers choose systems and statuses freely.
func TestMetricLabelsAreBounded(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{builders: "ssh://m1 x86_64-linux,i686-linux"})
	systems := []string{"x86_64-linux", "i686-linux", "builtin", "riscv64-linux", "\xff\n", ""}
	for _, system := range systems {
		for status := range dispatchv1.BuildStatus(40) {
			b := &build{drv: &nix.Derivation{BasicDerivation: nix.BasicDerivation{Platform: system}}}
			s.d.metrics.placed(b)
			s.d.metrics.buildEnded(b, outcome{status: status, duration: 1})
			s.d.metrics.buildEnded(b, outcome{status: status, machine: "ssh://m1"})
			s.d.metrics.attemptFailed("ssh://m2", failureKilled)
			s.d.metrics.running("ssh://m2").Inc()
		}
	}
	families, err := s.d.metrics.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	allowed := map[string]map[string]bool{
		"system":    {"x86_64-linux": true, "i686-linux": true, "builtin": true, "other": true},
		"machine":   {"ssh://m1": true, "other": true},
		"direction": {"up": true, "down": true},
		"result": {"built": true, "substituted": true, "already_valid": true, "timed_out": true, "log_limit_exceeded": true,
			"cancelled": true, "not_built": true, "failed": true, "ok": true,
			hedgeWon: true, hedgeOutrun: true},
	}
	seen := 0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if values := allowed[l.GetName()]; values != nil {
					if seen++; !values[l.GetValue()] {
						t.Errorf("%s has the label %s=%q", f.GetName(), l.GetName(), l.GetValue())
					}
				}
			}
		}
	}
	if seen < 50 {
		t.Errorf("only %d labels were looked at", seen)
	}
}
