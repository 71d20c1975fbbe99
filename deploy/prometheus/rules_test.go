package prometheus

import (
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/deploy/fleet"
)

// TestRules has promtool look at the files and run rules_test.yml.
func TestRules(t *testing.T) {
	promtool := fleet.RequireProgram(t, "promtool")
	for _, args := range [][]string{
		{"check", "config", "scrape.yml"},
		{"check", "rules", "rules.yml"},
		{"test", "rules", "rules_test.yml"},
	} {
		if out, err := exec.CommandContext(t.Context(), promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// TestAlertsUseWhatTheirGroupHasRecorded looks for a recorded name that another
// group uses, or a rule above the one that records it. Prometheus evaluates groups
// in no order, so that such a rule would work with an older value, and TestRules
// would find one number or another.
func TestAlertsUseWhatTheirGroupHasRecorded(t *testing.T) {
	rules, err := os.ReadFile("rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`\b\w+(:\w+)+\b`)
	var found int
	for _, group := range strings.Split(string(rules), "\n  - name: ")[1:] {
		recorded := make(map[string]bool)
		for _, rule := range strings.Split(group, "\n      - ")[1:] {
			name, isRecord := strings.CutPrefix(strings.SplitN(rule, "\n", 2)[0], "record: ")
			for _, used := range names.FindAllString(rule, -1) {
				if used == name {
					continue
				}
				found++
				if !recorded[used] {
					t.Errorf("no rule above it in its group records %s, used by\n%s", used, rule)
				}
			}
			if isRecord {
				recorded[name] = true
			}
		}
	}
	if found < 7 {
		t.Errorf("found %d uses of recorded names only", found)
	}
}

// names are the first groups of matches, sorted.
func names(matches [][]string) []string {
	var all []string
	for _, m := range matches {
		all = append(all, m[1])
	}
	slices.Sort(all)
	return all
}

// TestEveryRuleIsTested looks for rules that rules_test.yml says nothing about, of
// each alert that it fires and that it keeps silent, and for alerts that the
// documentation leaves out.
func TestEveryRuleIsTested(t *testing.T) {
	rules, err := os.ReadFile("rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile("rules_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	fires, silent := make(map[string]bool), make(map[string]bool)
	for _, m := range regexp.MustCompile(`alertname: (\w+)\n +exp_alerts:( \[\])?\n`).FindAllStringSubmatch(string(tests), -1) {
		if m[2] == "" {
			fires[m[1]] = true
		} else {
			silent[m[1]] = true
		}
	}
	alerts := regexp.MustCompile(`- alert: (\S+)`).FindAllStringSubmatch(string(rules), -1)
	for _, m := range alerts {
		if name := m[1]; !fires[name] || !silent[name] {
			t.Errorf("rules_test.yml has %s fire: %v, keep silent: %v; want both", name, fires[name], silent[name])
		}
	}
	doc, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := regexp.MustCompile("(?m)^\\| `(NixDispatch\\w+)` \\|").FindAllStringSubmatch(string(doc), -1)
	if d := cmp.Diff(names(alerts), names(documented)); d != "" {
		t.Errorf("alerts in docs/operations.md (-rules +documented)\n%s", d)
	}
	records := regexp.MustCompile(`- record: (\S+)`).FindAllStringSubmatch(string(rules), -1)
	for _, m := range records {
		name := m[1]
		if !strings.Contains(string(tests), "- expr: "+name+"\n") && strings.Count(string(rules), name) < 2 {
			t.Errorf("%s is tested neither by itself nor with an alert that uses it", name)
		}
	}
	if len(alerts) < 7 || len(records) < 7 {
		t.Errorf("found %d alerts and %d recording rules only", len(alerts), len(records))
	}
}
