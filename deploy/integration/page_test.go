package integration

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// screenshotEnv names a directory for pictures of the page; see docs/hacking.md.
const screenshotEnv = "NIX_DISPATCH_SCREENSHOTS"

// browse has Chromium do something with a page, and returns what it prints.
func browse(t *testing.T, address string, args ...string) (stdout, stderr string) {
	t.Helper()
	program := fleet.RequireProgram(t, "chromium")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	// It is to look nowhere else, and has no sandbox for root.
	args = append([]string{
		"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars",
		"--enable-logging=stderr", "--user-data-dir=" + t.TempDir(),
	}, args...)
	cmd := exec.CommandContext(ctx, program, append(args, address)...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("chromium: %v\n%s", err, errOut.String())
	}
	return out.String(), errOut.String()
}

// visible is a page's text with single spaces.
func visible(html string) string {
	return strings.Join(strings.Fields(regexp.MustCompile(`<[^>]*>`).ReplaceAllString(html, " ")), " ")
}

// TestPageInABrowser opens the page in Chromium while builds run, which end between
// its first look and its second: what it shows at last is what it fetched by itself.
func TestPageInABrowser(t *testing.T) {
	t.Parallel()
	fleet.RequireProgram(t, "chromium")
	s := newSite(t, siteConfig{
		machines: []machineConfig{{name: "mac", columns: "x86_64-linux - 2 1 - mac", host: fleet.HostConfig{SystemFeatures: []string{"mac"}}}, {name: "mini"}},
		daemon:   []string{"--page-names"},
	})
	forward, err := s.client.Forward("127.0.0.1:0", metricsAt)
	if err != nil {
		t.Fatal(err)
	}
	const hold = "/srv/hold"
	if err := s.machines["mac"].WriteFile(hold, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	var drvs []string
	for _, name := range []string{"gcc-13.2", "linux-6.6", "chromium-120", "hello-2.12"} {
		drvs = append(drvs, shell(name, "n=0; while test -e "+hold+"; do n=$((n+1)); test $n -lt 1500; sleep 0.1; done; echo > $out", features("mac")))
	}
	drvs = append(drvs, shell("tests-1.0", "exit 3", ""), shell("docs-1.0", "echo > $out", ""))
	cmd, _ := s.nixBuildCommand(t.Context(), "alice", "["+strings.Join(drvs, " ")+"]", "--max-jobs", "0", "--keep-going")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	target := &url.URL{Scheme: "http", Host: forward.Addr().String()}
	var early string
	s.eventually(time.Minute, "the page tells of builds that run, wait and have ended", func() bool {
		early = visible(httpGet(t, target.String()+"/"))
		return strings.Contains(early, "2 of 2 slots in use") && strings.Contains(early, "waiting 1") &&
			strings.Contains(early, "permanent failure") && strings.Contains(early, "docs-1.0 built")
	})
	s.takePictures(target.String() + "/")

	var looks atomic.Int32
	proxy := httputil.NewSingleHostReverseProxy(target)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" && looks.Add(1) == 2 {
			s.onHost(s.machines["mac"], "rm "+hold)
			_ = cmd.Wait() // a derivation of it fails
			s.idle(time.Minute)
			s.eventually(patience, "the page has all that has ended", func() bool {
				page := visible(httpGet(t, target.String()+"/"))
				return strings.Contains(page, "tests-1.0 permanent failure") && strings.Contains(page, "gcc-13.2 built")
			})
		}
		proxy.ServeHTTP(w, r)
	}))
	defer server.Close()
	dom, console := browse(t, server.URL+"/", "--virtual-time-budget=5000", "--dump-dom")
	if n := looks.Load(); n < 2 {
		t.Fatalf("the browser looked %d times; it printed\n%s", n, console)
	}
	late := visible(dom)
	for _, want := range []string{"0 of 2 slots in use", "waiting 0", "gcc-13.2 built ssh://root@mac", "hello-2.12 built", "tests-1.0 permanent failure"} {
		if !strings.Contains(late, want) {
			t.Errorf("the page lacks %q after it was refreshed:\n%s\nIt was\n%s", want, late, early)
		}
	}
	for _, complaint := range []string{"CONSOLE", "Refused to"} {
		if strings.Contains(console, complaint) {
			t.Errorf("the browser complains:\n%s", console)
		}
	}
}

func httpGet(t *testing.T, address string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// takePictures makes one of the page as it is, or, if asked to, several to look at.
func (s *site) takePictures(address string) {
	t := s.t
	dir := os.Getenv(screenshotEnv)
	if dir == "" {
		return
	}
	for name, args := range map[string][]string{
		"page":       {"--window-size=1100,860"},
		"page-dark":  {"--window-size=1100,860", "--blink-settings=preferredColorScheme=0"},
		"phone":      {"--window-size=500,1300"},
		"phone-dark": {"--window-size=500,1300", "--blink-settings=preferredColorScheme=0"},
	} {
		file := filepath.Join(dir, name+".png")
		browse(t, address, append(args, "--screenshot="+file)...)
		if info, err := os.Stat(file); err != nil || info.Size() < 10_000 {
			t.Error(fmt.Errorf("no picture in %s: %w", file, err))
		}
	}
}
