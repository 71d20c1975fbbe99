package main

import (
	"fmt"
	"net"

	"github.com/coreos/go-systemd/v22/activation"
	sddaemon "github.com/coreos/go-systemd/v22/daemon"

	"nixdispatch/daemon"
)

// underSystemd takes the socket that systemd has bound for us, if it has, and has
// the daemon tell systemd of its state, if it wants to know.
func underSystemd(opts *daemon.Options) error {
	listeners, err := activation.Listeners()
	if err != nil {
		return fmt.Errorf("sockets of systemd: %w", err)
	}
	for _, l := range listeners {
		switch {
		case l == nil || l.Addr().Network() != "unix" || opts.Listener != nil:
			return fmt.Errorf("systemd passes %d sockets, want one unix stream socket", len(listeners))
		default:
			opts.Listener = keptSocket{l}
			opts.Socket = l.Addr().String()
		}
	}
	opts.Notify = func(state string) {
		// Nobody listens where systemd did not start us; then it does nothing.
		_, _ = sddaemon.SdNotify(false, state)
	}
	opts.Watchdog, err = sddaemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("watchdog of systemd: %w", err)
	}
	return nil
}

// A keptSocket is systemd's: closing it leaves the path in place, for the next
// start.
type keptSocket struct{ net.Listener }

func (k keptSocket) Close() error {
	if unix, ok := k.Listener.(*net.UnixListener); ok {
		unix.SetUnlinkOnClose(false)
	}
	return k.Listener.Close()
}
