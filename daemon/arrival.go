package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"sync"

	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"

	"nixdispatch/daemon/usage"
)

const (
	// maxUserArriving bounds one user's requests that have not arrived in full, and so
	// each request: a list of many short strings takes eight times as much memory as it has
	// bytes. Larger ones are only nix-daemon's.
	maxUserArriving = maxMessage / 2
	// frameCost is what a DATA frame takes in memory beside its payload, at most.
	frameCost = 256
	// maxHeader bounds the header of a call. Those of callers have a few hundred bytes.
	maxHeader = 16 << 10
)

var errTooMuchArriving = errors.New("too many bytes of requests that are not complete")

// An arrival counts the bytes of requests that a connection has brought and that are no
// complete messages yet: gRPC holds them in memory and says nothing of them until they are.
// Safe for concurrent use.
type arrival struct {
	bounded bool

	mu     sync.Mutex
	use    *usage.Use
	held   int64
	calls  int
	closed bool
	frames frameMeter
}

func newArrival(users *usage.Ledger, c caller, bounded bool) *arrival {
	return &arrival{bounded: bounded, use: users.Count(c.user(), usage.ArrivingBytes, 0), frames: frameMeter{left: len(clientPreface)}}
}

// read counts what was read from the connection, and tells whether the user may have it.
func (a *arrival) read(b []byte) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.frames.data(b)
	if n == 0 || a.closed {
		return true
	}
	if !a.use.Grow(n, a.bounded) {
		return false
	}
	a.held += n
	return true
}

// completeLocked counts bytes that have become a message, or are gone.
func (a *arrival) completeLocked(n int64) {
	n = min(n, a.held)
	a.held -= n
	a.use.Grow(-n, false)
}

// release is called when the connection is closed. Its calls may end later.
func (a *arrival) release() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.held, a.closed = 0, true
	a.use.Release()
}

// handle follows the calls of the connection.
func (a *arrival) handle(s stats.RPCStats) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch s := s.(type) {
	case *stats.Begin:
		a.calls++
	case *stats.InPayload:
		a.completeLocked(int64(s.WireLength))
	case *stats.End:
		// What ended calls had brought is gone, and so are the frames of messages.
		if a.calls--; a.calls == 0 {
			a.completeLocked(a.held)
		}
	}
}

// arrivals is the handler that gRPC calls for each call of each connection.
type arrivals struct{}

type arrivalKey struct{}

// TagRPC has HandleRPC find the arrival.
func (arrivals) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(peerInfo); ok && info.arrival != nil {
			return context.WithValue(ctx, arrivalKey{}, info.arrival)
		}
	}
	return ctx
}

// HandleRPC counts each step of a call.
func (arrivals) HandleRPC(ctx context.Context, s stats.RPCStats) {
	if a, ok := ctx.Value(arrivalKey{}).(*arrival); ok {
		a.handle(s)
	}
}

// TagConn and HandleConn have nothing to do: a connection counts for itself.
func (arrivals) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn does nothing.
func (arrivals) HandleConn(context.Context, stats.ConnStats) {}

// clientPreface is what comes before the first frame.
const clientPreface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// A frameMeter finds the DATA frames in the bytes of an HTTP/2 connection. gRPC checks that
// they are well formed; the meter only needs to count no less than gRPC keeps.
type frameMeter struct {
	header  [9]byte
	have    int  // bytes of header
	left    int  // bytes of the frame's payload, or of the preface, that are to come
	payload bool // of a DATA frame
}

// data is what the DATA frames in b take in memory.
func (m *frameMeter) data(b []byte) (cost int64) {
	const dataFrame = 0
	for len(b) > 0 {
		if m.left > 0 {
			n := min(m.left, len(b))
			if m.payload {
				cost += int64(n)
			}
			m.left -= n
			b = b[n:]
			continue
		}
		n := copy(m.header[m.have:], b)
		m.have += n
		b = b[n:]
		if m.have < len(m.header) {
			break
		}
		m.have = 0
		m.left = int(binary.BigEndian.Uint32(m.header[:4]) >> 8)
		if m.payload = m.header[3] == dataFrame; m.payload {
			cost += frameCost
		}
	}
	return cost
}

// Read reads from the caller, and ends the connection if its user sends more than one user
// may of requests that are not complete.
func (c *limitedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.arrival.read(b[:n]) {
		return n, err
	}
	c.limit.refused(c.caller, errTooMuchArriving)
	return 0, io.ErrUnexpectedEOF
}
