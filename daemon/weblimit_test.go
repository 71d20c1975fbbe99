package daemon

import (
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// TestWebConnectionsAreBounded has a stranger open many connections that say nothing, and
// some that keep on asking without reading the answers: they close their own, and others
// are answered.
func TestWebConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	address := freeAddress(t)
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{oneMachine("ssh")}, options: func(o *Options) { o.MetricsListen = address }})
	const attempts = 4 * maxWebConnections
	closed := make(chan struct{}, attempts)
	limit := s.d.webConnections
	open := func() int {
		limit.mu.Lock()
		defer limit.mu.Unlock()
		return len(limit.conns)
	}
	for n := range attempts {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if n%4 == 0 {
			if _, err := c.Write([]byte("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")); err != nil {
				t.Fatal(err)
			}
		}
		go func() {
			_, _ = io.Copy(io.Discard, c) // to its end
			closed <- struct{}{}
		}()
		if got := open(); got > maxWebConnections {
			t.Fatalf("%d connections are open, want %d at most", got, maxWebConnections)
		}
	}
	for n := range attempts - maxWebConnections {
		select {
		case <-closed:
		case <-time.After(patience):
			t.Fatalf("%d of %d connections were closed, want %d", n, attempts, attempts-maxWebConnections)
		}
	}
	b := newBrowser(t, "http://"+address, "")
	if r, _ := b.get("/metrics"); r.StatusCode != http.StatusOK {
		t.Errorf("somebody else gets %s", r.Status)
	}
}

// TestWebLimit is about who has to go.
func TestWebLimit(t *testing.T) {
	t.Parallel()
	l := &webLimit{most: 3}
	var conns []*webConn
	var gone []net.Conn // the other ends
	for range 4 {
		here, there := net.Pipe()
		t.Cleanup(func() { here.Close(); there.Close() })
		gone = append(gone, there)
		if len(conns) == 3 { // two that are served, one that waits between them
			l.changed(conns[0], http.StateActive)
			l.changed(conns[2], http.StateActive)
		}
		conns = append(conns, l.admit(here))
	}
	isClosed := func(n int) bool {
		_ = gone[n].SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		_, err := gone[n].Read(make([]byte, 1))
		return err == io.EOF
	}
	for n, want := range []bool{false, true, false, false} {
		if isClosed(n) != want {
			t.Errorf("connection %d is closed: %v, want %v", n, !want, want)
		}
	}
	l.changed(conns[3], http.StateActive)
	here, there := net.Pipe()
	t.Cleanup(func() { here.Close(); there.Close() })
	l.admit(here)
	if !isClosed(0) {
		t.Error("all are served and another comes: the oldest is still open")
	}
	if isClosed(2) || isClosed(3) {
		t.Error("all are served and another comes: more than the oldest were closed")
	}
}
