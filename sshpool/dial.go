package sshpool

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// This file makes connections: the transport, then the SSH handshake over it.

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
	return nil, h.dialError(t, err, timeout, dialCtx.Err() == context.DeadlineExceeded)
}

func (h *Host) dialError(t *Target, err error, timeout time.Duration, late bool) error {
	dns, isDNS := errors.AsType[*net.DNSError](err)
	network, isNetwork := errors.AsType[net.Error](err)
	switch {
	case isDNS && !dns.IsTimeout:
		return h.fail(StepResolve, CauseHostUnknown, err,
			fmt.Sprintf("correct the name, or add %q to DNS, /etc/hosts or ssh_config", t.Host))
	case isDNS:
		return h.fail(StepResolve, CauseTimeout, err, "look whether the name server answers")
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

// handshake makes an SSH connection of c.net and sets c.ssh.
func (h *Host) handshake(ctx context.Context, c *conn, t *Target) (<-chan ssh.NewChannel, <-chan *ssh.Request, error) {
	keys, err := loadHostKeys(t, h.log)
	if err != nil {
		return nil, nil, h.fail(StepHostKey, CauseHostKeyFiles, err, "mend that file, or take it out of the configuration")
	}
	for _, w := range keys.warnings {
		h.warnOnce(fmt.Sprintf("known_hosts line ignored: %v", w))
	}
	timeout := max(h.opts.HandshakeTimeout, t.ConnectTimeout)
	if t.ProxyCommand != "" || t.ProxyJump != "" {
		timeout += max(h.opts.ConnectTimeout, t.ConnectTimeout) // the proxy connects first
	}
	ids := loadIdentities(t, time.Now().Add(timeout))
	defer ids.close()

	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { c.net.Close() })
	defer stop()

	var keyErr error
	verified := false
	config := t.clientConfig()
	config.Auth = []ssh.AuthMethod{ssh.PublicKeys(ids.watched()...)}
	config.HostKeyAlgorithms = keys.algorithms
	config.HostKeyCallback = func(_ string, remote net.Addr, key ssh.PublicKey) error {
		h.trace.greeted(c.net, t)
		keyErr = keys.check(remote, key)
		verified = keyErr == nil
		if verified {
			h.trace.done(StepHostKey, describe(key)+", "+keys.accepted)
		}
		return keyErr
	}
	var chans <-chan ssh.NewChannel
	var reqs <-chan *ssh.Request
	c.ssh, chans, reqs, err = ssh.NewClientConn(c.net, t.addr(), config)
	if err == nil && ctx.Err() == nil {
		h.trace.done(StepAuthenticate, ids.accepted(t.User))
		return chans, reqs, nil
	}
	if err == nil { // too late: the transport is being closed
		c.ssh.Wait()
		err, verified = ctx.Err(), true
	}
	late := ctx.Err() == context.DeadlineExceeded
	if late {
		err = fmt.Errorf("no answer within %v: %w", timeout, err)
	}
	refused, isRefused := errors.AsType[*hostKeyError](keyErr)
	switch {
	case isRefused:
		return nil, nil, h.fail(StepHostKey, refused.cause, refused, refused.fix)
	case verified:
		cause, err, fix := ids.explain(t.User, err)
		if late {
			cause, fix = CauseTimeout, "look whether sshd there, or the agent here, is stuck"
		}
		return nil, nil, h.fail(StepAuthenticate, cause, err, fix)
	default:
		return nil, nil, h.noHandshake(c.net, err, late)
	}
}

// noHandshake says why no SSH could be spoken.
func (h *Host) noHandshake(l *liveConn, err error, late bool) error {
	if head, _ := l.beginning(); len(head) > 0 && versionLine(head) == "" {
		err = fmt.Errorf("%w; it says %q", err, head)
	}
	var none *ssh.AlgorithmNegotiationError
	switch proxy, ok := errors.AsType[*ProxyError](err); {
	case ok:
		return h.fail(StepConnect, CauseProxy, proxy, fixProxy)
	case late:
		return h.fail(StepHandshake, CauseTimeout, err, "look whether sshd there is stuck, or lets no more clients in")
	case errors.As(err, &none):
		return h.fail(StepHandshake, CauseNoSSH, err, "look at Ciphers, KexAlgorithms, MACs and HostKeyAlgorithms at both ends")
	default:
		return h.fail(StepHandshake, CauseNoSSH, err, "look whether it is an sshd that listens there, and what its log says")
	}
}

// clientConfig is the part of the library's configuration that is the target's
// alone.
func (t *Target) clientConfig() *ssh.ClientConfig {
	config := &ssh.ClientConfig{User: t.User}
	config.Ciphers = slices.Clone(t.Ciphers)
	config.KeyExchanges = slices.Clone(t.KexAlgorithms)
	config.MACs = slices.Clone(t.MACs)
	config.RekeyThreshold = t.RekeyBytes
	return config
}
