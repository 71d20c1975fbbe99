package daemon

import (
	"crypto/tls"
	"net"
	"net/http"
	"slices"
	"sync"
)

// maxWebConnections bounds the connections of the metrics listener. Prometheus has one,
// a browser a few.
const maxWebConnections = 64

// A webLimit bounds the connections of an HTTP listener, so that they use up no file
// descriptors. Anyone may connect, and nobody knows who it is: so when there are too many
// the oldest one is closed that waits for a request, and if none does, the oldest. One who
// opens many connections loses their own, and keeps nobody out. Safe for concurrent use.
type webLimit struct {
	most int

	mu    sync.Mutex
	conns []*webConn // the oldest first
}

// A webConn is a connection that counts until it is closed.
type webConn struct {
	net.Conn
	limit  *webLimit
	active bool // a request is being served; the limit's mutex guards it
}

func (c *webConn) Close() error {
	c.limit.forget(c)
	return c.Conn.Close()
}

// admit counts a connection, and closes another one if there are too many.
func (l *webLimit) admit(conn net.Conn) *webConn {
	c := &webConn{Conn: conn, limit: l}
	l.mu.Lock()
	var excess *webConn
	if len(l.conns) >= l.most {
		excess = l.conns[max(0, slices.IndexFunc(l.conns, func(c *webConn) bool { return !c.active }))]
	}
	l.conns = append(l.conns, c)
	l.mu.Unlock()
	if excess != nil {
		_ = excess.Close() // its server sees that it is closed
	}
	return c
}

func (l *webLimit) forget(c *webConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := slices.Index(l.conns, c); i >= 0 {
		l.conns = slices.Delete(l.conns, i, i+1)
	}
}

// changed is an http.Server's ConnState.
func (l *webLimit) changed(conn net.Conn, state http.ConnState) {
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn()
	}
	if c, ok := conn.(*webConn); ok {
		l.mu.Lock()
		c.active = state == http.StateActive
		l.mu.Unlock()
	}
}

// A webListener accepts connections that its limit counts.
type webListener struct {
	net.Listener
	limit *webLimit
}

func (l webListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.limit.admit(conn), nil
}
