package fleet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// ProxyConfig says how far away the other end of a Proxy is. The zero value adds
// nothing.
type ProxyConfig struct {
	// Delay is the time bytes need in each direction: half a round trip.
	Delay time.Duration

	// BytesPerSecond bounds each direction, all connections together. 0: no bound.
	BytesPerSecond int64

	// Buffer bounds the bytes underway in each direction of a connection; 0 means
	// 16 MiB. A connection moves at most Buffer bytes in each Delay: 16 MiB in
	// 50 ms are 320 MiB/s.
	Buffer int
}

const (
	defaultProxyBuffer = 16 << 20
	proxyChunk         = 64 << 10
	maxProxyConns      = 1024
)

// A Proxy is a TCP proxy that delays what passes through it, in each direction,
// so that two ends on one machine seem far apart. A connection reaches the far
// end after one and a half round trips, as TCP's handshake does.
type Proxy struct {
	listener net.Listener
	dial     func(context.Context) (net.Conn, error)
	config   ProxyConfig
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	up, down pace
}

// NewProxy accepts connections on l, which it owns from now on, and joins each
// with a connection from dial, until Close.
func NewProxy(l net.Listener, dial func(context.Context) (net.Conn, error), config ProxyConfig) *Proxy {
	if config.Buffer <= 0 {
		config.Buffer = defaultProxyBuffer
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &Proxy{listener: l, dial: dial, config: config, cancel: cancel}
	p.up.rate, p.down.rate = config.BytesPerSecond, config.BytesPerSecond
	p.wg.Go(func() { p.accept(ctx) })
	return p
}

// Addr is the address the proxy listens on.
func (p *Proxy) Addr() net.Addr { return p.listener.Addr() }

// Close ends the proxy and all connections through it.
func (p *Proxy) Close() error {
	p.cancel()
	err := p.listener.Close()
	p.wg.Wait()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close proxy: %w", err)
	}
	return nil
}

func (p *Proxy) accept(ctx context.Context) {
	room := make(chan struct{}, maxProxyConns)
	for {
		select {
		case room <- struct{}{}:
		case <-ctx.Done():
			return
		}
		near, err := p.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors: it may pass
			<-room
			sleep(ctx, 10*time.Millisecond)
			continue
		}
		p.wg.Go(func() {
			defer func() { <-room }()
			p.join(ctx, near)
		})
	}
}

// join serves one connection until both directions have ended or one has failed.
func (p *Proxy) join(ctx context.Context, near net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	// What waits in a read, a write or on a line wakes up when ctx ends.
	up, down := newLine(p.config), newLine(p.config)
	context.AfterFunc(ctx, func() { near.Close(); up.end(); down.end() })

	// What the client sends first is underway while the handshake still is.
	wg.Go(func() { up.fill(near, &p.up) })
	sleep(ctx, 3*p.config.Delay)
	far, err := p.dial(ctx)
	if err != nil {
		reset(near)
		return
	}
	context.AfterFunc(ctx, func() { far.Close() })
	wg.Go(func() { down.fill(far, &p.down) })
	var ways sync.WaitGroup
	for to, l := range map[net.Conn]*line{far: up, near: down} {
		ways.Go(func() {
			if err := l.drain(ctx, to); err != nil {
				cancel()
			}
		})
	}
	ways.Wait()
}

// reset makes the peer see a reset instead of an orderly end.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		t.SetLinger(0) //nolint:errcheck // the close is then merely orderly
	}
	c.Close()
}

func sleep(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// pace says when bytes leave a link of a certain rate.
type pace struct {
	rate int64 // bytes per second, 0 = no bound
	mu   sync.Mutex
	free time.Time // when the link has sent all it was given
}

// send gives n bytes to the link and returns when the last has left.
func (p *pace) send(n int) time.Time {
	now := time.Now()
	if p.rate <= 0 {
		return now
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.free.Before(now) {
		p.free = now
	}
	p.free = p.free.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	return p.free
}

// A line holds the bytes underway in one direction of a connection.
type line struct {
	delay time.Duration
	limit int

	mu      sync.Mutex
	changed *sync.Cond // on mu: anything below has changed
	chunks  []chunk
	size    int
	ended   bool // nobody may wait any more
}

// A chunk arrives at due. One without data is the end; err says of which kind.
type chunk struct {
	data []byte
	due  time.Time
	last bool
	err  error
}

func newLine(config ProxyConfig) *line {
	l := &line{delay: config.Delay, limit: config.Buffer}
	l.changed = sync.NewCond(&l.mu)
	return l
}

// end wakes and stops fill and drain.
func (l *line) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.changed.Broadcast()
}

// fill reads from into the line until from ends.
func (l *line) fill(from net.Conn, p *pace) {
	buf := make([]byte, min(proxyChunk, l.limit))
	for {
		n, err := from.Read(buf)
		if n > 0 && !l.put(chunk{data: append([]byte(nil), buf[:n]...), due: p.send(n).Add(l.delay)}) {
			return
		}
		if err != nil {
			l.put(chunk{due: time.Now().Add(l.delay), last: true, err: err})
			return
		}
	}
}

// put waits for room; it reports whether the line still goes on.
func (l *line) put(c chunk) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.ended && l.size > 0 && l.size+len(c.data) > l.limit {
		l.changed.Wait()
	}
	if l.ended {
		return false
	}
	l.chunks = append(l.chunks, c)
	l.size += len(c.data)
	l.changed.Broadcast()
	return true
}

func (l *line) take() (chunk, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.ended && len(l.chunks) == 0 {
		l.changed.Wait()
	}
	if l.ended {
		return chunk{}, false
	}
	c := l.chunks[0]
	l.chunks[0] = chunk{}
	l.chunks = l.chunks[1:]
	return c, true
}

// drain writes what is due to the other end. An orderly end is passed on as one
// (nil); anything else is an error, and the connection is then reset.
func (l *line) drain(ctx context.Context, to net.Conn) error {
	for {
		c, ok := l.take()
		if !ok {
			return context.Cause(ctx)
		}
		sleep(ctx, time.Until(c.due))
		if c.last {
			return passEnd(to, c.err)
		}
		if _, err := to.Write(c.data); err != nil {
			return err
		}
		// Only now is there room again: the bytes were in our memory until here.
		l.mu.Lock()
		l.size -= len(c.data)
		l.changed.Broadcast()
		l.mu.Unlock()
	}
}
