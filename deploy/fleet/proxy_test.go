package fleet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A pipeListener hands out one end of net.Pipe for every dial. What it carries
// can be measured exactly under synctest.
type pipeListener struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

func (l *pipeListener) dial(context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	l.conns <- far
	return near, nil
}

// wayPipe is a proxy between two pipes; near and far are the ends that a client
// and a server hold.
func wayPipe(t *testing.T, config ProxyConfig) (near, far net.Conn) {
	t.Helper()
	front, back := newPipeListener(), newPipeListener()
	p := NewProxy(front, back.dial, config)
	t.Cleanup(func() { p.Close() })
	near, err := front.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	far, err = back.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return near, far
}

func TestProxyDelaysEachDirection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const delay = 25 * time.Millisecond
		started := time.Now()
		near, far := wayPipe(t, ProxyConfig{Delay: delay})
		if took := time.Since(started); took != 3*delay {
			t.Errorf("the server saw the connection after %v, want %v", took, 3*delay)
		}
		for name, ends := range map[string][2]net.Conn{"up": {near, far}, "down": {far, near}} {
			started := time.Now()
			if _, err := ends[0].Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(ends[1], make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(started); took != delay {
				t.Errorf("%s: %v, want %v", name, took, delay)
			}
		}
	})
}

func TestProxyPipelinesWithinTheDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := wayPipe(t, ProxyConfig{Delay: time.Second})
		started := time.Now()
		for range 100 {
			if _, err := near.Write(make([]byte, 1000)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := io.ReadFull(far, make([]byte, 100*1000)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(started); took != time.Second {
			t.Errorf("100 messages took %v, want one delay", took)
		}
	})
}

func TestProxyBoundsBandwidthAndMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rate, limit = 1 << 20, 256 << 10
		near, far := wayPipe(t, ProxyConfig{BytesPerSecond: rate, Buffer: limit})
		var accepted int
		var wg sync.WaitGroup
		wg.Go(func() {
			for accepted < 4<<20 {
				n, err := near.Write(make([]byte, 64<<10))
				accepted += n
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
		time.Sleep(time.Minute) // nobody reads: the proxy must stop taking more
		synctest.Wait()
		// Two chunks more are in hands: one being written, one read and waiting.
		if most := limit + 2*proxyChunk; accepted > most || accepted < limit {
			t.Errorf("the proxy holds %d bytes, want %d to %d", accepted, limit, most)
		}
		held, started := accepted, time.Now()
		if _, err := io.ReadFull(far, make([]byte, 4<<20)); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
		want := time.Duration(float64(4<<20-held) / rate * float64(time.Second))
		if took := time.Since(started); took < want-100*time.Millisecond || took > want+100*time.Millisecond {
			t.Errorf("%d bytes took %v, want about %v", 4<<20-held, took, want)
		}
	})
}

// tcpProxy is a proxy on loopback in front of a server that serve is run for.
func tcpProxy(t *testing.T, config ProxyConfig, serve func(*net.TCPConn)) *net.TCPConn {
	t.Helper()
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := NewProxy(front, func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", server.Addr().String())
	}, config)
	var wg sync.WaitGroup
	wg.Go(func() {
		if c, err := server.Accept(); err == nil {
			defer c.Close()
			serve(c.(*net.TCPConn))
		}
	})
	client, err := net.Dial("tcp", p.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		client.Close()
		server.Close()
		wg.Wait()
	})
	return client.(*net.TCPConn)
}

func TestProxyPassesOnEveryByteAndEachEnd(t *testing.T) {
	want := make([]byte, 3<<20)
	for i := range want {
		want[i] = byte(rand.Uint32())
	}
	client := tcpProxy(t, ProxyConfig{Delay: time.Millisecond, Buffer: 100_000}, func(c *net.TCPConn) {
		got, err := io.ReadAll(c) // until the client's half close
		if err != nil {
			t.Error(err)
		}
		c.Write(got)
	})
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := client.Write(want); err != nil {
			t.Error(err)
		}
		client.CloseWrite()
	})
	got, err := io.ReadAll(client)
	if err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes came back changed (%d sent)", len(got), len(want))
	}
}

func TestProxyPassesOnAReset(t *testing.T) {
	client := tcpProxy(t, ProxyConfig{}, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 1))
		c.SetLinger(0)
	})
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	client.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := client.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read %d bytes, %v; want a reset", n, err)
	}
}

func TestProxyResetsWhenTheFarEndRefuses(t *testing.T) {
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := NewProxy(front, func(context.Context) (net.Conn, error) { return nil, errors.New("refused") }, ProxyConfig{})
	defer p.Close()
	c, err := net.Dial("tcp", p.Addr().String())
	if errors.Is(err, syscall.ECONNRESET) {
		return // it came that soon
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, io.EOF) {
		t.Errorf("read %d bytes, %v; want a reset", n, err)
	}
}

func TestProxyCloseEndsOpenConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		front, back := newPipeListener(), newPipeListener()
		p := NewProxy(front, back.dial, ProxyConfig{Delay: time.Hour})
		near, err := front.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		far, err := back.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := near.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		started := time.Now()
		if err := p.Close(); err != nil {
			t.Fatal(err)
		}
		for _, c := range []net.Conn{near, far} {
			if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("an end is still open")
			}
		}
		if took := time.Since(started); took != 0 {
			t.Errorf("Close took %v", took)
		}
	})
}
