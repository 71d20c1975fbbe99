package daemon

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/serve/servetest"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/proto/nix/worker/workertest"
	"nixdispatch/sshpool/sshtest"
)

// schemes are the two kinds of machines.
var schemes = []string{"ssh", "ssh-ng"}

// eachScheme runs a test against both kinds of machines.
func eachScheme(t *testing.T, test func(t *testing.T, scheme string)) {
	for _, scheme := range schemes {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			test(t, scheme)
		})
	}
}

// A fakeMachine is a machine with a Nix store in memory behind an SSH server in
// memory. Set the fields before the site starts it.
type fakeMachine struct {
	name   string
	scheme string
	query  string // of the store URI, with its question mark
	slots  int    // 1 if 0
	system string // this host's if empty
	// features are columns 6 and 7 of the line.
	features, mandatory string
	trust               worker.Trust
	noise               string
	// config is what "nix" prints that is called with words that end in configCommand.
	config, configCommand string
	late                  bool // the site does not wait for it to be up
	// shell is what /bin/sh prints that is given a script; nil if the account runs none.
	shell func(script string) string

	// build builds in place of the recipe. It should return when ctx ends, which it
	// does when the client has gone.
	build func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult

	site  *site
	store *wiretest.Store
	ssh   *sshtest.Server

	mu       sync.Mutex
	started  int // remote processes, the probe's among them
	running  int // remote processes
	builds   []nix.StorePath
	inBuild  int
	mostBusy int
	uploads  []nix.StorePath
	// beforeAdd is called before an upload is read, if it is not nil.
	beforeAdd func(nix.PathInfo) error
	// beforeValid is called before a question which paths are valid is answered, if it is
	// not nil.
	beforeValid func()
}

func oneMachine(scheme string) *fakeMachine { return namedMachine(scheme, "m1") }

func namedMachine(scheme, name string) *fakeMachine {
	return &fakeMachine{name: name, scheme: scheme, trust: worker.Trusted}
}

func (m *fakeMachine) uri() string { return m.scheme + "://" + m.name + m.query }

func (m *fakeMachine) line(identity string) string {
	or := func(s, other string) string {
		if s == "" {
			return other
		}
		return s
	}
	hostKey := base64.StdEncoding.EncodeToString([]byte(strings.TrimSpace(string(m.ssh.HostKey()))))
	return strings.Join([]string{
		m.uri(), or(m.system, nixSystem()), identity, fmt.Sprint(max(m.slots, 1)), "1",
		or(m.features, "-"), or(m.mandatory, "-"), hostKey,
	}, " ")
}

func (m *fakeMachine) start(s *site) {
	m.site, m.store = s, new(wiretest.Store)
	m.store.BeforeAdd = func(info nix.PathInfo) error {
		m.mu.Lock()
		before := m.beforeAdd
		m.uploads = append(m.uploads, info.Path)
		m.mu.Unlock()
		if before != nil {
			return before(info)
		}
		return nil
	}
	m.store.BeforeValid = func([]nix.StorePath) {
		m.mu.Lock()
		before := m.beforeValid
		m.mu.Unlock()
		if before != nil {
			before()
		}
	}
	m.ssh = sshtest.NewServer(sshtest.ServerOptions{Run: m.run})
	s.machines[m.name] = m
	s.t.Cleanup(m.ssh.Close)
}

// run is the remote shell.
func (m *fakeMachine) run(ctx context.Context, command string, stdin io.Reader, stdout, stderr io.Writer) int {
	if command == lookCommand && m.shell != nil {
		script, _ := io.ReadAll(stdin) // ends with the session
		_, _ = io.WriteString(stdout, m.shell(string(script)))
		return 0
	}
	m.mu.Lock()
	m.started++
	m.running++
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		m.running--
		m.mu.Unlock()
	}()
	ctx, gone := context.WithCancel(ctx)
	defer gone()
	in, feed := wiretest.Pipe(64 << 10)
	defer in.Close()
	go func() {
		_, _ = io.Copy(feed, stdin) // ends with the session
		gone()                      // as Nix: the end of the input ends the build
		_ = feed.CloseWrite()
	}()
	build := func(req wiretest.BuildRequest) nix.BuildResult { return m.runBuild(ctx, req) }
	var err error
	switch {
	case strings.HasPrefix(command, "nix-store --serve --write"):
		server := servetest.Server{Store: m.store, Noise: m.noise, Build: func(req wiretest.BuildRequest) nix.BuildResult {
			req.Log = func(line string) { fmt.Fprintln(stderr, line) }
			return build(req)
		}}
		err = server.Serve(in, stdout)
	case strings.HasPrefix(command, "nix-daemon --stdio"):
		server := workertest.Server{Store: m.store, Noise: m.noise, Trust: m.trust, Build: build}
		err = server.Serve(in, stdout)
	case m.config != "" && strings.HasSuffix(command, m.configCommand):
		_, _ = io.WriteString(stdout, m.config) // the client may have gone
	default:
		fmt.Fprintf(stderr, "sh: %s: command not found\n", command)
		return 127
	}
	if err != nil {
		return 1
	}
	return 0
}

func (m *fakeMachine) runBuild(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
	m.mu.Lock()
	m.builds = append(m.builds, req.DrvPath)
	m.inBuild++
	m.mostBusy = max(m.mostBusy, m.inBuild)
	other := m.build
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.inBuild--
	}()
	if other != nil {
		return other(ctx, req)
	}
	return m.site.recipe(req.DrvPath).build(m.store, req)
}

// untilGone builds nothing until the client has gone.
func untilGone(ctx context.Context, _ wiretest.BuildRequest) nix.BuildResult {
	<-ctx.Done()
	return nix.BuildResult{Status: nix.MiscFailure, ErrorMsg: "interrupted"}
}

// buildWith changes how a machine that is up builds.
func (m *fakeMachine) buildWith(build func(context.Context, wiretest.BuildRequest) nix.BuildResult) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.build = build
}

// gated returns a build function that waits for open to be closed.
func (m *fakeMachine) gated(open <-chan struct{}) func(context.Context, wiretest.BuildRequest) nix.BuildResult {
	return func(ctx context.Context, req wiretest.BuildRequest) nix.BuildResult {
		select {
		case <-open:
			return m.site.recipe(req.DrvPath).build(m.store, req)
		case <-ctx.Done():
			return untilGone(ctx, req)
		}
	}
}

// built are the derivations that were asked for, in order.
func (m *fakeMachine) built() []nix.StorePath {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.builds)
}

// building is how many builds run now.
func (m *fakeMachine) building() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.inBuild
}

// uploaded are the paths that were sent, in order.
func (m *fakeMachine) uploaded() []nix.StorePath {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.uploads)
}

// processes are how many remote processes were started, and how many run now.
func (m *fakeMachine) processes() (started, running int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.started, m.running
}

func (m *fakeMachine) onQuestion(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.beforeValid = f
}

func (m *fakeMachine) onUpload(f func(nix.PathInfo) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.beforeAdd = f
}
