package sshpool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	"golang.org/x/crypto/ssh"
)

const fixKnownHosts = "mend that, or take it out of the configuration"

// handshake makes an SSH connection of c.net and sets c.ssh. It offers no bad keys,
// and adds to them one that could not sign.
func (h *Host) handshake(ctx context.Context, c *conn, t *Target, bad badKeys) (<-chan ssh.NewChannel, <-chan *ssh.Request, error) {
	keys, err := loadHostKeys(ctx, t, h.log)
	if err != nil {
		return nil, nil, h.fail(StepHostKey, CauseHostKeyFiles, err, fixKnownHosts)
	}
	for _, w := range keys.warnings {
		h.warnOnce(fmt.Sprintf("known_hosts line ignored: %v", w))
	}
	timeout := h.handshakeTimeout(t)
	ids := loadIdentities(t, time.Now().Add(timeout))
	defer ids.close()
	ids.leaveOut(bad)

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
		if keyErr = keys.askCommand(ctx, key); keyErr == nil {
			keyErr = keys.check(remote, key)
		}
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
	maps.Copy(bad, ids.broken)
	late := ctx.Err() == context.DeadlineExceeded
	if late {
		err = fmt.Errorf("no answer within %v: %w", timeout, err)
	}
	if keyErr != nil && !errors.As(keyErr, new(*hostKeyError)) {
		return nil, nil, h.fail(StepHostKey, CauseHostKeyFiles, keyErr, fixKnownHosts)
	}
	if refused, ok := errors.AsType[*hostKeyError](keyErr); ok {
		return nil, nil, h.fail(StepHostKey, refused.cause, refused, refused.fix)
	}
	return nil, nil, h.noLogin(c, t, ids, verified, late, err)
}

func (h *Host) handshakeTimeout(t *Target) time.Duration {
	timeout := max(h.opts.HandshakeTimeout, t.ConnectTimeout)
	if t.ProxyCommand != "" || t.ProxyJump != "" {
		timeout += max(h.opts.ConnectTimeout, t.ConnectTimeout) // the proxy connects first
	}
	return timeout
}

// noLogin says why a handshake failed. verified says that it was at
// authentication.
func (h *Host) noLogin(c *conn, t *Target, ids *identities, verified, late bool, err error) error {
	if verified {
		cause, fix, err := ids.explain(t.User, err)
		if late {
			cause, fix = CauseTimeout, "look whether sshd there, or the agent here, is stuck"
		}
		return h.fail(StepAuthenticate, cause, err, fix)
	}
	if head, _ := c.net.beginning(); len(head) > 0 && versionLine(head) == "" {
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
