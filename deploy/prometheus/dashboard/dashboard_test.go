package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"nixdispatch/deploy/fleet"
)

func TestDashboardIsUpToDate(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	if err := write(&b); err != nil {
		t.Fatal(err)
	}
	committed, err := os.ReadFile("../dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(committed, b.Bytes()) {
		t.Error("deploy/prometheus/dashboard.json is not what its source makes: run 'make dashboard'")
	}
}

// TestQueriesArePromQL has promtool parse each query, as the expression of a rule.
func TestQueriesArePromQL(t *testing.T) {
	t.Parallel()
	promtool := fleet.RequireProgram(t, "promtool")
	var rules strings.Builder
	rules.WriteString("groups:\n- name: dashboard\n  rules:\n")
	for _, r := range rows() {
		for _, p := range r.panels {
			for n, q := range p.queries {
				rules.WriteString("  - record: r\n    labels: {panel: " + strconv.Quote(p.title+" "+strconv.Itoa(n)) + "}\n    expr: " + strconv.Quote(q.expr) + "\n")
			}
		}
	}
	file := filepath.Join(t.TempDir(), "rules.yml")
	if err := os.WriteFile(file, []byte(rules.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), promtool, "check", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool: %v\n%s", err, out)
	}
}

// TestPanelsFit looks for panels that overlap, or reach beyond Grafana's grid.
func TestPanelsFit(t *testing.T) {
	t.Parallel()
	taken := make(map[[2]int]any)
	ids := make(map[any]bool)
	for _, p := range grafana(rows())["panels"].([]object) {
		if ids[p["id"]] {
			t.Errorf("two panels have the id %v", p["id"])
		}
		ids[p["id"]] = true
		at := p["gridPos"].(object)
		x, y, w, h := at["x"].(int), at["y"].(int), at["w"].(int), at["h"].(int)
		if x+w > gridWidth || w == 0 || h == 0 {
			t.Errorf("%v does not fit into the grid: %v", p["title"], at)
		}
		for i := range w {
			for j := range h {
				cell := [2]int{x + i, y + j}
				if taken[cell] != nil {
					t.Fatalf("%v and %v overlap", taken[cell], p["title"])
				}
				taken[cell] = p["title"]
			}
		}
	}
	if len(ids) < 20 {
		t.Errorf("%d panels only", len(ids))
	}
}
