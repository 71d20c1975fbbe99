// Package webpage shows the state of nix-dispatchd to a person with a browser: one
// page, made anew for each look and fetched every other second by its own script,
// or by the browser where there are no scripts. It changes nothing, loads nothing
// from elsewhere, and its size is bounded whatever there is to show.
package webpage

import (
	"bytes"
	"context"
	"embed"
	"html/template"
	"net"
	"net/http"
	"sync"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// The bounds of what is shown; the rest is counted.
const (
	// MaxQueued is how many of the waiting builds are shown.
	MaxQueued = 50
	// MaxRecent is how many of the builds that have ended are shown.
	MaxRecent = 25

	maxMachines = 200
	maxBuilds   = 16 // on one machine
	maxSquares  = 64 // for the slots of one machine
	maxNotices  = 8
	maxWords    = 300 // bytes of a foreign text
)

// freshness is how long there is between two pages at least. Who looks sooner waits:
// a page that was made before it was asked for may lack what the asker knows already.
const freshness = 500 * time.Millisecond

// A Source is where the page's contents come from. Its functions are called by one
// goroutine at a time.
type Source struct {
	// Host is this host's name.
	Host string
	// Status is the daemon's, with MaxQueued waiting builds at most.
	Status func() *dispatchv1.StatusResponse
	// Recent are builds that have ended, the newest first, MaxRecent at most.
	Recent func() []*dispatchv1.FinishedBuild
	// Listed tells whether a store URI is one of the daemon's own list: others, which
	// only requests have named, are named to those who may see names.
	Listed func(uri string) bool
	// Named tells whether who asks may see the names of derivations and users, and
	// the words of machines. It may be called by several goroutines.
	Named func(*http.Request) bool
}

var (
	//go:embed page.html page.css page.js
	files embed.FS

	page = template.Must(template.ParseFS(files, "page.html"))
)

// Register adds the page, at "/", to mux. Other methods than GET and HEAD are
// refused.
func Register(mux *http.ServeMux, source Source) {
	p := newPages(source)
	mux.HandleFunc("GET /{$}", p.serve)
	for name, kind := range map[string]string{"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8"} {
		text, err := files.ReadFile(name)
		if err != nil {
			panic(err) // it is embedded
		}
		mux.HandleFunc("GET /"+name, func(w http.ResponseWriter, r *http.Request) { send(w, r, kind, text) })
	}
}

// pages are the last pages made, with names and without.
type pages struct {
	source Source
	making sync.Mutex // the source is read by one at a time

	named, nameless lastPage
}

// A lastPage is the last page made for those who may see as much.
type lastPage struct {
	turn chan struct{} // holds a value while somebody makes a page, or is about to
	at   time.Time     // when it was begun
	html []byte
}

func newPages(source Source) *pages {
	p := &pages{source: source}
	p.named.turn, p.nameless.turn = make(chan struct{}, 1), make(chan struct{}, 1)
	return p
}

func (p *pages) serve(w http.ResponseWriter, r *http.Request) {
	if rebound(r) {
		http.Error(w, "This page is for this host: open it as http://127.0.0.1 or localhost, with the port of nix-dispatchd.", http.StatusMisdirectedRequest)
		return
	}
	html, err := p.current(r.Context(), p.source.Named(r))
	if err != nil {
		http.Error(w, "The page cannot be shown.", http.StatusInternalServerError)
		return
	}
	send(w, r, "text/html; charset=utf-8", html)
}

// current returns a page that was made after the call. Those who ask while nobody may
// make one yet share the next: however many look, it is made twice a second at most.
func (p *pages) current(ctx context.Context, named bool) ([]byte, error) {
	asked := time.Now()
	last := &p.nameless
	if named {
		last = &p.named
	}
	select {
	case last.turn <- struct{}{}:
		defer func() { <-last.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if last.at.After(asked) {
		return last.html, nil
	}
	due := time.NewTimer(time.Until(last.at.Add(freshness)))
	defer due.Stop()
	select {
	case <-due.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	p.making.Lock()
	defer p.making.Unlock()
	begun := time.Now()
	var b bytes.Buffer
	if err := page.Execute(&b, newView(p.source, named, begun)); err != nil {
		return nil, err
	}
	last.at, last.html = begun, b.Bytes()
	return last.html, nil
}

// rebound tells of a request that came over the loopback interface under the name
// of some other host: a page of that host, open in a browser here, may have led it
// to this address to read what is served.
func rebound(r *http.Request) bool {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if !ok || !local.IP.IsLoopback() {
		return false
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	ip := net.ParseIP(host)
	return host != "localhost" && (ip == nil || !ip.IsLoopback())
}

// policy lets the page have its own style and script, and fetch itself.
const policy = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

func send(w http.ResponseWriter, r *http.Request, kind string, text []byte) {
	h := w.Header()
	h.Set("Content-Type", kind)
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cross-Origin-Opener-Policy", "same-origin")
	h.Set("Cache-Control", "no-store")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(text))
}
