package daemon

import (
	"maps"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

const metricsPrefix = "nix_dispatch"

// otherLabel stands for every value outside the bounded set of a label: systems
// that no machine has, machines that only requests have named, builds that no
// machine took.
const otherLabel = "other"

// metrics are the daemon's instruments. Events are counted by its methods; the
// state of machines and queue is read at each scrape by a stateCollector.
// Safe for concurrent use.
type metrics struct {
	registry *prometheus.Registry

	mu      sync.RWMutex
	systems map[string]bool // the label values of "system"
	// machines are the label values of "machine": those that are, or have been, in
	// the daemon's own list, until they are gone.
	machines map[string]bool
	// ended counts the builds that have ended. The stateCollector reports it, for one
	// scrape must not count a build both here and among those in progress.
	ended map[endedLabels]int

	buildDuration *prometheus.HistogramVec
	queueDuration *prometheus.HistogramVec
	narBytes      *prometheus.CounterVec
	unplaceable   *prometheus.CounterVec
	failures      *prometheus.CounterVec
	hedges        *prometheus.CounterVec
	builders      *prometheus.GaugeVec
}

// An endedLabels is what builds that have ended are counted by.
type endedLabels struct{ machine, system, result string }

// newMetrics makes the instruments, without any machine.
func newMetrics(version string) *metrics {
	r := prometheus.NewRegistry()
	f := promauto.With(r)
	m := &metrics{registry: r, systems: map[string]bool{"builtin": true}, machines: make(map[string]bool), ended: make(map[endedLabels]int)}
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
	m.unplaceable = f.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricsPrefix, Name: "derivations_unplaceable_total",
		Help: "Derivations asked for that no machine could ever build, and that were left to the local Nix.",
	}, []string{"system"})
	m.failures = f.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricsPrefix, Name: "attempts_failed_total",
		Help: "Attempts at builds that failed by the machine's fault, or of the way to it, by what failed; the build is tried anew, three times in all.",
	}, []string{"machine", "reason"})
	m.hedges = f.NewCounterVec(prometheus.CounterOpts{
		Namespace: metricsPrefix, Name: "second_attempts_total",
		Help: "Builds that were started on a second machine because the first did not answer, by how that ended.",
	}, []string{"result"})
	for _, result := range []string{hedgeWon, hedgeOutrun, hedgeFailed} {
		m.hedges.WithLabelValues(result)
	}
	m.builders = f.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: metricsPrefix, Name: "machine_builds_running",
		Help: "Remote builds under way. Each has a slot in use; a slot without one is held, or leaked.",
	}, []string{"machine"})
	info := f.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: metricsPrefix, Name: "build_info",
		Help: "Always 1; the labels say which program this is.",
	}, []string{"version", "goversion"})
	info.WithLabelValues(version, runtime.Version()).Set(1)
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// know makes the systems and machines of a list label values, with the machines'
// counters at zero if they are new. Systems of earlier lists become "other".
func (m *metrics) know(list *machineList) {
	m.mu.Lock()
	m.systems = map[string]bool{"builtin": true}
	for _, line := range list.lines {
		for _, s := range line.SystemTypes {
			m.systems[s] = true
		}
		m.machines[line.StoreURI] = true
	}
	for _, line := range list.lines {
		for _, s := range line.SystemTypes {
			m.ended[endedLabels{line.StoreURI, s, "built"}] += 0
			m.ended[endedLabels{line.StoreURI, s, resultFailed}] += 0
		}
	}
	m.mu.Unlock()
	// A counter that is born with its first event has no increase then.
	for _, line := range list.lines {
		for _, s := range line.SystemTypes {
			m.unplaceable.WithLabelValues(s)
		}
		m.sent(line.StoreURI)
		m.received(line.StoreURI)
		m.running(line.StoreURI)
		for _, reason := range failureKinds() {
			m.failures.WithLabelValues(line.StoreURI, reason)
		}
	}
}

// forget drops the counters of a machine that is gone, so that machines that come
// and go do not pile up.
func (m *metrics) forget(machine string) {
	m.mu.Lock()
	delete(m.machines, machine)
	maps.DeleteFunc(m.ended, func(l endedLabels, _ int) bool { return l.machine == machine })
	m.mu.Unlock()
	label := prometheus.Labels{"machine": machine}
	m.buildDuration.DeletePartialMatch(label)
	m.narBytes.DeletePartialMatch(label)
	m.failures.DeletePartialMatch(label)
	m.builders.DeletePartialMatch(label)
}

func (m *metrics) sent(machine string) prometheus.Counter {
	return m.narBytes.WithLabelValues(m.machine(machine), "up")
}

func (m *metrics) received(machine string) prometheus.Counter {
	return m.narBytes.WithLabelValues(m.machine(machine), "down")
}

// running counts the remote builds under way on a machine. Who adds to it keeps
// it, to take away from the same.
func (m *metrics) running(machine string) prometheus.Gauge {
	return m.builders.WithLabelValues(m.machine(machine))
}

// attemptFailed counts an attempt that the machine failed, for one of the reasons
// of failureReason.
func (m *metrics) attemptFailed(machine, reason string) {
	m.failures.WithLabelValues(m.machine(machine), reason).Inc()
}

// machine keeps the label bounded: those who may name machines choose them freely.
func (m *metrics) machine(uri string) string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return knownLabel(m.machines, uri)
}

// system keeps the label bounded: callers choose derivations' systems freely.
func (m *metrics) system(s string) string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return knownLabel(m.systems, s)
}

func knownLabel(known map[string]bool, value string) string {
	if known[value] {
		return value
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

// resultFailed is what is not in resultLabels: the derivation's own failure.
const resultFailed = "failed"

// buildEnded counts a build. It waits for nothing.
func (m *metrics) buildEnded(b *build, o outcome) {
	result, ok := resultLabels[o.status]
	if !ok {
		result = resultFailed
	}
	m.mu.Lock()
	machine := knownLabel(m.machines, o.machine)
	m.ended[endedLabels{machine, knownLabel(m.systems, b.drv.Platform), result}]++
	m.mu.Unlock()
	if o.duration > 0 {
		m.buildDuration.WithLabelValues(machine).Observe(o.duration.Seconds())
	}
}

// endedBuilds are the builds that have ended, in a map of the caller's own.
func (m *metrics) endedBuilds() map[endedLabels]int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return maps.Clone(m.ended)
}

// leftUnplaceable counts a derivation that no machine can ever build.
func (m *metrics) leftUnplaceable(drv *nix.Derivation) {
	m.unplaceable.WithLabelValues(m.system(drv.Platform)).Inc()
}

// placed notes that a machine was chosen for a build.
func (m *metrics) placed(b *build) {
	m.queueDuration.WithLabelValues(m.system(b.drv.Platform)).Observe(time.Since(b.queued).Seconds())
}
