package main

// A row is a heading with panels below it.
type row struct {
	title  string
	panels []panel
}

// A panel is one picture. Panels of a row stand beside each other as long as there
// is room: Grafana's grid is 24 wide.
type panel struct {
	kind          kind
	title, help   string
	unit          string // Grafana's name of it
	width, height int
	stacked       bool
	queries       []query
	// Values from red on, or from amber on, are shown in that colour; zero for never.
	amber, red float64
	// below turns the order round: values below are bad.
	below bool
}

// A query is a PromQL expression. $instance and $machine are what was chosen above
// the dashboard.
type query struct{ expr, legend string }

// The kinds of panels, by Grafana's names.
type kind string

const (
	stat     kind = "stat"
	series   kind = "timeseries"
	timeline kind = "state-timeline"
	table    kind = "table"
)

// Units, by Grafana's names.
const (
	count     = "short"
	seconds   = "s"
	ratio     = "percentunit"
	byteCount = "bytes"
	bytesSec  = "Bps"
	perMin    = "opm"
)

func rows() []row {
	return []row{now(), builds(), machines(), condition(), copies(), daemon()}
}

func now() row {
	tile := func(title, help, unit, expr string) panel {
		return panel{kind: stat, title: title, help: help, unit: unit, width: 4, height: 4, queries: []query{{expr, ""}}}
	}
	up := tile("Machines up", "Those that can be given builds.", count,
		`sum(nix_dispatch_machine_up{instance=~"$instance"})`)
	up.red, up.below = 1, true
	down := tile("Machines down", "Without those that were drained.", count,
		`count((nix_dispatch_machine_up{instance=~"$instance"} == 0) unless on (job, instance, machine) (nix_dispatch_machine_drained == 1)) or vector(0)`)
	down.amber = 1
	full := tile("Slots in use", "Of the slots of machines that are up.", ratio,
		`sum(nix_dispatch_machine_slots_in_use{instance=~"$instance"}) / sum(nix_dispatch_machine_slots{instance=~"$instance"} * nix_dispatch_machine_up{instance=~"$instance"})`)
	queued := tile("Builds queued", "They wait for a machine.", count,
		`sum(nix_dispatch_builds_queued{instance=~"$instance"})`)
	oldest := tile("Longest wait", "Of a build that waits for a machine now.", seconds,
		`max(nix_dispatch_builds_queued_oldest_age_seconds{instance=~"$instance"})`)
	oldest.amber, oldest.red = 1800, 7200
	broken := tile("List of machines", "1: as it was written. 0: it is broken, and not used.", count,
		`min(nix_dispatch_machines_last_reload_successful{instance=~"$instance"})`)
	broken.red, broken.below = 1, true
	return row{"Now", []panel{up, down, full, queued, oldest, broken}}
}

func builds() row {
	return row{"Builds", []panel{
		{
			kind: series, title: "Slots in use", help: "By machine.",
			unit: count, width: 12, height: 8, stacked: true,
			queries: []query{
				{`sum by (machine) (nix_dispatch_machine_slots_in_use{instance=~"$instance", machine=~"$machine"})`, "{{machine}}"},
			},
		},
		{
			kind: series, title: "Builds that wait", help: "For a machine, by system, and those that no machine can ever take.",
			unit: count, width: 12, height: 8, stacked: true,
			queries: []query{
				{`sum by (system) (nix_dispatch_builds_queued{instance=~"$instance"})`, "{{system}}"},
				{`sum by (system) (nix_dispatch_builds_unplaceable{instance=~"$instance"}) > 0`, "{{system}}, no machine can"},
			},
		},
		{
			kind: series, title: "Builds ended per minute", help: "By result; failed are the derivations' own failures.",
			unit: perMin, width: 12, height: 8, stacked: true,
			queries: []query{
				{`60 * sum by (result) (rate(nix_dispatch_builds_total{instance=~"$instance", machine=~"$machine|other"}[5m]))`, "{{result}}"},
			},
		},
		{
			kind: series, title: "Wait for a machine", help: "From acceptance until a machine was chosen.",
			unit: seconds, width: 12, height: 8,
			queries: []query{
				{`histogram_quantile(0.5, sum by (le) (rate(nix_dispatch_build_queue_duration_seconds_bucket{instance=~"$instance"}[5m])))`, "half of the builds"},
				{`histogram_quantile(0.9, sum by (le) (rate(nix_dispatch_build_queue_duration_seconds_bucket{instance=~"$instance"}[5m])))`, "nine of ten"},
			},
		},
	}}
}

func machines() row {
	return row{"Machines", []panel{
		{
			kind: timeline, title: "Up", help: "1: can be given builds.", unit: count, width: 24, height: 7, red: 1, below: true,
			queries: []query{{`min by (machine) (nix_dispatch_machine_up{instance=~"$instance", machine=~"$machine"})`, "{{machine}}"}},
		},
		{
			kind: table, title: "Down, and why", help: "The reason in a word; nix-dispatch status has it in full.",
			unit: count, width: 12, height: 8,
			queries: []query{{`max by (instance, machine, reason) (nix_dispatch_machine_down{instance=~"$instance", machine=~"$machine"})`, ""}},
		},
		{
			kind: series, title: "Attempts that machines failed", help: "In five minutes; the builds were tried anew.",
			unit: count, width: 12, height: 8, stacked: true,
			queries: []query{{`sum by (machine, reason) (increase(nix_dispatch_attempts_failed_total{instance=~"$instance", machine=~"$machine"}[5m])) > 0`, "{{machine}}: {{reason}}"}},
		},
		{
			kind: series, title: "Build time, nine of ten", help: "Of the remote build itself, in the last hour.",
			unit: seconds, width: 12, height: 8,
			queries: []query{{`histogram_quantile(0.9, sum by (machine, le) (rate(nix_dispatch_build_duration_seconds_bucket{instance=~"$instance", machine=~"$machine"}[1h])))`, "{{machine}}"}},
		},
		{
			kind: series, title: "Slots that are no build's", help: "Held: the connection was lost, and the build may still run. Otherwise in use by nothing, which should not last.",
			unit: count, width: 12, height: 8, stacked: true,
			queries: []query{
				{`sum by (machine) (nix_dispatch_machine_slots_held{instance=~"$instance", machine=~"$machine"})`, "{{machine}}: held"},
				{`sum by (machine) (nix_dispatch_machine_slots_in_use{instance=~"$instance", machine=~"$machine"} - nix_dispatch_machine_slots_held - nix_dispatch_machine_builds_running)`, "{{machine}}: by nothing"},
			},
		},
	}}
}

func condition() row {
	mine := `{instance=~"$instance", machine=~"$machine"}`
	share := func(title, help, part, whole string) panel {
		return panel{
			kind: series, title: title, help: help, unit: ratio, width: 8, height: 8,
			queries: []query{{`min by (machine) (nix_dispatch_machine_` + part + mine + ` / nix_dispatch_machine_` + whole + mine + `)`, "{{machine}}"}},
		}
	}
	waits := share("Waiting for something", "Share of ten seconds in which some process waited: pressure (PSI) of cpu, memory and io.", "", "")
	waits.queries = []query{{`max by (machine, resource) (nix_dispatch_machine_pressure_ratio` + mine + `)`, "{{machine}}: {{resource}}"}}
	parked := panel{
		kind: table, title: "Parked, and why", help: "They are given no builds until there is enough of it again.",
		unit: count, width: 8, height: 8,
		queries: []query{{`max by (instance, machine, reason) (nix_dispatch_machine_parked` + mine + `)`, ""}},
	}
	load := share("Load", "Average of five minutes, for each core.", "load5", "cores")
	load.unit = count
	return row{"Condition of the machines", []panel{
		share("Free disk, store", "Of the file system of the store.", "store_free_bytes", "store_size_bytes"),
		share("Free disk, builds", "Of the file system that builds are made in.", "build_dir_free_bytes", "build_dir_size_bytes"),
		share("Free memory", "What can be had without swapping.", "memory_available_bytes", "memory_size_bytes"),
		load, waits, parked,
	}}
}

func copies() row {
	return row{"Copies and connections", []panel{
		{
			kind: series, title: "To machines", help: "Bytes of NARs.", unit: bytesSec, width: 8, height: 8, stacked: true,
			queries: []query{{`sum by (machine) (rate(nix_dispatch_nar_bytes_total{instance=~"$instance", machine=~"$machine", direction="up"}[5m]))`, "{{machine}}"}},
		},
		{
			kind: series, title: "From machines", help: "Bytes of NARs.", unit: bytesSec, width: 8, height: 8, stacked: true,
			queries: []query{{`sum by (machine) (rate(nix_dispatch_nar_bytes_total{instance=~"$instance", machine=~"$machine", direction="down"}[5m]))`, "{{machine}}"}},
		},
		{
			kind: series, title: "Connections in five minutes", help: "Made, and failed.", unit: count, width: 8, height: 8,
			queries: []query{{`sum by (machine, result) (increase(nix_dispatch_ssh_connects_total{instance=~"$instance", machine=~"$machine"}[5m]))`, "{{machine}}: {{result}}"}},
		},
	}}
}

func daemon() row {
	return row{"nix-dispatchd", []panel{
		{
			kind: series, title: "Memory", unit: byteCount, width: 8, height: 7,
			queries: []query{{`process_resident_memory_bytes{job="nix-dispatch", instance=~"$instance"}`, "{{instance}}"}},
		},
		{
			kind: series, title: "Processor time", help: "Of one processor.", unit: ratio, width: 8, height: 7,
			queries: []query{{`rate(process_cpu_seconds_total{job="nix-dispatch", instance=~"$instance"}[5m])`, "{{instance}}"}},
		},
		{
			kind: series, title: "Goroutines and open files", unit: count, width: 8, height: 7,
			queries: []query{
				{`go_goroutines{job="nix-dispatch", instance=~"$instance"}`, "{{instance}}: goroutines"},
				{`process_open_fds{job="nix-dispatch", instance=~"$instance"}`, "{{instance}}: open files"},
			},
		},
	}}
}
