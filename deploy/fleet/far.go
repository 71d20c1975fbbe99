package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
)

// passEnd tells to how the other end ended: orderly (nil) or not.
func passEnd(to net.Conn, end error) error {
	if !errors.Is(end, io.EOF) {
		reset(to)
		return end
	}
	half, ok := to.(interface{ CloseWrite() error })
	if !ok {
		return errors.New("the connection cannot be closed one way")
	}
	return half.CloseWrite()
}

// Far gives a host a second name, under which it is as far away as config says:
// the SSH port of that name leads through a Proxy to the host's. All hosts
// resolve the name and know its host key. The proxy runs in this process until the
// fleet is closed or the proxy is.
func (f *Fleet) Far(ctx context.Context, name string, to *Host, config ProxyConfig) (*Proxy, error) {
	index, err := f.addFar(name, to)
	if err != nil {
		return nil, fmt.Errorf("make the far name %q: %w", name, err)
	}
	if err := f.ip(ctx, f.network, fmt.Sprintf("addr replace %s/32 dev %s\n", farAddr(index), bridgeName)); err != nil {
		return nil, fmt.Errorf("make the far name %q: %w", name, err)
	}
	p, err := f.Proxy(net.JoinHostPort(farAddr(index), "22"), net.JoinHostPort(to.Addr(), "22"), config)
	if err != nil {
		return nil, fmt.Errorf("make the far name %q: %w", name, err)
	}
	if err := f.tellNames(ctx); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// addFar gives the name an address, the same one if it had been given before.
func (f *Fleet) addFar(name string, to *Host) (int, error) {
	f.hostsMu.Lock()
	defer f.hostsMu.Unlock()
	if !nameForm.MatchString(name) {
		return 0, errors.New("want lower-case letters, digits and dashes")
	}
	if f.hosts[name] != nil {
		return 0, errors.New("a host has this name")
	}
	far, known := f.far[name]
	if !known {
		if len(f.far) >= maxFar {
			return 0, fmt.Errorf("a fleet has room for %d of them", maxFar)
		}
		far.Index = len(f.far) + 1 // they are never removed
	}
	far.Host = to.name
	f.far[name] = far
	return far.Index, nil
}

// Proxy makes a Proxy on the fleet's network: it listens and connects there, from
// the bridge (10.211.0.1, host name "bridge"). listen and to are "address:port".
// It runs in this process until the fleet is closed or it is.
func (f *Fleet) Proxy(listen, to string, config ProxyConfig) (*Proxy, error) {
	local, err := net.ResolveTCPAddr("tcp", listen)
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", listen, err)
	}
	remote, err := net.ResolveTCPAddr("tcp", to)
	if err != nil {
		return nil, fmt.Errorf("proxy to %q: %w", to, err)
	}
	var listener net.Listener
	err = f.inNetwork(func() (err error) {
		listener, err = net.ListenTCP("tcp", local)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %q: %w", listen, err)
	}
	return f.proxy(listener, f.inNetwork, remote.String(), config), nil
}

// proxy makes a Proxy on listener to an address in a network that in leads to.
func (f *Fleet) proxy(listener net.Listener, in func(func() error) error, to string, config ProxyConfig) *Proxy {
	p := NewProxy(listener, func(ctx context.Context) (conn net.Conn, err error) {
		err = in(func() (err error) {
			var d net.Dialer
			conn, err = d.DialContext(ctx, "tcp", to)
			return err
		})
		return conn, err
	}, config)
	f.proxiesMu.Lock()
	defer f.proxiesMu.Unlock()
	f.proxies = append(f.proxies, p)
	return p
}

// Forward makes a Proxy from an address of this machine, such as "127.0.0.1:0", to
// one in the host's own network, such as "127.0.0.1:9747". It runs in this process
// until the fleet is closed or it is.
func (h *Host) Forward(listen, to string) (*Proxy, error) {
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, fmt.Errorf("forward to host %s: %w", h.name, err)
	}
	in := func(fn func() error) error { return inNetworkOf(h.snapshot().Init, fn) }
	return h.fleet.proxy(l, in, to, ProxyConfig{}), nil
}
