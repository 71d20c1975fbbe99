package daemon

import (
	"maps"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
)

// exported are the metrics of ours that the registry has, whether or not there are
// values yet, with their labels.
func exported(t *testing.T, m *metrics) map[string][]string {
	t.Helper()
	ch := make(chan *prometheus.Desc)
	go func() {
		m.registry.Describe(ch)
		close(ch)
	}()
	// A Desc has no other way to tell.
	form := regexp.MustCompile(`^Desc\{fqName: "([^"]*)", help: ".*", constLabels: \{.*\}, variableLabels: \{(.*)\}\}$`)
	all := make(map[string][]string)
	for d := range ch {
		parts := form.FindStringSubmatch(d.String())
		if parts == nil {
			t.Fatalf("cannot read %s", d)
		}
		if strings.HasPrefix(parts[1], metricsPrefix+"_") {
			all[parts[1]] = strings.FieldsFunc(parts[2], func(r rune) bool { return r == ',' })
		}
	}
	return all
}

func docFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestMetricsAreDocumented compares docs/metrics.md with what there is.
func TestMetricsAreDocumented(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{})
	documented := make(map[string][]string)
	row := regexp.MustCompile("(?m)^\\| `(nix_dispatch_[a-z0-9_]+)` \\| ([^|]*)\\| [^|]+ \\|$")
	for _, m := range row.FindAllStringSubmatch(docFile(t, "../docs/metrics.md"), -1) {
		documented[m[1]] = strings.FieldsFunc(m[2], func(r rune) bool { return strings.ContainsRune("`, ", r) })
	}
	if d := cmp.Diff(exported(t, s.d.metrics), documented); d != "" {
		t.Errorf("docs/metrics.md differs from the metrics (-metrics +documented)\n%s", d)
	}
}

// TestMetricsThatAreUsedExist looks up every metric in what is made for Prometheus
// and Grafana, and in the documents.
func TestMetricsThatAreUsedExist(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{})
	known := exported(t, s.d.metrics)
	for name := range maps.Clone(known) {
		if strings.HasSuffix(name, "_duration_seconds") {
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				known[name+suffix] = nil
			}
		}
	}
	name := regexp.MustCompile(`(:?)\bnix_dispatch_[a-z0-9_]+`)
	used := make(map[string]bool)
	for _, file := range []string{
		"../deploy/prometheus/rules.yml", "../deploy/prometheus/rules_test.yml", "../deploy/prometheus/dashboard.json",
		"../docs/metrics.md", "../docs/operations.md", "../docs/troubleshooting.md", "../README.md",
	} {
		for _, m := range name.FindAllStringSubmatch(docFile(t, file), -1) {
			if metric := m[0]; m[1] == "" && metric != metricsPrefix+"_" {
				used[metric] = true
				if _, ok := known[metric]; !ok {
					t.Errorf("%s: there is no %s", file, metric)
				}
			}
		}
	}
	if len(used) < 20 {
		t.Errorf("only %d metrics were found in use", len(used))
	}
}
