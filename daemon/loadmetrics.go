package daemon

import (
	"github.com/prometheus/client_golang/prometheus"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// A loadGauge is one number that a machine may tell of itself. There is no series
// for a machine that does not tell it.
type loadGauge struct {
	desc *prometheus.Desc
	get  func(*dispatchv1.MachineLoad) *float64
	more []string // values of further labels
}

// loadGauges are all such numbers.
func loadGauges() []loadGauge {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(prometheus.BuildFQName(metricsPrefix, "machine", name), help, append([]string{"machine"}, labels...), nil)
	}
	bytes := func(name, help string, get func(*dispatchv1.MachineLoad) *uint64) loadGauge {
		return loadGauge{desc: desc(name, help), get: func(l *dispatchv1.MachineLoad) *float64 { return float(get(l)) }}
	}
	plain := func(name, help string, get func(*dispatchv1.MachineLoad) *float64) loadGauge {
		return loadGauge{desc: desc(name, help), get: get}
	}
	gauges := []loadGauge{
		bytes("store_free_bytes", "Free space on the file system of the machine's store.",
			func(l *dispatchv1.MachineLoad) *uint64 { return l.StoreFreeBytes }),
		bytes("store_size_bytes", "Size of the file system of the machine's store.",
			func(l *dispatchv1.MachineLoad) *uint64 { return l.StoreSizeBytes }),
		bytes("build_dir_free_bytes", "Free space on the file system that the machine builds in.",
			func(l *dispatchv1.MachineLoad) *uint64 { return l.BuildDirFreeBytes }),
		bytes("build_dir_size_bytes", "Size of the file system that the machine builds in.",
			func(l *dispatchv1.MachineLoad) *uint64 { return l.BuildDirSizeBytes }),
		bytes("memory_available_bytes", "Memory that the machine has to give without swapping.",
			func(l *dispatchv1.MachineLoad) *uint64 { return l.MemoryAvailableBytes }),
		bytes("memory_size_bytes", "Memory that the machine has.",
			func(l *dispatchv1.MachineLoad) *uint64 { return l.MemorySizeBytes }),
		plain("load1", "The machine's load average of one minute.", func(l *dispatchv1.MachineLoad) *float64 { return l.Load1 }),
		plain("load5", "The machine's load average of five minutes.", func(l *dispatchv1.MachineLoad) *float64 { return l.Load5 }),
		plain("load15", "The machine's load average of fifteen minutes.", func(l *dispatchv1.MachineLoad) *float64 { return l.Load15 }),
		plain("cores", "Cores that the machine has.", func(l *dispatchv1.MachineLoad) *float64 { return float(l.Cores) }),
		plain("load_timestamp_seconds", "When the machine was last asked for its disk space and load.",
			func(l *dispatchv1.MachineLoad) *float64 {
				at := float64(l.GetTime().AsTime().UnixMilli()) / 1000
				return &at
			}),
	}
	pressure := desc("pressure_ratio", "Share of the last ten seconds in which a process of the machine waited for it (PSI).", "resource")
	for resource, get := range map[string]func(*dispatchv1.MachineLoad) *float64{
		"cpu":    func(l *dispatchv1.MachineLoad) *float64 { return l.CpuPressure },
		"memory": func(l *dispatchv1.MachineLoad) *float64 { return l.MemoryPressure },
		"io":     func(l *dispatchv1.MachineLoad) *float64 { return l.IoPressure },
	} {
		gauges = append(gauges, loadGauge{desc: pressure, get: get, more: []string{resource}})
	}
	return gauges
}

func float[T uint32 | uint64](n *T) *float64 {
	if n == nil {
		return nil
	}
	f := float64(*n)
	return &f
}

// collectLoad passes on what is known of a machine's load.
func (c *stateCollector) collectLoad(m *machineStatus, gauge func(*prometheus.Desc, float64, ...string)) {
	if m.load == nil || m.uri == otherLabel {
		return
	}
	for _, g := range c.load {
		if v := g.get(m.load); v != nil {
			gauge(g.desc, *v, append([]string{m.uri}, g.more...)...)
		}
	}
}
