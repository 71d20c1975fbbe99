package daemon

import (
	"maps"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"nixdispatch/daemon/usage"
	"nixdispatch/scheduler"
)

// A stateCollector reports the state of machines and queue from one snapshot a
// scrape, so that the numbers agree with each other.
type stateCollector struct {
	d *Daemon

	up, down, drained, parked, suspect      *prometheus.Desc
	connects                                *prometheus.Desc
	slots, inUse, held, staging             *prometheus.Desc
	queued, unplaceable, builds, oldestWait *prometheus.Desc
	ended                                   *prometheus.Desc
	reloads, reloadOK, reloadTime           *prometheus.Desc
	users, refused                          *prometheus.Desc
	load                                    []loadGauge
}

func newStateCollector(d *Daemon) *stateCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(prometheus.BuildFQName(metricsPrefix, "", name), help, labels, nil)
	}
	return &stateCollector{
		d:           d,
		up:          desc("machine_up", "Whether the machine can be given builds.", "machine"),
		down:        desc("machine_down", "1 for each machine that is down, with the reason.", "machine", "reason"),
		drained:     desc("machine_drained", "Whether the machine was drained.", "machine"),
		parked:      desc("machine_parked", "1 for each machine that is parked, with what it is short of.", "machine", "reason"),
		suspect:     desc("machine_suspect", "Whether the machine does not answer though it is connected to.", "machine"),
		slots:       desc("machine_slots", "Builds the machine may run at once (max-jobs).", "machine"),
		inUse:       desc("machine_slots_in_use", "Build slots in use.", "machine"),
		held:        desc("machine_slots_held", "Slots in use by builds whose connection was lost and that may still run there.", "machine"),
		staging:     desc("machine_builds_staging", "Builds whose inputs travel to the machine, or that wait there for a slot.", "machine"),
		connects:    desc("ssh_connects_total", "SSH connections made (ok) and attempts that failed (failed).", "machine", "result"),
		queued:      desc("builds_queued", "Builds waiting for a machine that could take them; system is \"other\" if no machine has it.", "system"),
		unplaceable: desc("builds_unplaceable", "Builds waiting though no machine can ever take them, as the machines are now.", "system"),
		builds:      desc("builds_in_progress", "Builds that are queued, on a machine or being fetched from one."),
		ended:       desc("builds_total", "Builds that ended, by machine, system and result; machine is \"other\" if none was chosen, or one that only a request has named.", "machine", "system", "result"),
		oldestWait:  desc("builds_queued_oldest_age_seconds", "How long the build has waited for a machine that has waited longest; 0 if none waits."),
		reloads:     desc("machines_reloads_total", "Attempts to read the list of machines anew that changed it (ok) or not (failed).", "result"),
		reloadOK:    desc("machines_last_reload_successful", "Whether the list of machines had no bad entry when it was last read."),
		reloadTime:  desc("machines_last_reload_success_timestamp_seconds", "When the list of machines in use was read."),
		users:       desc("users", "Users with anything in progress: connections, calls, builds."),
		refused:     desc("user_refusals_total", "What was refused, or of a log dropped, because one user had as much of it as one user may.", "bound"),
		load:        loadGauges(),
	}
}

// Describe implements prometheus.Collector.
func (c *stateCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		c.up, c.down, c.drained, c.parked, c.suspect, c.connects,
		c.slots, c.inUse, c.held, c.staging,
		c.queued, c.unplaceable, c.builds, c.oldestWait, c.ended,
		c.reloads, c.reloadOK, c.reloadTime,
		c.users, c.refused,
	} {
		ch <- d
	}
	for _, g := range c.load {
		ch <- g.desc
	}
}

// Collect implements prometheus.Collector.
func (c *stateCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	var ended map[endedLabels]int
	load := c.d.dispatcher.load(func() { ended = c.d.metrics.endedBuilds() })
	for l, n := range ended {
		counter(c.ended, float64(n), l.machine, l.system, l.result)
	}
	for _, m := range c.labelled(c.d.machineStatuses(load.machines)) {
		gauge(c.up, oneIf((m.state == scheduler.Up || m.state == scheduler.Suspect) && !m.removed), m.uri)
		gauge(c.suspect, oneIf(m.state == scheduler.Suspect && !m.removed), m.uri)
		gauge(c.drained, oneIf(m.drained), m.uri)
		gauge(c.slots, float64(m.slots), m.uri)
		gauge(c.inUse, float64(m.inUse), m.uri)
		gauge(c.held, float64(m.held), m.uri)
		gauge(c.staging, float64(m.staging), m.uri)
		if m.state == scheduler.Down && m.uri != otherLabel {
			gauge(c.down, 1, m.uri, m.down)
		}
		if m.state == scheduler.Parked && m.uri != otherLabel {
			gauge(c.parked, 1, m.uri, m.parked)
		}
		c.collectLoad(m, gauge)
	}
	connects := make(map[string]connectCounts)
	for uri, n := range c.d.machines.connects() {
		label := c.d.metrics.machine(uri)
		connects[label] = connects[label].plus(n)
	}
	for label, n := range connects {
		counter(c.connects, float64(n.ok), label, "ok")
		counter(c.connects, float64(n.failed), label, "failed")
	}
	queued, unplaceable := c.d.metrics.perSystem(), c.d.metrics.perSystem()
	for _, s := range load.systems {
		queued[c.d.metrics.system(s.System)] += s.Queued - s.Unplaceable
		unplaceable[c.d.metrics.system(s.System)] += s.Unplaceable
	}
	for system, n := range queued {
		gauge(c.queued, float64(n), system)
		gauge(c.unplaceable, float64(unplaceable[system]), system)
	}
	gauge(c.builds, float64(load.builds))
	oldest := time.Duration(0)
	if !load.waiting.IsZero() {
		oldest = time.Since(load.waiting)
	}
	gauge(c.oldestWait, oldest.Seconds())
	c.collectReload(gauge, counter)
	gauge(c.users, float64(len(c.d.usage.Users())))
	for r, n := range c.d.usage.Refused() {
		if c.d.usage.Bounds()[r] > 0 {
			counter(c.refused, float64(n), usage.Resource(r).String())
		}
	}
}

// labelled makes one of all machines that share the label "other".
func (c *stateCollector) labelled(machines []*machineStatus) []*machineStatus {
	var out []*machineStatus
	var others *machineStatus
	for _, m := range machines {
		switch {
		case c.d.metrics.machine(m.uri) == m.uri:
			out = append(out, m)
		case others == nil:
			all := *m
			all.uri, others = otherLabel, &all
			out = append(out, others)
		default:
			if m.state == scheduler.Up {
				others.state = m.state
			}
			others.slots += m.slots
			others.inUse += m.inUse
			others.held += m.held
			others.staging += m.staging
			others.drained = others.drained || m.drained
			others.removed = others.removed && m.removed
		}
	}
	return out
}

func (c *stateCollector) collectReload(gauge, counter func(*prometheus.Desc, float64, ...string)) {
	r := &c.d.reload
	r.lastMu.Lock()
	defer r.lastMu.Unlock()
	counter(c.reloads, float64(r.ok), "ok")
	counter(c.reloads, float64(r.failed), "failed")
	gauge(c.reloadOK, oneIf(r.lastList != nil && len(r.lastList.errs) == 0))
	if !r.loaded.IsZero() {
		gauge(c.reloadTime, float64(r.loaded.UnixMilli())/1000)
	}
}

// perSystem is a zero for every label value of a system.
func (m *metrics) perSystem() map[string]int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	zeros := map[string]int{otherLabel: 0}
	for system := range maps.Keys(m.systems) {
		zeros[system] = 0
	}
	return zeros
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
