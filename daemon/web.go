package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/exporter-toolkit/web"
)

// checkWebConfig finds fault with a web configuration file before it is used. That
// happens anew for each connection and request: a certificate, or a password, that
// is replaced needs no restart, and a file that has become bad lets nobody in.
func checkWebConfig(file string) error {
	if err := web.Validate(file); err != nil {
		return fmt.Errorf("metrics configuration %q: %w", file, err)
	}
	return nil
}

// listenWeb binds the metrics listener; nil if there is none.
func (d *Daemon) listenWeb(ctx context.Context) (net.Listener, error) {
	if d.opts.MetricsListen == "" {
		return nil, nil
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", d.opts.MetricsListen)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	if tcp, ok := l.Addr().(*net.TCPAddr); ok && !tcp.IP.IsLoopback() && d.opts.MetricsConfig == "" {
		d.log.Warn("metrics are served to other hosts, without a password and unencrypted", "address", l.Addr().String(),
			"hint", "--metrics-config")
	}
	return l, nil
}

// serveWeb starts the metrics listener; it returns nil if there is none.
func (d *Daemon) serveWeb(l net.Listener, serving *sync.WaitGroup, failed chan<- error) *http.Server {
	if l == nil {
		return nil
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics.registry, promhttp.HandlerOpts{}))
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 10 * time.Second,
		WriteTimeout:      time.Minute,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		// What strangers do wrong is worth no more than that.
		ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
	}
	serving.Go(func() {
		if err := d.serveOn(l, server); !errors.Is(err, http.ErrServerClosed) {
			failed <- fmt.Errorf("metrics: %w", err)
		}
	})
	return server
}

// serveOn serves, with TLS and passwords if there is a configuration for it.
func (d *Daemon) serveOn(l net.Listener, server *http.Server) error {
	if d.opts.MetricsConfig == "" {
		return server.Serve(l)
	}
	return web.Serve(l, server, &web.FlagConfig{WebConfigFile: &d.opts.MetricsConfig}, d.log.With("listener", "metrics"))
}
