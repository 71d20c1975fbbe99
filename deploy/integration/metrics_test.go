package integration

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"nixdispatch/deploy/fleet"
)

// samples are the values of metrics with their labels, as "name{a=b,c=d}"; of a
// histogram, its count.
type samples map[string]float64

// served is what the daemon serves at a path, got from inside the client.
func (s *site) served(path string) string {
	s.t.Helper()
	get := `exec 3<>/dev/tcp/127.0.0.1/9747; printf 'GET ` + path + ` HTTP/1.0\r\nHost: localhost\r\nAccept: text/plain\r\n\r\n' >&3; cat <&3`
	out, err := s.client.Run(s.t.Context(), "bash", "-c", get)
	if err != nil {
		s.t.Fatal(err)
	}
	head, text, ok := strings.Cut(out.Stdout, "\r\n\r\n")
	if !ok || !strings.Contains(head, " 200 OK") {
		s.t.Fatalf("%s answers %q", path, head)
	}
	return text
}

// scrape fetches /metrics as Prometheus does.
func (s *site) scrape() (text string, got samples) {
	s.t.Helper()
	text = s.served("/metrics")
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		s.t.Fatal(err)
	}
	got = make(samples)
	for name, f := range families {
		for _, m := range f.Metric {
			got[name+labels(m)] = value(m)
		}
	}
	return text, got
}

func labels(m *dto.Metric) string {
	var words []string
	for _, l := range m.Label {
		words = append(words, l.GetName()+"="+l.GetValue())
	}
	slices.Sort(words)
	return "{" + strings.Join(words, ",") + "}"
}

func value(m *dto.Metric) float64 {
	switch {
	case m.Counter != nil:
		return m.Counter.GetValue()
	case m.Gauge != nil:
		return m.Gauge.GetValue()
	case m.Histogram != nil:
		return float64(m.Histogram.GetSampleCount())
	default:
		return m.Untyped.GetValue()
	}
}

// only are the samples of ours, but build_info, whose names begin with one of
// prefixes.
func (all samples) only(prefixes ...string) samples {
	some := make(samples)
	for name, v := range all {
		if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, "nix_dispatch_"+p) }) {
			some[strings.TrimPrefix(name, "nix_dispatch_")] = v
		}
	}
	return some
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{jobs: 1, nixConf: "system-features = big-parallel here\nextra-platforms = riscv64-linux\n", machines: []machineConfig{
		{name: "mac", columns: "x86_64-linux - 1 1 - mac", host: fleet.HostConfig{SystemFeatures: []string{"mac"}}},
		{name: "mini", columns: "x86_64-linux,aarch64-linux - 2"},
	}})
	const mac, mini = "{machine=ssh://root@mac}", "{machine=ssh://root@mini}"

	t.Run("before any build", func(t *testing.T) {
		s := s.within(t)
		text, got := s.scrape()
		if problems, err := promlint.New(strings.NewReader(text)).Lint(); err != nil || len(problems) > 0 {
			t.Errorf("promlint: %v, %v", problems, err)
		}
		want := samples{
			"machine_up" + mac: 1, "machine_up" + mini: 1,
			"machine_slots" + mac: 1, "machine_slots" + mini: 2,
			"machine_slots_in_use" + mac: 0, "machine_slots_in_use" + mini: 0,
			"builds_queued{system=x86_64-linux}": 0, "builds_queued{system=aarch64-linux}": 0,
			"builds_queued{system=builtin}": 0, "builds_queued{system=other}": 0,
			"builds_unplaceable{system=x86_64-linux}": 0, "builds_unplaceable{system=aarch64-linux}": 0,
			"builds_unplaceable{system=builtin}": 0, "builds_unplaceable{system=other}": 0,
			"machine_drained" + mac: 0, "machine_drained" + mini: 0,
			"machine_suspect" + mac: 0, "machine_suspect" + mini: 0,
			"machine_slots_held" + mac: 0, "machine_slots_held" + mini: 0,
			"machine_builds_running" + mac: 0, "machine_builds_running" + mini: 0,
			"machine_builds_staging" + mac: 0, "machine_builds_staging" + mini: 0,
			"builds_in_progress{}": 0, "builds_queued_oldest_age_seconds{}": 0,
			"builds_total{machine=ssh://root@mac,result=built,system=x86_64-linux}":    0,
			"builds_total{machine=ssh://root@mac,result=failed,system=x86_64-linux}":   0,
			"builds_total{machine=ssh://root@mini,result=built,system=x86_64-linux}":   0,
			"builds_total{machine=ssh://root@mini,result=failed,system=x86_64-linux}":  0,
			"builds_total{machine=ssh://root@mini,result=built,system=aarch64-linux}":  0,
			"builds_total{machine=ssh://root@mini,result=failed,system=aarch64-linux}": 0,
			"nar_bytes_total{direction=up,machine=ssh://root@mac}":                     0, "nar_bytes_total{direction=down,machine=ssh://root@mac}": 0,
			"nar_bytes_total{direction=up,machine=ssh://root@mini}": 0, "nar_bytes_total{direction=down,machine=ssh://root@mini}": 0,
			"ssh_connects_total{machine=ssh://root@mac,result=ok}": 1, "ssh_connects_total{machine=ssh://root@mac,result=failed}": 0,
			"ssh_connects_total{machine=ssh://root@mini,result=ok}": 1, "ssh_connects_total{machine=ssh://root@mini,result=failed}": 0,
		}
		told := []string{"machine_store_", "machine_build_dir_", "machine_cores", "machine_load", "machine_memory_", "machine_pressure_"}
		if d := cmp.Diff(want, got.only("machine_", "build", "nar_", "ssh_").without(append(told, "build_info")...)); d != "" {
			t.Errorf("metrics (-want +got)\n%s", d)
		}
		if n := len(got.only("build_info{")); n != 1 {
			t.Errorf("%d build_info, want one", n)
		}
	})

	t.Run("during builds", func(t *testing.T) {
		s := s.within(t)
		const hold = "/srv/hold"
		machine := s.machines["mac"]
		if err := machine.WriteFile(hold, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		var drvs []string
		for n := range 3 {
			drvs = append(drvs, shell(fmt.Sprintf("held-%d", n), "n=0; while test -e "+hold+"; do n=$((n+1)); test $n -lt 1500; sleep 0.2; done; echo held > $out", features("mac")))
		}
		cmd, out := s.nixBuildCommand(t.Context(), "alice", "["+strings.Join(drvs, " ")+"]", "--max-jobs", "0")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		s.eventually(2*time.Minute, "one of three builds runs and the others wait", func() bool {
			running, queued := 0, 0
			for _, b := range s.status().Builds {
				switch b.Phase {
				case "building":
					running++
				case "queued":
					queued++
				}
			}
			return running == 1 && running+queued+len(s.staged()) == 3
		})
		_, got := s.scrape()
		waiting := 2 - float64(len(s.staged()))
		want := samples{"machine_slots_in_use" + mac: 1, "machine_slots_in_use" + mini: 0, "builds_queued{system=x86_64-linux}": waiting}
		if d := cmp.Diff(want, got.only("machine_slots_in_use", "builds_queued{system=x86")); d != "" {
			t.Errorf("metrics (-want +got)\n%s", d)
		}
		if _, err := machine.Run(t.Context(), "rm", hold); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatalf("nix-build: %v\n%s", err, out().Stderr)
		}
		s.idle(time.Minute)
	})

	t.Run("right after a build", func(t *testing.T) { s.within(t).tellsOfAnEndAtOnce() })
	t.Run("after builds", func(t *testing.T) { s.within(t).countsWhatRan() })
}

// tellsOfAnEndAtOnce builds, and asks for the build wherever it is told of, without any
// wait between.
func (s *site) tellsOfAnEndAtOnce() {
	t := s.t
	for _, words := range []string{"what it says\n", ""} {
		say := "true"
		if words != "" {
			say = "echo " + strings.TrimSpace(words)
		}
		_, before := s.scrape()
		drv := s.derivations(shell("at-once", say+"; echo > $out", features("mac")))[0]
		s.dispatchBuild(0, drv)
		history, historyErr := s.dispatch("history", "--json")
		log, logErr := s.dispatch("log", drv)
		_, after := s.scrape()
		page := s.served("/")
		var last struct {
			ID      uint64 `json:"id"`
			DrvPath string `json:"drvPath"`
		}
		first, _, _ := strings.Cut(history.Stdout, "\n")
		if err := json.Unmarshal([]byte(first), &last); historyErr != nil || err != nil || last.DrvPath != drv {
			t.Errorf("the history lacks %s, which has just been built: it begins with %s; %v, %v", drv, first, historyErr, err)
		}
		if logErr != nil || log.Stdout != words {
			t.Errorf("its log: %q, %v; want %q", log.Stdout, logErr, words)
		}
		const counter = "nix_dispatch_builds_total{machine=ssh://root@mac,result=built,system=x86_64-linux}"
		if after[counter] != before[counter]+1 {
			t.Errorf("%s: %v after the build and %v before", counter, after[counter], before[counter])
		}
		if want := fmt.Sprintf("build %d", last.ID); !strings.Contains(page, want) {
			t.Errorf("the page lacks %q", want)
		}
		if builds := s.status().Builds; len(builds) > 0 {
			t.Errorf("it is in progress, too: %v", builds)
		}
	}
}

// staged are the builds that wait for a slot on a machine of theirs.
func (s *site) staged() (drvs []string) {
	s.t.Helper()
	for _, b := range s.status().Builds {
		if b.Phase == "staged" || b.Phase == "copying" {
			drvs = append(drvs, b.DrvPath)
		}
	}
	return drvs
}

func (all samples) without(prefixes ...string) samples {
	some := make(samples)
	for name, v := range all {
		if !slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p) }) {
			some[name] = v
		}
	}
	return some
}

// countsWhatRan runs builds of every outcome and compares.
func (s *site) countsWhatRan() {
	t := s.t
	_, before := s.scrape()
	source := strings.Repeat("source ", 1000)
	expr := shell("ok", "cat $src $src > $out", features("mac")+`src = builtins.toFile "src" "`+source+`";`)
	path := s.mustBuild("alice", expr)[0]
	if out, err := s.nixBuild("alice", shell("bad", "exit 1", "")); err == nil {
		t.Errorf("a failing build succeeds: %s", out.Stdout)
	}
	if out, err := s.nixBuild("alice", shell("late", "sleep 600; echo > $out", ""), "--timeout", "1"); err == nil {
		t.Errorf("a build beyond its time succeeds: %s", out.Stdout)
	}
	// What no machine has must not become a label.
	foreign := strings.Replace(shell("foreign", "echo > $out", ""), "x86_64-linux", "riscv64-linux", 1)
	s.dispatchBuild(0, s.derivations(foreign)...)
	s.idle(time.Minute)
	text, after := s.scrape()
	change := make(samples)
	for name, v := range after.only("builds_total", "build_duration_seconds", "build_queue_duration_seconds", "nar_bytes_total", "ssh_connects_total") {
		if d := v - before["nix_dispatch_"+name]; d != 0 {
			change[name] = d
		}
	}
	sent := s.narSize(strings.Fields(s.run("nix-store", "--query", "--references", s.run("nix-store", "--query", "--deriver", path)))[0])
	want := samples{
		"builds_total{machine=ssh://root@mac,result=built,system=x86_64-linux}":      1,
		"builds_total{machine=ssh://root@mini,result=failed,system=x86_64-linux}":    1,
		"builds_total{machine=ssh://root@mini,result=timed_out,system=x86_64-linux}": 1,
		"build_duration_seconds{machine=ssh://root@mac}":                             1,
		"build_duration_seconds{machine=ssh://root@mini}":                            1,
		"build_queue_duration_seconds{system=x86_64-linux}":                          3,
		"nar_bytes_total{direction=up,machine=ssh://root@mac}":                       sent,
		"nar_bytes_total{direction=down,machine=ssh://root@mac}":                     s.narSize(path),
	}
	// How long a build ran that was stopped is not counted by every machine alike.
	delete(change, "build_duration_seconds{machine=ssh://root@mini}")
	delete(want, "build_duration_seconds{machine=ssh://root@mini}")
	if d := cmp.Diff(want, change); d != "" {
		t.Errorf("change of the metrics (-want +got)\n%s", d)
	}
	if strings.Contains(text, "riscv64") {
		t.Error("a system that no machine has became a label")
	}
	if problems, err := promlint.New(strings.NewReader(text)).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", problems, err)
	}
}

// narSize is the length of a path's NAR.
func (s *site) narSize(path string) float64 {
	s.t.Helper()
	var n float64
	if _, err := fmt.Sscan(s.run("nix-store", "--query", "--size", path), &n); err != nil {
		s.t.Fatal(err)
	}
	return n
}
