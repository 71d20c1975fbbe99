package webpage

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

func ago(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(-d)) }

func drv(name string) string {
	return "/nix/store/7rjj86a3ccgn4ncx2cxbsh8s5x8xfh6c-" + name + ".drv"
}

const (
	up       = dispatchv1.MachineState_MACHINE_STATE_UP
	down     = dispatchv1.MachineState_MACHINE_STATE_DOWN
	queued   = dispatchv1.Phase_PHASE_QUEUED
	building = dispatchv1.Phase_PHASE_BUILDING
)

// sample is a site with something of everything.
func sample() *dispatchv1.StatusResponse {
	load, cores, free, size, memory := 3.4, uint32(8), uint64(120<<30), uint64(500<<30), uint64(11<<30)
	return &dispatchv1.StatusResponse{
		Version: "1.0", Started: ago(26 * time.Hour), Queued: 1,
		Machines: []*dispatchv1.MachineStatus{
			{Uri: "ssh://mac", State: up, Slots: 4, Running: 1, Load: &dispatchv1.MachineLoad{
				Load1: &load, Cores: &cores, StoreFreeBytes: &free, StoreSizeBytes: &size, MemoryAvailableBytes: &memory}},
			{Uri: "ssh-ng://root@kitty", State: down, Slots: 8, Since: ago(90 * time.Second), Down: "authenticate",
				Reason: "authenticate: none of the keys offered lets us in: /root/.ssh/id_ed25519"},
			{Uri: "ssh://old", State: dispatchv1.MachineState_MACHINE_STATE_DRAINING, Drained: true, Slots: 2},
			{Uri: "ssh://full", State: dispatchv1.MachineState_MACHINE_STATE_PARKED, Parked: "disk", Slots: 2, Reason: "1.0 GiB free on /nix, wants 2.0 GiB"},
			{Uri: "ssh://alices?ssh-key=/home/alice/key", State: up, Slots: 1},
		},
		Builds: []*dispatchv1.BuildInfo{
			{Id: 7, DrvPath: drv("hello-2.12"), Phase: building, Machine: "ssh://mac", Since: ago(time.Hour), BuildingSince: ago(130 * time.Second), User: "alice", System: "x86_64-linux"},
			{Id: 8, DrvPath: drv("secret-project"), Phase: queued, Since: ago(5 * time.Second), User: "bob", Reason: "all machines with kvm are full", System: "x86_64-linux"},
		},
	}
}

func finished() []*dispatchv1.FinishedBuild {
	return []*dispatchv1.FinishedBuild{
		{Id: 6, DrvPath: drv("gone-1"), Machine: "ssh://mac", Status: "permanent failure", Failed: true, Error: "builder failed with exit code 2", Ended: ago(3 * time.Minute), Building: durationpb.New(12 * time.Second)},
		{Id: 5, DrvPath: drv("made-1"), Machine: "ssh://alices?ssh-key=/home/alice/key", Status: "built", Ended: ago(4 * time.Minute), Building: durationpb.New(3 * time.Hour)},
	}
}

// look gets a path of a page with these contents, over loopback.
func look(t *testing.T, status *dispatchv1.StatusResponse, recent []*dispatchv1.FinishedBuild, named bool, method, url string) *httptest.ResponseRecorder {
	t.Helper()
	mux := http.NewServeMux()
	Register(mux, Source{
		Host:   "builder",
		Status: func() *dispatchv1.StatusResponse { return status },
		Recent: func() []*dispatchv1.FinishedBuild { return recent },
		Listed: func(uri string) bool { return !strings.Contains(uri, "alice") },
		Named:  func(*http.Request) bool { return named },
	})
	r := httptest.NewRequest(method, url, nil)
	local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9747}
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, local)))
	return w
}

const address = "http://127.0.0.1:9747/"

// text is a page without tags and with single spaces.
func text(html string) string {
	return strings.Join(strings.Fields(regexp.MustCompile(`<[^>]*>`).ReplaceAllString(html, " ")), " ")
}

func TestPageTellsEverything(t *testing.T) {
	t.Parallel()
	w := look(t, sample(), finished(), true, http.MethodGet, address)
	if w.Code != http.StatusOK {
		t.Fatalf("GET / = %d", w.Code)
	}
	got := text(w.Body.String())
	for _, want := range []string{
		"nix-dispatch on builder", "machines up 2 of 5", "slots in use 1 of 5", "building 1", "waiting 1",
		"ssh://mac up 1 of 4 slots in use load 3.4 of 8 cores disk 120.0 GiB free memory 11.0 GiB free hello-2.12 building 2 min 10 s",
		"ssh-ng://root@kitty down 0 of 8 slots in use for 1 min 30 s: authenticate: none of the keys",
		"ssh://old drained", "ssh://full parked 0 of 2 slots in use 1.0 GiB free on /nix",
		"secret-project 5 s x86_64-linux bob all machines with kvm are full",
		"gone-1 permanent failure ssh://mac 12 s 3 min", "made-1 built ssh://alices?ssh-key=/home/alice/key 3 h 0 min",
		"started 1 d 2 h ago",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the page lacks %q:\n%s", want, got)
		}
	}
}

// TestPageWithoutNames is for people of whom nothing is known.
func TestPageWithoutNames(t *testing.T) {
	t.Parallel()
	body := look(t, sample(), finished(), false, http.MethodGet, address).Body.String()
	for _, secret := range []string{"hello", "secret", "/nix/store", "alice", "bob", "kvm", "id_ed25519", "exit code", "gone-1", "wants"} {
		if strings.Contains(body, secret) {
			t.Errorf("the page holds %q:\n%s", secret, body)
		}
	}
	got := text(body)
	for _, want := range []string{
		"ssh://mac up 1 of 4 slots in use", "build 7 building 2 min 10 s", "build 8 5 s x86_64-linux",
		"down 0 of 8 slots in use for 1 min 30 s: authenticate", "short of disk",
		"a machine that a request named", "build 6 permanent failure ssh://mac",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the page lacks %q:\n%s", want, got)
		}
	}
}

// TestPageEscapes has everything foreign be a script.
func TestPageEscapes(t *testing.T) {
	t.Parallel()
	const evil = "\x1b[31m<script>alert(1)</script>\"'\u202e&amp;"
	status := sample()
	for _, m := range status.Machines {
		m.Uri, m.Reason, m.Down, m.Parked = evil, evil, evil, evil
	}
	for _, b := range status.Builds {
		b.DrvPath, b.User, b.Reason, b.System, b.Machine = "/nix/store/7rjj86a3ccgn4ncx2cxbsh8s5x8xfh6c-"+evil, evil, evil, evil, evil
	}
	status.Version = evil
	status.Errors = []*dispatchv1.MachineError{{Message: evil}}
	recent := finished()
	for _, b := range recent {
		b.DrvPath, b.Status, b.Machine, b.Error = evil, evil, evil, evil
	}
	plain := len(regexp.MustCompile(`(?i)<script`).FindAllString(look(t, sample(), finished(), true, http.MethodGet, address).Body.String(), -1))
	for _, named := range []bool{true, false} {
		body := look(t, status, recent, named, http.MethodGet, address).Body.String()
		if n := len(regexp.MustCompile(`(?i)<script`).FindAllString(body, -1)); n != plain {
			t.Errorf("named %v: %d scripts, want %d:\n%s", named, n, plain, body)
		}
		if strings.ContainsAny(body, "\x1b\u202e") {
			t.Errorf("named %v: control characters are let through", named)
		}
		if named && strings.Count(body, "&lt;script&gt;alert(1)") < 8 {
			t.Errorf("the texts are not there:\n%s", body)
		}
	}
}

// TestPageIsBounded shows a thousand machines and ten thousand builds.
func TestPageIsBounded(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("é", 4000)
	path := drv(long)
	status := &dispatchv1.StatusResponse{Queued: 10000, Started: ago(0)}
	for n := range 1000 {
		m := &dispatchv1.MachineStatus{Uri: fmt.Sprintf("ssh://m%d-%s", n, long), State: up, Slots: 100, Reason: long}
		if n == 999 {
			m.Uri, m.State, m.Reason = "ssh://broken", down, "it is broken"
		}
		status.Machines = append(status.Machines, m)
		for k := range 100 {
			status.Builds = append(status.Builds, &dispatchv1.BuildInfo{
				Id: uint64(100*n + k), Phase: building, Machine: m.Uri, DrvPath: path, Since: ago(0), User: long, Reason: long})
		}
	}
	for n := range MaxQueued {
		status.Builds = append(status.Builds, &dispatchv1.BuildInfo{Id: uint64(n), Phase: queued, DrvPath: path, Since: ago(0), User: long, Reason: long})
	}
	for range 500 {
		status.Errors = append(status.Errors, &dispatchv1.MachineError{Message: long})
	}
	body := look(t, status, nil, true, http.MethodGet, address).Body.String()
	if len(body) > 4<<20 {
		t.Errorf("the page has %d bytes", len(body))
	}
	got := text(body)
	for _, want := range []string{"machines up 999 of 1000", "building 100000", "waiting 10000", "and 9950 more", "and 84 more", "and 800 machines more", "could not be used: 500."} {
		if !strings.Contains(got, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
	// None of them has builds, but one has something to tell.
	status.Builds = nil
	if got := text(look(t, status, nil, true, http.MethodGet, address).Body.String()); !strings.Contains(got, "ssh://broken down") {
		t.Error("the machine that is down is not among those shown")
	}
}

func TestPageOfNothing(t *testing.T) {
	t.Parallel()
	got := text(look(t, &dispatchv1.StatusResponse{}, nil, false, http.MethodGet, address).Body.String())
	for _, want := range []string{"There are no machines in the list.", "No build waits for a machine.", "No build has ended yet."} {
		if !strings.Contains(got, want) {
			t.Errorf("the page lacks %q:\n%s", want, got)
		}
	}
}

func TestPageIsReadOnlyAndGuarded(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"", "page.css", "page.js"} {
		for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions} {
			if w := look(t, sample(), nil, true, method, address+path); w.Code != http.StatusMethodNotAllowed {
				t.Errorf("%s /%s = %d, want 405", method, path, w.Code)
			}
		}
		w := look(t, sample(), nil, true, http.MethodHead, address+path)
		if w.Code != http.StatusOK || w.Body.Len() > 0 {
			t.Errorf("HEAD /%s = %d with %d bytes, want 200 with none", path, w.Code, w.Body.Len())
		}
		csp := w.Header().Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} {
			if !strings.Contains(csp, want) {
				t.Errorf("/%s: Content-Security-Policy %q lacks %q", path, csp, want)
			}
		}
		for name, want := range map[string]string{"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"} {
			if got := w.Header().Get(name); got != want {
				t.Errorf("/%s: %s is %q, want %q", path, name, got, want)
			}
		}
	}
	body := look(t, sample(), nil, true, http.MethodGet, address).Body.String()
	if m := regexp.MustCompile(`(?i)style="|\son\w+="|https?://`).FindString(body); m != "" {
		t.Errorf("the page has %q, which its policy does not allow", m)
	}
	if w := look(t, sample(), nil, true, http.MethodGet, address+"elsewhere"); w.Code != http.StatusNotFound {
		t.Errorf("GET /elsewhere = %d, want 404", w.Code)
	}
}

// TestPageUnderAnotherHostsName is what a page of evil.example sees that has its name
// lead to this address.
func TestPageUnderAnotherHostsName(t *testing.T) {
	t.Parallel()
	for host, want := range map[string]int{
		"127.0.0.1:9747": http.StatusOK, "localhost:9747": http.StatusOK, "[::1]:9747": http.StatusOK, "localhost": http.StatusOK,
		"evil.example:9747": http.StatusMisdirectedRequest, "evil.example": http.StatusMisdirectedRequest, "10.0.0.1:9747": http.StatusMisdirectedRequest,
	} {
		if w := look(t, sample(), nil, true, http.MethodGet, "http://"+host+"/"); w.Code != want {
			t.Errorf("Host %s: %d, want %d", host, w.Code, want)
		} else if want != http.StatusOK && strings.Contains(w.Body.String(), "ssh://mac") {
			t.Errorf("Host %s is told of machines", host)
		}
	}
}

// TestPageIsMadeRarely asks many times at once.
func TestPageIsMadeRarely(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		made := 0
		p := newPages(Source{
			Status: func() *dispatchv1.StatusResponse { made++; return sample() },
			Recent: finished,
			Listed: func(string) bool { return true },
		})
		start := time.Now()
		var looking sync.WaitGroup
		for range 1000 {
			looking.Go(func() {
				time.Sleep(rand.N(freshness))
				if _, err := p.current(t.Context(), true); err != nil {
					t.Error(err)
				}
			})
		}
		looking.Wait()
		if most := 1 + int(time.Since(start)/freshness); made > most {
			t.Errorf("made %d times in %v, want %d at most", made, time.Since(start), most)
		}
	})
}

// TestPageIsNotOlderThanTheLook looks again right after something has changed.
func TestPageIsNotOlderThanTheLook(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var ended []*dispatchv1.FinishedBuild
		p := newPages(Source{
			Status: sample,
			Recent: func() []*dispatchv1.FinishedBuild { return ended },
			Listed: func(string) bool { return true },
		})
		for id := range uint64(5) {
			ended = append(ended, &dispatchv1.FinishedBuild{Id: 1000 + id, Status: "built"})
			html, err := p.current(t.Context(), false)
			if want := fmt.Sprintf("build %d", 1000+id); err != nil || !strings.Contains(string(html), want) {
				t.Errorf("the page lacks %q, which ended before it was asked for; error %v", want, err)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := p.current(ctx, false); err == nil {
			t.Error("who has gone waits for a page")
		}
	})
}

// TestPageShowsABuildOnce has a build end after the page has read what is in progress.
func TestPageShowsABuildOnce(t *testing.T) {
	t.Parallel()
	b := sample().GetBuilds()[0]
	v := newView(Source{
		Status: sample,
		Recent: func() []*dispatchv1.FinishedBuild {
			return []*dispatchv1.FinishedBuild{{Id: b.GetId(), DrvPath: b.GetDrvPath()}, {Id: 4711}}
		},
		Listed: func(string) bool { return true },
	}, false, time.Now())
	if len(v.Recent) != 1 || v.Recent[0].Name != "build 4711" {
		t.Errorf("ended: %+v, want only build 4711, for build %d is in progress", v.Recent, b.GetId())
	}
}
