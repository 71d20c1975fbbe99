// Package daemon is the running process: it starts, owns and stops the parts,
// and leads each build from its request to its answer.
//
// The dispatcher owns the scheduler's queue; a build is one goroutine that asks
// it for a machine and a slot; the machines own their SSH connections; callers
// follow builds at their own pace and never hold them up.
//
// A build is always in exactly one place. It ends at one moment, under the
// dispatcher's mutex (see [Daemon.conclude]): there it leaves what is in progress
// and enters the history and the metrics, both in memory. The outcome is made known
// to callers after that, and the files are written later still. So from the moment
// any caller knows that a build has ended, everything tells so: Status, History, Log,
// the page and the metrics. Who shows both what is in progress and what has ended
// reads the former first and leaves out of the latter what is in the former: what
// ends between the two readings is then shown once.
// The other things that are told follow the same rule: what a call has brought about
// can be seen everywhere before the call returns.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"nixdispatch/daemon/usage"
	"nixdispatch/proto/nix"
	"nixdispatch/sshpool"
)

// Options are the daemon's settings.
type Options struct {
	// Builders is the list of machines, in the language of Nix's builders
	// setting.
	Builders string
	// NixConf is where Nix's configuration says what the list is, in place of
	// Builders; nil for nowhere.
	NixConf *nix.ConfSource
	// Socket is the path of the gRPC socket.
	Socket string
	// Listener is used instead, if it is not nil: one that a service manager keeps.
	Listener net.Listener
	// Notify tells a service manager of the daemon's state, in the words of
	// sd_notify(3). It may be nil.
	Notify func(state string)
	// Watchdog is how often, at least, Notify must be called. Zero means never.
	Watchdog time.Duration
	// MetricsListen is the TCP address for Prometheus; "" for none.
	MetricsListen string
	// MetricsConfig is the path of a web configuration file of Prometheus's exporter
	// toolkit, with TLS and passwords for MetricsListen; "" for neither.
	MetricsConfig string
	// PageNames has the page on MetricsListen name derivations, users and what
	// machines say also where nobody is asked for a password.
	PageNames bool
	// StateDir holds what must not be in memory: the logs of builds in progress,
	// what is kept of those that have ended, detached builds, and which machines are
	// drained.
	StateDir string
	// MachineWait is how long a build waits while no machine that could run it
	// is up or coming. Zero means five minutes.
	MachineWait time.Duration
	// NoHedge keeps a build from being started on a second machine while the first
	// does not answer.
	NoHedge bool
	// MachinesGroup is a group whose members may name machines in their requests,
	// as root and the daemon's user may; "" for none. It is as good as being root.
	MachinesGroup string
	// Hangup has the builders setting read anew; nil for never.
	Hangup <-chan os.Signal
	// ReloadPoll is how often the files of the builders setting are looked at for
	// changes. Zero means two seconds.
	ReloadPoll time.Duration
	// DrainTimeout is how long builds in progress may go on when Run is to end.
	// Zero means not at all.
	DrainTimeout time.Duration
	// Hurry ends that time when it can be received from. It may be nil.
	Hurry <-chan struct{}
	// PerUser makes the daemon its own user's only: nobody else but root may call, and
	// requests may be about any store of this host.
	PerUser bool
	// Gates keep builds off machines that are short of something.
	Gates Gates
	// LoadInterval is how often a machine in use is asked for its disk space and load,
	// where its account runs commands. 0 means never; then no commands but Nix's are
	// run there at all.
	LoadInterval time.Duration
	// Version is the program's own, for status and metrics.
	Version string
	// Logger gets the daemon's log. It must not be nil.
	Logger *slog.Logger
}

// A Daemon is one nix-dispatchd. Run it once.
type Daemon struct {
	opts    Options
	log     *slog.Logger
	started time.Time

	stores     *stores
	machines   *machines
	dispatcher *dispatcher
	detached   *detachedBuilds
	metrics    *metrics
	leftLocal  leftLocal
	record     record
	reload     reloader
	drainMu    sync.Mutex // held while a machine is drained, or that ends
	// drainFault is why the drained machines are not known, nil if they are.
	drainFault  atomic.Pointer[error]
	connections *connLimit
	groups      *groupTable
	// webConnections bounds those of the metrics listener.
	webConnections *webLimit
	// These are the constants of the same names, but in tests.
	helloWait, handOverWait, callersGrace, lastResort, hopeRetry, hedgeAfter time.Duration
	// usage counts what each user has in progress.
	usage       *usage.Ledger
	statusShare *statusShare
	// bounded has all callers bounded, as tests need it.
	bounded bool
	// ssh says how connections to machines are made and kept.
	ssh sshpool.Options

	// life is the context of all builds; it ends with errShutdown.
	hedges hedges

	life   context.Context //nolint:containedctx // a build outlives the call that asked for it
	end    context.CancelCauseFunc
	builds sync.WaitGroup
	// leftovers has one for each slot that is held after a lost connection.
	leftovers sync.WaitGroup
	// draining is set when no more requests are taken; under the dispatcher's
	// mutex, as realising is added to, which counts Build calls.
	draining  atomic.Bool
	realising sync.WaitGroup
	// localWork is how many builds and substitutions the local Nix does for Build calls.
	localWork atomic.Int64
}

// New makes a daemon. It connects to nothing yet.
func New(opts Options) (*Daemon, error) {
	opts.MachineWait = cmp.Or(opts.MachineWait, 5*time.Minute)
	opts.ReloadPoll = cmp.Or(opts.ReloadPoll, reloadPoll)
	if err := os.MkdirAll(opts.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := checkWebConfig(opts.MetricsConfig); err != nil {
		return nil, err
	}
	local, err := newStores(opts)
	if err != nil {
		return nil, err
	}
	files := openFiles()
	users := newUsage(files)
	d := &Daemon{
		opts:           opts,
		log:            opts.Logger,
		handOverWait:   handOverWait,
		helloWait:      helloWait,
		callersGrace:   callersGrace,
		lastResort:     lastResort,
		hopeRetry:      hopeRetry,
		hedgeAfter:     hedgeAfter,
		connections:    newConnLimit(opts.Logger, files, users),
		webConnections: &webLimit{most: maxWebConnections},
		usage:          users,
		stores:         local,
		machines:       newMachines(opts.Logger),
		dispatcher:     newDispatcher(opts.Logger),
		detached: &detachedBuilds{
			dir: filepath.Join(opts.StateDir, "detached"), log: opts.Logger, all: make(map[uint64]*detachedBuild)},
	}
	d.statusShare = newStatusShare(d.status)
	d.groups = newGroupTable(opts.Logger, d.group(), opts.MachinesGroup)
	d.ssh = sshpool.Options{Logger: d.log, OnChange: d.hostChanged}
	d.life, d.end = context.WithCancelCause(context.Background())
	d.metrics = newMetrics(opts.Version)
	d.metrics.registry.MustRegister(newStateCollector(d))
	return d, nil
}

// openState takes the state directory and reads what an earlier daemon left there.
func (d *Daemon) openState(ctx context.Context) (*stateLock, error) {
	lock, err := lockState(ctx, d.opts.StateDir, d.log)
	if err != nil {
		return nil, err
	}
	drained, err := readDrained(d.opts.StateDir)
	if err != nil {
		d.log.Error("cannot tell which machines are drained", "err", err)
		d.drainFault.Store(&err)
	}
	d.machines.setDrains(drained)
	return lock, nil
}

// Run serves until ctx ends, then stops everything it started and returns.
func (d *Daemon) Run(ctx context.Context) error {
	lock, err := d.openState(ctx)
	if err != nil {
		return err
	}
	defer lock.release()
	d.started = time.Now()
	d.groups.refresh(ctx)
	listener, err := d.listen(ctx)
	if err != nil {
		return err
	}
	webListener, err := d.listenWeb(ctx)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	d.openRecord()
	pool := sshpool.New(d.ssh)
	d.begin(pool)
	d.resumeDetached()
	server, healthServer := newGRPCServer(d, gate{uint32(os.Geteuid()), d.group(), d.groups}) //nolint:gosec // a uid
	failed := make(chan error, 2)
	var serving sync.WaitGroup
	serving.Go(func() { failed <- server.Serve(limitedListener{listener, d.connections}) })
	serving.Go(func() { d.dispatcher.watchStranded(d.life, d.opts.MachineWait) })
	serving.Go(func() { d.watchHopes(d.life) })
	serving.Go(func() { d.groups.watch(d.life, d.regroup) })
	serving.Go(func() { d.watchHedges(d.life) })
	serving.Go(func() { watchClock(d.life, time.Now, func(by time.Duration) { d.wake(pool, by) }) })
	serving.Go(func() { d.watchMachines(d.life, d.opts.ReloadPoll) })
	serving.Go(func() { d.keepTelling(d.life, d.opts.Watchdog) })
	web := d.serveWeb(webListener, &serving, failed)
	d.log.Info("ready", "socket", d.opts.Socket, "metrics", d.opts.MetricsListen,
		"machines", len(d.machines.current().lines), "version", d.opts.Version)
	d.notify(notifyReady)
	select {
	case <-ctx.Done():
		d.notify(notifyStopping)
		d.log.Info("shutting down")
		healthServer.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
		if err := lock.stopping(); err != nil {
			d.log.Warn("the next daemon does not know that this one is shutting down", "err", err)
		}
		d.drainBuilds()
		err = nil
	case err = <-failed:
	}
	d.shutDown(parts{server, healthServer, web, pool, lock, &serving})
	return err
}

// group may submit builds, too; "" for none.
func (d *Daemon) group() string {
	if d.opts.PerUser {
		return ""
	}
	return GroupName
}
