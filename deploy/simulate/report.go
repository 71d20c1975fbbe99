package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
)

func writeTable(w io.Writer, cfg config, results []result) error {
	fmt.Fprintf(w, "%d derivations for %d client(s), %s of work each, on %d machine(s); %.0f Mbit/s and %s to each\n\n",
		len(cfg.graph), cfg.clients, cfg.work, len(cfg.machines), cfg.costs.Bandwidth*8/1e6, cfg.costs.RoundTrip)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "rule\tseed\tbound s\tmakespan s\tratio\tmean client s\tbusy\tsent MB\tfetched MB\tlocal\t\n")
	for _, r := range results {
		fmt.Fprintf(t, "%s\t%d\t%.1f\t%.1f\t%.2f\t%.1f\t%.0f%%\t%.0f\t%.0f\t%d\t\n",
			r.Rule, r.Seed, r.Bound, r.Makespan, r.Ratio, r.Mean, 100*r.Busy, float64(r.Sent)/1e6, float64(r.Fetched)/1e6, r.Local)
	}
	return t.Flush()
}

func writeJSON(w io.Writer, cfg config, results []result) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(struct {
		Derivations int      `json:"derivations"`
		Clients     int      `json:"clients"`
		Machines    int      `json:"machines"`
		Work        seconds  `json:"work_seconds"`
		Results     []result `json:"results"`
	}{len(cfg.graph), cfg.clients, len(cfg.machines), inSeconds(cfg.work), results})
}
