package daemon

import (
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/scheduler"
)

const metricsPrefix = "nix_dispatch"

// otherLabel stands for every value outside the bounded set of a label: systems
// that no machine has, builds that no machine took.
const otherLabel = "other"

// metrics are the daemon's instruments. Events are counted by its methods; the
// state of machines and queue is read at each scrape by a stateCollector.
// Safe for concurrent use.
type metrics struct {
	registry *prometheus.Registry
	systems  map[string]bool // the label values of "system"

	builds        *prometheus.CounterVec
	buildDuration *prometheus.HistogramVec
	queueDuration *prometheus.HistogramVec
	narBytes      *prometheus.CounterVec
}

// newMetrics makes the instruments, with the counters of the given machines at
// zero.
func newMetrics(version string, set *machines) *metrics {
	r := prometheus.NewRegistry()
	f := promauto.With(r)
	m := &metrics{registry: r, systems: map[string]bool{"builtin": true}}
	m.builds = f.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricsPrefix, Name: "builds_total",
		Help: "Builds that ended, by machine, system and result; machine is \"other\" if none was chosen.",
	}, []string{"machine", "system", "result"})
	m.buildDuration = f.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: metricsPrefix, Name: "build_duration_seconds",
		Help:    "Time the remote build itself took, without copying.",
		Buckets: prometheus.ExponentialBuckets(0.1, 3, 12), // 0.1 s to 4.9 h
	}, []string{"machine"})
	m.queueDuration = f.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: metricsPrefix, Name: "build_queue_duration_seconds",
		Help:    "Time from acceptance until a machine was chosen.",
		Buckets: prometheus.ExponentialBuckets(0.01, 4, 10), // 10 ms to 44 min
	}, []string{"system"})
	m.narBytes = f.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricsPrefix, Name: "nar_bytes_total",
		Help: "Bytes of NARs copied to (up) and from (down) machines.",
	}, []string{"machine", "direction"})
	info := f.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: metricsPrefix, Name: "build_info",
		Help: "Always 1; the labels say which program this is.",
	}, []string{"version", "goversion"})
	info.WithLabelValues(version, runtime.Version()).Set(1)
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, line := range set.lines {
		for _, s := range line.SystemTypes {
			m.systems[s] = true
		}
		m.sent(line.StoreURI)
		m.received(line.StoreURI)
	}
	return m
}

func (m *metrics) sent(machine string) prometheus.Counter {
	return m.narBytes.WithLabelValues(machine, "up")
}

func (m *metrics) received(machine string) prometheus.Counter {
	return m.narBytes.WithLabelValues(machine, "down")
}

// system keeps the label bounded: callers choose derivations' systems freely.
func (m *metrics) system(s string) string {
	if m.systems[s] {
		return s
	}
	return otherLabel
}

// resultLabels are the results a build can have, as label values.
var resultLabels = map[dispatchv1.BuildStatus]string{
	dispatchv1.BuildStatus_BUILD_STATUS_BUILT:                     "built",
	dispatchv1.BuildStatus_BUILD_STATUS_SUBSTITUTED:               "substituted",
	dispatchv1.BuildStatus_BUILD_STATUS_ALREADY_VALID:             "already_valid",
	dispatchv1.BuildStatus_BUILD_STATUS_RESOLVES_TO_ALREADY_VALID: "already_valid",
	dispatchv1.BuildStatus_BUILD_STATUS_TIMED_OUT:                 "timed_out",
	dispatchv1.BuildStatus_BUILD_STATUS_LOG_LIMIT_EXCEEDED:        "log_limit_exceeded",
	dispatchv1.BuildStatus_BUILD_STATUS_CANCELLED:                 "cancelled",
	dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE:              "not_built",
}

// buildEnded counts a build. What is not in resultLabels is the derivation's own
// failure.
func (m *metrics) buildEnded(b *build, o outcome) {
	result, ok := resultLabels[o.status]
	if !ok {
		result = "failed"
	}
	machine := o.machine
	if machine == "" {
		machine = otherLabel
	}
	m.builds.WithLabelValues(machine, m.system(b.drv.Platform), result).Inc()
	if o.duration > 0 {
		m.buildDuration.WithLabelValues(machine).Observe(o.duration.Seconds())
	}
}

// placed notes that a machine was chosen for a build.
func (m *metrics) placed(b *build) {
	m.queueDuration.WithLabelValues(m.system(b.drv.Platform)).Observe(time.Since(b.queued).Seconds())
}

// A stateCollector reports the state of machines and queue from one snapshot a
// scrape, so that the numbers agree with each other.
type stateCollector struct {
	d *Daemon

	up, slots, inUse, queued, connects *prometheus.Desc
}

func newStateCollector(d *Daemon) *stateCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(prometheus.BuildFQName(metricsPrefix, "", name), help, labels, nil)
	}
	return &stateCollector{
		d:        d,
		up:       desc("machine_up", "Whether the machine can be given builds.", "machine"),
		slots:    desc("machine_slots", "Builds the machine may run at once (max-jobs).", "machine"),
		inUse:    desc("machine_slots_in_use", "Build slots in use.", "machine"),
		queued:   desc("builds_queued", "Builds waiting for a machine; system is \"other\" if no machine has it.", "system"),
		connects: desc("ssh_connects_total", "SSH connections made (ok) and attempts that failed (failed).", "machine", "result"),
	}
}

// Describe implements prometheus.Collector.
func (c *stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.up, c.slots, c.inUse, c.queued, c.connects} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *stateCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, label string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, label)
	}
	machines, systems := c.d.dispatcher.load()
	for _, m := range machines {
		up := 0.0
		if m.State == scheduler.Up {
			up = 1
		}
		gauge(c.up, up, string(m.ID))
		gauge(c.slots, float64(m.Slots), string(m.ID))
		gauge(c.inUse, float64(m.Running+m.Held), string(m.ID))
	}
	for uri, m := range c.d.machines.byURI {
		s := m.host.Status()
		ch <- prometheus.MustNewConstMetric(c.connects, prometheus.CounterValue, float64(s.Connects), uri, "ok")
		ch <- prometheus.MustNewConstMetric(c.connects, prometheus.CounterValue, float64(s.ConnectFailures), uri, "failed")
	}
	queued := map[string]int{otherLabel: 0}
	for system := range c.d.metrics.systems {
		queued[system] = 0
	}
	for _, s := range systems {
		queued[c.d.metrics.system(s.System)] += s.Queued
	}
	for system, n := range queued {
		gauge(c.queued, float64(n), system)
	}
}
