package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/exporter-toolkit/web"
	"go.yaml.in/yaml/v2"

	"nixdispatch/daemon/history"
	"nixdispatch/daemon/webpage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
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
	webpage.Register(mux, d.pageSource())
	server := &http.Server{
		Handler: mux,
		// A request is a few lines, and an answer at most a few hundred KiB.
		ReadTimeout:    10 * time.Second,
		WriteTimeout:   30 * time.Second,
		IdleTimeout:    30 * time.Second,
		MaxHeaderBytes: 64 << 10,
		ConnState:      d.webConnections.changed,
		// What strangers do wrong is worth no more than that.
		ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
	}
	l = webListener{l, d.webConnections}
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

// pageSource is where the page for people has its contents from.
func (d *Daemon) pageSource() webpage.Source {
	host, err := os.Hostname()
	if err != nil {
		host = "this host"
	}
	return webpage.Source{
		Host:   host,
		Status: func() *dispatchv1.StatusResponse { return d.status(webpage.MaxQueued) },
		Recent: d.recentBuilds,
		Listed: func(uri string) bool { return d.metrics.machine(uri) == uri },
		Named:  func(r *http.Request) bool { return d.opts.PageNames || d.authenticates(r) },
	}
}

// recentBuilds are the last that have ended, as far as a history is kept.
func (d *Daemon) recentBuilds() []*dispatchv1.FinishedBuild {
	if d.record.rows == nil {
		return nil
	}
	var recent []*dispatchv1.FinishedBuild
	err := d.record.rows.Each(history.Query{}, func(r history.Row) error {
		if recent = append(recent, finishedBuild(r)); len(recent) == webpage.MaxRecent {
			return errEnough
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		d.log.Debug("the page has no history", "err", err)
	}
	return recent
}

// authenticates tells whether who is not known does not get as far as this: that a
// certificate was asked for and verified, or that there are passwords, which the
// exporter toolkit has compared by now.
func (d *Daemon) authenticates(r *http.Request) bool {
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		return true
	}
	if d.opts.MetricsConfig == "" {
		return false
	}
	text, err := os.ReadFile(d.opts.MetricsConfig)
	if err != nil {
		return false
	}
	var config web.Config
	return yaml.UnmarshalStrict(text, &config) == nil && len(config.Users) > 0
}
