package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/daemon/webtest"
	"nixdispatch/deploy/fleet"
	"nixdispatch/deploy/prometheus"
)

// metricsAt is where the daemon serves metrics on the client.
const metricsAt = "127.0.0.1:9747"

// A watcher is a Prometheus that scrapes a site's daemon.
type watcher struct {
	t    *testing.T
	base string
	log  syncBuffer
}

// watch starts a Prometheus with the files of deploy/prometheus, which finds the
// daemon at an address of this machine, with TLS and a password.
func (s *site) watch(target, certificate, password string) *watcher {
	s.t.Helper()
	program := fleet.RequireProgram(s.t, "prometheus")
	dir := s.t.TempDir()
	scrape := readFile(s.t, "scrape.yml")
	// What the example has as comments is what this one needs.
	scrape = strings.Replace(scrape, "    # With nix-dispatchd", "    ## With nix-dispatchd", 1)
	scrape = regexp.MustCompile(`(?m)^    # `).ReplaceAllString(scrape, "    ")
	scrape = strings.Replace(scrape, metricsAt, target, 1)
	scrape = "global: {scrape_interval: 1s, evaluation_interval: 1s}\n" + scrape
	for name, text := range map[string]string{
		"scrape.yml": scrape, "rules.yml": readFile(s.t, "rules.yml"),
		"nix-dispatch-ca.pem": certificate, "nix-dispatch-password": password,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
	w := &watcher{t: s.t}
	cmd := exec.Command(program, "--config.file="+filepath.Join(dir, "scrape.yml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address=127.0.0.1:0")
	cmd.Stdout, cmd.Stderr = &w.log, &w.log
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if s.t.Failed() {
			s.t.Logf("Prometheus's log:\n%s", w.log.String())
		}
	})
	// It chooses the port itself, so that no other program can take it first.
	listening := regexp.MustCompile(`msg="Listening on" address=(127\.0\.0\.1:\d+)`)
	s.eventually(time.Minute, "Prometheus says where it listens", func() bool {
		m := listening.FindStringSubmatch(w.log.String())
		if m != nil {
			w.base = "http://" + m[1]
		}
		return m != nil
	})
	return w
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := prometheus.Files.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// query runs an expression, and gives its values by the label by, or "".
func (w *watcher) query(ctx context.Context, expr, by string) (map[string]float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.base+"/api/v1/query?"+url.Values{"query": {expr}}.Encode(), nil)
	if err != nil {
		return nil, err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	var answer struct {
		Error string
		Data  struct {
			Result []struct {
				Metric map[string]string
				Value  [2]any
			}
		}
	}
	if err := json.Unmarshal(body, &answer); err != nil || r.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %s", expr, r.Status, body)
	}
	values := make(map[string]float64)
	for _, one := range answer.Data.Result {
		v, err := strconv.ParseFloat(fmt.Sprint(one.Value[1]), 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", expr, err)
		}
		values[one.Metric[by]] += v
	}
	return values, nil
}

// becomes waits until an expression's values by a label are as wanted.
func (w *watcher) becomes(what, expr, by string, want map[string]float64) {
	w.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		got, err := w.query(w.t.Context(), expr, by)
		if err == nil && cmp.Equal(want, got) {
			return
		}
		if time.Now().After(deadline) {
			w.t.Errorf("%s: %s is %v, %v; want %v", what, expr, got, err, want)
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// TestPrometheus has a real Prometheus watch a site while builds run, over TLS,
// and compares what it knows with what was really run.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	certificate, key := webtest.Certificate(t)
	const dir = "/etc/nix-dispatch/"
	s := newSite(t, siteConfig{
		machines: []machineConfig{{name: "mac", columns: "x86_64-linux - 2 1 - mac", host: fleet.HostConfig{SystemFeatures: []string{"mac"}}}, {name: "mini"}},
		daemon:   []string{"--metrics-config", dir + "web.yml"},
		files:    map[string]string{dir + "web.yml": webtest.Config(t, "prometheus", "secret"), dir + "cert.pem": certificate, dir + "key.pem": key},
	})
	const mac, mini = "ssh://root@mac", "ssh://root@mini"
	proxy, err := s.client.Forward("127.0.0.1:0", metricsAt)
	if err != nil {
		t.Fatal(err)
	}
	w := s.watch(proxy.Addr().String(), certificate, "secret")
	w.becomes("before builds", `up{job="nix-dispatch"}`, "job", map[string]float64{"nix-dispatch": 1})

	const hold = "/srv/hold"
	if err := s.machines["mac"].WriteFile(hold, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	var drvs []string
	for n := range 5 {
		drvs = append(drvs, shell(fmt.Sprintf("held-%d", n), "n=0; while test -e "+hold+"; do n=$((n+1)); test $n -lt 1500; sleep 0.1; done; echo held > $out", features("mac")))
	}
	for n := range 4 {
		drvs = append(drvs, shell(fmt.Sprintf("free-%d", n), "echo free > $out", ""))
	}
	drvs = append(drvs, shell("broken", "exit 3", ""))
	cmd, out := s.nixBuildCommand(t.Context(), "alice", "["+strings.Join(drvs, " ")+"]", "--max-jobs", "0", "--keep-going")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.becomes("during builds", `nix_dispatch_machine_slots_in_use`, "machine", map[string]float64{mac: 2, mini: 0})
	w.becomes("during builds", `nix_dispatch_machine_builds_running`, "machine", map[string]float64{mac: 2, mini: 0})
	w.becomes("during builds", `machine:nix_dispatch_slots_in_use:ratio`, "machine", map[string]float64{mac: 1, mini: 0})
	// One has its inputs there already.
	w.becomes("during builds", `sum(nix_dispatch_builds_queued) + sum(nix_dispatch_machine_builds_staging)`, "", map[string]float64{"": 3})
	w.becomes("during builds", `nix_dispatch_builds_in_progress`, "", map[string]float64{"": 5})
	w.becomes("during builds", `nix_dispatch_builds_queued_oldest_age_seconds > bool 0.1`, "", map[string]float64{"": 1})
	s.onHost(s.machines["mac"], "rm "+hold)
	if err := cmd.Wait(); err == nil {
		t.Errorf("nix-build with a derivation that fails succeeds:\n%s", out().Stderr)
	}
	s.idle(time.Minute)

	w.becomes("after builds", `nix_dispatch_machine_slots_in_use`, "machine", map[string]float64{mac: 0, mini: 0})
	w.becomes("after builds", `machine:nix_dispatch_slots_unaccounted:sum`, "machine", map[string]float64{mac: 0, mini: 0})
	// By the machines' own word.
	built, failed := make(map[string]float64), make(map[string]float64)
	for uri, name := range map[string]string{mac: "mac", mini: "mini"} {
		h := s.machines[name]
		for n := range 5 {
			built[uri] += float64(ran(t, h, fmt.Sprintf("held-%d", n)) + ran(t, h, fmt.Sprintf("free-%d", n)))
		}
		failed[uri] = float64(ran(t, h, "broken"))
	}
	if built[mac]+built[mini] != 9 || failed[mac]+failed[mini] != 1 {
		t.Errorf("the machines built %v and failed %v", built, failed)
	}
	w.becomes("after builds", `nix_dispatch_builds_total{result="built"}`, "machine", built)
	w.becomes("after builds", `nix_dispatch_builds_total{result="failed"}`, "machine", failed)
	w.becomes("after builds", `nix_dispatch_build_duration_seconds_count`, "machine", map[string]float64{mac: built[mac] + failed[mac], mini: built[mini] + failed[mini]})
	w.becomes("after builds", `max_over_time(nix_dispatch_machine_slots_in_use[5m])`, "machine", map[string]float64{mac: 2, mini: w.most(mini)})
	w.drawsDashboard()

	// A machine that goes, and the daemon itself, are pending alerts at once.
	s.onHost(s.machines["mini"], "pkill sshd")
	w.becomes("a machine is gone", `ALERTS{alertname="NixDispatchMachineDown", alertstate="pending"}`, "machine", map[string]float64{mini: 1})
	if err := proxy.Close(); err != nil {
		t.Fatal(err)
	}
	w.becomes("the daemon is gone", `ALERTS{alertname="NixDispatchDown", alertstate="pending"}`, "job", map[string]float64{"nix-dispatch": 1})
}

// most is the most slots of a machine that were seen in use, of which a short build
// may have been none.
func (w *watcher) most(machine string) float64 {
	w.t.Helper()
	got, err := w.query(w.t.Context(), `max_over_time(nix_dispatch_machine_slots_in_use{machine="`+machine+`"}[5m])`, "machine")
	if err != nil || got[machine] > 4 {
		w.t.Errorf("most slots in use of %s: %v, %v; want 4 at most", machine, got, err)
	}
	return got[machine]
}

// mayBeEmpty are what panels show only when something is wrong, or after an hour.
var mayBeEmpty = regexp.MustCompile(`nix_dispatch_machine_down\b|nix_dispatch_machine_parked|attempts_failed|unplaceable|_free_bytes|_available_bytes|load5|pressure`)

// drawsDashboard runs every query of the dashboard. Each must have an answer, but
// those of what is not the case.
func (w *watcher) drawsDashboard() {
	w.t.Helper()
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal([]byte(readFile(w.t, "dashboard.json")), &board); err != nil {
		w.t.Fatal(err)
	}
	queries := 0
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			expr := strings.NewReplacer("$instance", ".*", "$machine", ".*").Replace(target.Expr)
			got, err := w.query(w.t.Context(), expr, "machine")
			if err != nil {
				w.t.Errorf("panel %q: %v", p.Title, err)
			}
			if len(got) == 0 && !mayBeEmpty.MatchString(expr) {
				w.t.Errorf("panel %q: nothing comes of %s", p.Title, expr)
			}
			for label, v := range got {
				if math.IsInf(v, 0) || v < 0 {
					w.t.Errorf("panel %q: %s gives %v for %q", p.Title, expr, v, label)
				}
			}
			queries++
		}
	}
	if queries < 20 {
		w.t.Errorf("the dashboard has %d queries only", queries)
	}
}
