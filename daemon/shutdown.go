package daemon

import (
	"context"
	"net/http"
	"sync"
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

// whileAlive is a context for a call that ends with the daemon too, for the reason
// errShutdown. The caller must call cancel.
func (d *Daemon) whileAlive(ctx context.Context) (_ context.Context, cancel func()) {
	ctx, end := context.WithCancelCause(ctx)
	stop := context.AfterFunc(d.life, func() { end(errShutdown) })
	return ctx, func() {
		stop()
		end(nil)
	}
}

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

const (
	// What is no build has 5 seconds to end once the daemon is to stop: callers that read
	// slowly or say nothing, machines that do not answer, requests that are being read.
	// These three are parts of that.

	// idleGrace is how long Build calls may go on, and hooks may take to say what to
	// build with, while no build is in progress.
	idleGrace = 1500 * time.Millisecond
	// callersGrace is how long callers are given to hear how their builds ended.
	callersGrace = 3 * time.Second
	// lastGrace is what each part has at least to end, however long others took.
	lastGrace = 250 * time.Millisecond
	// endingGrace bounds how long the end of cancelled builds may take: a machine has
	// hangUpGrace to confirm it.
	endingGrace = hangUpGrace + 2*time.Second
	// idlePoll is how often a draining daemon looks whether builds are in progress.
	idlePoll = 100 * time.Millisecond
)

// drainBuilds lets builds in progress come to their end, for Options.DrainTimeout at
// most. What is asked for from now on is refused or, by hooks, put off.
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
	look := time.NewTicker(idlePoll)
	defer look.Stop()
	for busy := time.Now(); ; {
		select {
		case <-done:
			return
		case <-timeout.C:
			d.log.Warn("builds that have not ended in time are cancelled")
			return
		case <-d.opts.Hurry:
			d.log.Warn("builds in progress are cancelled, as asked for")
			return
		case <-look.C:
			if d.building() {
				busy = time.Now()
			} else if time.Since(busy) >= idleGrace {
				d.log.Info("calls that wait, though no build is in progress, are ended")
				return
			}
		}
	}
}

// building tells whether there is a build to wait for. One whose caller has not said
// what to build with is none: the caller asks the next daemon.
func (d *Daemon) building() bool {
	d.dispatcher.mu.Lock()
	defer d.dispatcher.mu.Unlock()
	for _, b := range d.dispatcher.builds {
		select {
		case <-b.inputs.ready:
			return true
		default:
		}
	}
	return d.localWork.Load() > 0
}

// parts are what Run has started beside builds.
type parts struct {
	server  *grpc.Server
	health  *health.Server
	web     *http.Server // nil if there is none
	pool    *sshpool.Pool
	lock    *stateLock
	serving *sync.WaitGroup
}

// shutDown stops the parts in the order of their dependence: no new builds, the
// running ones end and their callers are told, then connections go. No wait in it is
// without a bound; what has not ended by then ends with the process. The next daemon
// may begin as soon as the last build is written down.
func (d *Daemon) shutDown(p parts) {
	p.health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	d.dispatcher.mu.Lock() // no build starts after this
	d.end(errShutdown)
	d.dispatcher.mu.Unlock()
	callers, ending := time.Now().Add(d.callersGrace), time.Now().Add(endingGrace)
	d.await("cancelled builds", ending, d.builds.Wait)
	d.await("detached builds", callers, func() {
		d.leftovers.Wait()
		d.detached.running.Wait()
	})
	told := inBackground(p.server.GracefulStop) // the listener is closed at once
	d.await("the history of builds", ending, d.closeRecord)
	p.lock.release()
	if !within(told, callers) {
		p.server.Stop()
		d.await("callers", callers, func() { <-told })
	}
	if p.web != nil {
		_ = p.web.Close() // scrapes are repeated
	}
	d.await("connections", callers, func() {
		p.pool.Close()
		for _, e := range d.machines.at(every) {
			e.m.keeper.stop()
			e.m.idle.close()
		}
		d.stores.close()
		p.serving.Wait()
	})
}

func (d *Daemon) closeRecord() {
	if err := d.record.close(); err != nil {
		d.log.Error("the history of builds may lack the last ones", "err", err)
	}
}

// await waits for the end of a part, for lastGrace at least. One that has not ended
// then ends with the process.
func (d *Daemon) await(what string, until time.Time, end func()) {
	if !within(inBackground(end), until) {
		d.log.Warn("shutting down without waiting any longer", "for", what)
	}
}

// inBackground runs f and returns a channel that is closed at its end.
func inBackground(f func()) <-chan struct{} {
	done := make(chan struct{})
	go func() { // of the process that is about to end
		defer close(done)
		f()
	}()
	return done
}

// within tells whether done is closed in time.
func within(done <-chan struct{}, until time.Time) bool {
	timer := time.NewTimer(max(time.Until(until), lastGrace))
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}
