package daemon

import (
	"net/http"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"nixdispatch/sshpool"
)

// refusing tells whether the daemon takes no more requests to build: it is
// shutting down, though builds may go on. The dispatcher's mutex makes it certain.
func (d *Daemon) refusing() bool { return d.draining.Load() || d.stopping() }

// stopping tells whether the daemon begins no more builds.
func (d *Daemon) stopping() bool { return d.life.Err() != nil }

// beginRealising counts a Build call, unless it comes too late. The caller must
// call realising.Done at its end.
func (d *Daemon) beginRealising() bool {
	d.dispatcher.mu.Lock()
	defer d.dispatcher.mu.Unlock()
	if d.refusing() {
		return false
	}
	d.realising.Add(1)
	return true
}

// drainBuilds lets what is under way come to its end, for Options.DrainTimeout at
// most. What is asked for meanwhile is refused or, by hooks, put off.
func (d *Daemon) drainBuilds() {
	d.dispatcher.mu.Lock()
	d.draining.Store(true)
	builds := len(d.dispatcher.builds)
	d.dispatcher.mu.Unlock()
	if d.opts.DrainTimeout <= 0 {
		return
	}
	done := make(chan struct{})
	go func() { // ends at the latest when the calls do
		defer close(done)
		d.realising.Wait()
		d.detached.running.Wait()
		d.builds.Wait()
	}()
	if builds > 0 {
		d.log.Info("builds in progress may end", "builds", builds, "timeout", d.opts.DrainTimeout)
	}
	timeout := time.NewTimer(d.opts.DrainTimeout)
	defer timeout.Stop()
	select {
	case <-done:
	case <-timeout.C:
		d.log.Warn("builds that have not ended in time are cancelled")
	case <-d.opts.Hurry:
		d.log.Warn("builds in progress are cancelled, as asked for")
	}
}

// shutDown stops the parts in the order of their dependence: no new builds, the
// running ones end and their callers are told, then connections go.
func (d *Daemon) shutDown(server *grpc.Server, h *health.Server, web *http.Server, pool *sshpool.Pool) {
	h.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	d.dispatcher.mu.Lock() // no build starts after this
	d.end(errShutdown)
	d.dispatcher.mu.Unlock()
	d.builds.Wait()
	d.leftovers.Wait()
	d.detached.running.Wait()
	told := make(chan struct{})
	go func() {
		defer close(told)
		server.GracefulStop()
	}()
	select {
	case <-told:
	case <-time.After(d.stopGrace):
		server.Stop()
		<-told
	}
	pool.Close()
	for _, e := range d.machines.at(every) {
		e.m.keeper.stop()
		e.m.idle.close()
	}
	d.stores.close()
	if err := d.record.close(); err != nil {
		d.log.Error("the history of builds may lack the last ones", "err", err)
	}
	if web != nil {
		_ = web.Close() // scrapes are repeated
	}
}
