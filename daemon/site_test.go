package daemon

import (
	"context"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/proto/nix/worker/workertest"
	"nixdispatch/sshpool"
	"nixdispatch/sshpool/sshtest"
)

// patience bounds every wait of a test: the host may be busy.
const patience = 2 * time.Minute

// A site is a daemon in this process with everything around it: a local store
// behind a socket, machines behind SSH servers in memory, and a client.
type site struct {
	t        *testing.T
	d        *Daemon
	dir      string // the store directory
	local    *localNix
	machines map[string]*fakeMachine
	client   dispatchv1.DispatchServiceClient
	conn     *grpc.ClientConn
	// stop ends the daemon and waits until Run has returned.
	stop func()

	mu    sync.Mutex
	paths int
	drvs  map[nix.StorePath]*recipe
}

// siteConfig changes a site before it starts.
type siteConfig struct {
	machines []*fakeMachine
	// builders comes after the lines of the machines.
	builders string
	options  func(*Options)
	ssh      func(*sshpool.Options)
	// prepare is called before Run.
	prepare func(*site)
}

// newSite starts a daemon with machines and waits until they are up.
func newSite(t *testing.T, machines ...*fakeMachine) *site {
	t.Helper()
	return newSiteWith(t, siteConfig{machines: machines})
}

func newSiteWith(t *testing.T, cfg siteConfig) *site {
	t.Helper()
	// A unix socket's path must be short: t.TempDir has the test's name in it.
	tmp, err := os.MkdirTemp("", "dispatch")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(tmp) })
	s := &site{
		t: t, dir: filepath.Join(tmp, "store"),
		machines: make(map[string]*fakeMachine),
		drvs:     make(map[nix.StorePath]*recipe),
	}
	if err := os.Mkdir(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.local = startLocalNix(s, filepath.Join(tmp, "nix"))
	identity, _ := sshtest.WriteKey(t, tmp)
	var lines []string
	for _, m := range cfg.machines {
		m.start(s)
		lines = append(lines, m.line(identity))
	}
	opts := Options{
		Builders: strings.TrimSpace(strings.Join(append(lines, cfg.builders), "\n")),
		Socket:   filepath.Join(tmp, "socket"),
		StateDir: filepath.Join(tmp, "state"),
		Version:  "0.test",
		Logger:   slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if cfg.options != nil {
		cfg.options(&opts)
	}
	if s.d, err = New(opts); err != nil {
		t.Fatal(err)
	}
	s.d.stores.own.LocalStore = s.store()
	s.d.ssh.Dial = s.dial
	s.d.ssh.BackoffMin, s.d.ssh.BackoffMax = 5*time.Millisecond, 20*time.Millisecond
	if cfg.ssh != nil {
		cfg.ssh(&s.d.ssh)
	}
	if cfg.prepare != nil {
		cfg.prepare(s)
	}
	s.run()
	return s
}

// store is where the local store is.
func (s *site) store() nix.LocalStore {
	return nix.LocalStore{Dir: s.dir, RealDir: s.dir, StateDir: nix.DefaultStateDir, Socket: s.local.socket}
}

// run starts the daemon and the client.
func (s *site) run() {
	s.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.d.Run(ctx) }()
	var once sync.Once
	s.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-ended:
				if err != nil {
					s.t.Errorf("Run = %v, want nil", err)
				}
			case <-time.After(patience):
				s.t.Errorf("Run did not return")
			}
		})
	}
	s.t.Cleanup(s.stop)
	// A client that came too early would wait a second before it tries again.
	s.eventually("the socket is there", func() bool {
		_, err := os.Stat(s.d.opts.Socket)
		return err == nil
	})
	conn, err := grpc.NewClient("unix:"+s.d.opts.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.t.Fatal(err)
	}
	s.conn, s.client = conn, dispatchv1.NewDispatchServiceClient(conn)
	s.t.Cleanup(func() { conn.Close() })
	s.eventually("the socket answers and the machines are up", func() bool {
		for _, m := range s.machines {
			if !m.late && s.machineStatus(m).GetState() != dispatchv1.MachineState_MACHINE_STATE_UP {
				return false
			}
		}
		_, err := s.client.Status(s.t.Context(), &dispatchv1.StatusRequest{})
		return err == nil
	})
}

func (s *site) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	m := s.machines[host]
	if m == nil {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return m.ssh.Dial(ctx, network, addr)
}

// eventually waits until ok.
func (s *site) eventually(what string, ok func() bool) {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			s.t.Fatalf("waited in vain: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (s *site) status() *dispatchv1.StatusResponse {
	s.t.Helper()
	r, err := s.client.Status(s.t.Context(), &dispatchv1.StatusRequest{})
	if err != nil {
		return &dispatchv1.StatusResponse{}
	}
	return r
}

func (s *site) machineStatus(m *fakeMachine) *dispatchv1.MachineStatus {
	s.t.Helper()
	for _, status := range s.status().GetMachines() {
		if status.GetUri() == m.uri() {
			return status
		}
	}
	return nil
}

// inUse is what the daemon has of a machine.
func (s *site) inUse(m *fakeMachine) *machine {
	s.t.Helper()
	entries := s.d.machines.at(withURI(m.uri()))
	if len(entries) != 1 {
		s.t.Fatalf("%d entries of %s, want 1", len(entries), m.uri())
	}
	return entries[0].m
}

// idle waits until no build is in progress and no slot is in use.
func (s *site) idle() {
	s.t.Helper()
	s.eventually("no build is left", func() bool {
		r := s.status()
		return r.GetVersion() != "" && len(r.GetBuilds()) == 0 &&
			!slices.ContainsFunc(r.GetMachines(), func(m *dispatchv1.MachineStatus) bool { return m.GetRunning()+m.GetStaging() > 0 })
	})
}

// path makes a store path nobody has used.
func (s *site) path(name string) nix.StorePath {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.paths++
	return nix.StorePath(s.dir + "/" + wiretest.Path(s.paths, name).Base())
}

// source adds a file to the local store.
func (s *site) source(name string, refs ...nix.StorePath) nix.StorePath {
	p := s.path(name)
	s.local.store.PutFile(p, "contents of "+name, refs...)
	return p
}

// testLog is where the daemon's log goes: it is shown where a test fails.
type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	if testing.Verbose() {
		l.t.Log(strings.TrimSuffix(string(p), "\n"))
	}
	return len(p), nil
}

// A localNix is the local nix-daemon.
type localNix struct {
	site   *site
	socket string
	server *workertest.Server
	store  *wiretest.Store

	mu          sync.Mutex
	connections []net.Conn
	accepted    int
	imports     []nix.PathInfo
	built       []nix.StorePath
	// substitutable are paths that can be had, with what they hold.
	substitutable map[nix.StorePath]string
	// beforeImport is called before an import is read, if it is not nil.
	beforeImport func(nix.PathInfo) error
	// build builds in place of the recipe, if it is not nil.
	build func(wiretest.BuildRequest) nix.BuildResult
}

func startLocalNix(s *site, socket string) *localNix {
	l := &localNix{site: s, socket: socket, store: new(wiretest.Store), substitutable: make(map[nix.StorePath]string)}
	l.store.BeforeAdd = l.importing
	l.store.Substitute = l.substitute
	l.store.Outputs = func(drvPath nix.StorePath) map[string]nix.StorePath {
		if r := s.recipe(drvPath); r != nil {
			return r.outputs
		}
		return nil
	}
	l.server = &workertest.Server{Store: l.store, Trust: worker.Trusted, Missing: l.missing, Build: l.runBuild}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		s.t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			l.mu.Lock()
			l.connections = append(l.connections, conn)
			l.accepted++
			l.mu.Unlock()
			serving.Go(func() {
				_ = l.server.Serve(conn, conn) // the client notices
				conn.Close()
			})
		}
	})
	s.t.Cleanup(func() {
		listener.Close()
		l.cut()
		serving.Wait()
	})
	return l
}

// cut ends all connections.
func (l *localNix) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.connections {
		c.Close()
	}
	l.connections = nil
}

// onImport sets what is called before an import is read.
func (l *localNix) onImport(f func(nix.PathInfo) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.beforeImport = f
}

func (l *localNix) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.accepted
}

func (l *localNix) importing(info nix.PathInfo) error {
	if info.Path.Name() == markName {
		return nil // no build's
	}
	l.mu.Lock()
	before := l.beforeImport
	l.imports = append(l.imports, info)
	l.mu.Unlock()
	if before != nil {
		return before(info)
	}
	return nil
}

// imported are the paths that were imported, in order.
func (l *localNix) imported() []nix.StorePath {
	l.mu.Lock()
	defer l.mu.Unlock()
	return pathsOf(l.imports)
}

func (l *localNix) valid(p nix.StorePath) bool {
	_, _, ok := l.store.Get(p)
	return ok
}

func (l *localNix) substitute(p nix.StorePath) {
	l.mu.Lock()
	content, ok := l.substitutable[p]
	l.mu.Unlock()
	if ok {
		l.store.PutFile(p, content)
	}
}

func (l *localNix) runBuild(req wiretest.BuildRequest) nix.BuildResult {
	l.mu.Lock()
	l.built = append(l.built, req.DrvPath)
	build := l.build
	l.mu.Unlock()
	if build != nil {
		return build(req)
	}
	return l.site.recipe(req.DrvPath).build(l.store, req)
}

// builtHere are the derivations that were built by the local Nix.
func (l *localNix) builtHere() []nix.StorePath {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.built)
}

// missing answers QueryMissing as Nix does.
func (l *localNix) missing(targets []string) worker.Missing {
	var m worker.Missing
	seen := make(map[nix.StorePath]bool)
	var visit func(drvPath nix.StorePath, outputs []string)
	visit = func(drvPath nix.StorePath, outputs []string) {
		r := l.site.recipe(drvPath)
		var invalid, have []nix.StorePath
		for _, o := range outputs {
			if p := r.outputs[o]; !l.valid(p) {
				invalid = append(invalid, p)
				if _, ok := l.substitutable[p]; ok {
					have = append(have, p)
				}
			}
		}
		switch {
		case len(invalid) == 0 || seen[drvPath]:
		case len(invalid) == len(have):
			m.WillSubstitute = append(m.WillSubstitute, have...)
		default:
			seen[drvPath] = true
			m.WillBuild = append(m.WillBuild, drvPath)
			for input, names := range r.drv.InputDrvs {
				visit(input, names)
			}
		}
	}
	for _, target := range targets {
		drvPath, _ := wiretest.SplitTarget(target)
		_, names, _ := strings.Cut(target, "!")
		outputs := strings.Split(names, ",")
		if names == "*" {
			outputs = slices.Sorted(maps.Keys(l.site.recipe(drvPath).outputs))
		}
		visit(drvPath, outputs)
	}
	return m
}
