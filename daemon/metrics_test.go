package daemon

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	dto "github.com/prometheus/client_model/go"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
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
	check("during", "ssh_connects_total", labels{"machine": m.uri(), "result": "ok"}, 1)
	check("during", "build_queue_duration_seconds", labels{"system": nixSystem()}, 1)
	close(open)
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	r := s.drv("broken", drvConfig{})
	r.fail = &nix.BuildResult{Status: nix.PermanentFailure, ErrorMsg: "no"}
	s.build(r)
	s.idle()
	check("after", "machine_slots_in_use", here, 0)
	check("after", "builds_total", labels{"machine": m.uri(), "system": nixSystem(), "result": "built"}, 1)
	check("after", "builds_total", labels{"machine": m.uri(), "system": nixSystem(), "result": "failed"}, 1)
	check("after", "build_duration_seconds", here, 2)
	m.vanish()
	s.eventually("the machine is down", func() bool { return s.metric("nix_dispatch_machine_up", here) == 0 })
	s.eventually("failures are counted", func() bool {
		return s.metric("nix_dispatch_ssh_connects_total", labels{"machine": m.uri(), "result": "failed"}) > 0
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
			"cancelled": true, "not_built": true, "failed": true, "ok": true},
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
