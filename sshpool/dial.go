package sshpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// resolveTarget finds out how the host is reached. Only the attempt to connect
// calls it, of which there is one at a time.
func (h *Host) resolveTarget(ctx context.Context, anew bool) (*Target, error) {
	if h.target != nil && !anew {
		return h.target, nil
	}
	t, err := h.opts.resolver.resolve(ctx, h.cfg)
	if err != nil {
		return nil, configError(h.cfg, err)
	}
	if h.target == nil || h.target.String() != t.String() {
		h.log.Debug("ssh target", "target", t.String(), "ssh_config", h.cfg.SSHConfig && t.noProgram == nil)
	}
	h.target = t
	defer func() { h.trace.done(StepConfig, t.String()) }()
	if t.noProgram != nil {
		h.trace.warn("ssh_config is not read: " + t.noProgram.Error())
		h.opts.noProgram.Do(func() { h.log.Warn("ssh_config is not read", "err", t.noProgram) })
	}
	for _, w := range t.Warnings {
		h.warnOnce(w)
	}
	return t, nil
}

// warnOnce warns of something about the configuration the first time it is seen.
func (h *Host) warnOnce(warning string) {
	if !h.warned[warning] {
		h.warned[warning] = true
		h.trace.warn(warning)
		h.log.Warn("ssh configuration", "warning", warning)
	}
}

// dialTransport makes a connection to the host, or starts the proxy that does.
func (h *Host) dialTransport(ctx context.Context, t *Target) (net.Conn, error) {
	proxy, err := t.proxyArguments()
	if err != nil {
		return nil, configError(h.cfg, err)
	}
	if proxy != nil {
		var nc net.Conn
		if t.ProxyUseFdpass {
			nc, err = h.dialFdpass(ctx, proxy)
		} else {
			nc, err = h.dialProxy(proxy)
		}
		if err != nil {
			return nil, h.fail(StepConnect, CauseProxy, err, fixProxy)
		}
		return nc, nil
	}
	timeout := h.opts.ConnectTimeout
	if t.ConnectTimeout > 0 {
		timeout = t.ConnectTimeout
	}
	dialCtx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	dial := h.opts.Dial
	mark := new(resolveMark)
	if dial == nil {
		dialer := &net.Dialer{ControlContext: mark.control}
		if dialer.LocalAddr, err = t.localAddr(dialCtx); err != nil {
			return nil, configError(h.cfg, err)
		}
		dial = dialer.DialContext
	}
	network := map[string]string{"inet": "tcp4", "inet6": "tcp6"}[t.AddressFamily]
	if network == "" {
		network = "tcp"
	}
	nc, err := dial(dialCtx, network, t.addr())
	h.trace.connected(mark, nc)
	if err == nil {
		return nc, nil
	}
	// The dialer keeps to the deadline by itself, and may be the first to see it.
	late := dialCtx.Err() == context.DeadlineExceeded ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded)
	return nil, h.dialError(t, err, timeout, late)
}

func (h *Host) dialError(t *Target, err error, timeout time.Duration, late bool) error {
	dns, isDNS := errors.AsType[*net.DNSError](err)
	network, isNetwork := errors.AsType[net.Error](err)
	switch {
	case isDNS && dns.IsNotFound:
		return h.fail(StepResolve, CauseHostUnknown, err,
			fmt.Sprintf("correct the name, or add %q to DNS, /etc/hosts or ssh_config", t.Host))
	case isDNS && dns.IsTimeout:
		return h.fail(StepResolve, CauseTimeout, err, "look whether the name server answers")
	case isDNS:
		return h.fail(StepResolve, CauseHostUnknown, err, "look at /etc/resolv.conf, and whether the name server can be reached")
	case late:
		err = fmt.Errorf("no answer within %v: %w", timeout, err)
		fallthrough
	case isNetwork && network.Timeout():
		return h.fail(StepConnect, CauseTimeout, err, "the machine is off, or a firewall drops the packets")
	case errors.Is(err, syscall.ECONNREFUSED):
		return h.fail(StepConnect, CauseRefused, err, "start sshd there, or correct the port")
	default:
		return h.fail(StepConnect, CauseUnreachable, err, "look whether the machine is on, and at the routes to it")
	}
}

const fixProxy = "run the proxy by hand, as this user, and see what it says"

// localAddr is what BindAddress says; nil if nothing.
func (t *Target) localAddr(ctx context.Context) (net.Addr, error) {
	if t.BindAddress == "" || isNone(t.BindAddress) {
		return nil, nil
	}
	addrs, err := net.DefaultResolver.LookupIPAddr(ctx, t.BindAddress)
	if err != nil {
		return nil, fmt.Errorf("BindAddress: %w", err)
	}
	for _, a := range addrs {
		v4 := a.IP.To4() != nil
		if t.AddressFamily == "any" || t.AddressFamily == "inet" && v4 || t.AddressFamily == "inet6" && !v4 {
			return &net.TCPAddr{IP: a.IP, Zone: a.Zone}, nil
		}
	}
	return nil, fmt.Errorf("BindAddress %s: no address of family %s", t.BindAddress, t.AddressFamily)
}
