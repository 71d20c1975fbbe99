// Package workertest is an in-memory Nix daemon, for tests.
package workertest

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/nar"
	"nixdispatch/proto/nix/wire"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker"
)

// The magic numbers and message tags, as in
// src/libstore/include/nix/store/worker-protocol.hh.
const (
	clientMagic = 0x6e697863
	serverMagic = 0x6478696f

	msgNext          = 0x6f6c6d67
	msgStartActivity = 0x53545254
	msgStopActivity  = 0x53544f50
	msgResult        = 0x52534c54
	msgLast          = 0x616c7473
	msgError         = 0x63787470
)

// A Server serves a store. Several connections may be served at once.
type Server struct {
	Store *wiretest.Store
	// Version is what the server announces, 1.38 if 0. Versions from 1.34 work.
	Version wire.Version
	// Trust is what the server tells of the client, from 1.35 on.
	Trust worker.Trust
	// Noise is printed before the greeting, as by a careless login script.
	Noise string
	// Refuse is the message with which the server refuses the client at the end of
	// the handshake, if it is not empty.
	Refuse string
	// Options receives what clients set, if it is not nil.
	Options func(worker.Options)
	// Build is used in place of the store's, if it is not nil.
	Build func(wiretest.BuildRequest) nix.BuildResult
	// Missing answers what it would take to make targets valid. Without it all
	// derivations are to be built and invalid paths are unknown.
	Missing func(targets []string) worker.Missing
}

func (s *Server) runBuild(req wiretest.BuildRequest) nix.BuildResult {
	if s.Build != nil {
		return s.Build(req)
	}
	return s.Store.RunBuild(req)
}

// errClose ends a connection after its error was sent.
var errClose = errors.New("connection closed after an error")

// Serve serves one connection until the client's end, or until something goes
// wrong that a server does not answer with an error.
func (s *Server) Serve(r io.Reader, w io.Writer) error {
	c := &conn{server: s, store: s.Store, r: wire.NewReader(r), w: wire.NewWriter(w)}
	if err := c.handshake(); err != nil {
		return err
	}
	for {
		op := c.r.Uint64()
		if c.r.Err() == io.EOF {
			return nil
		}
		err := c.perform(op)
		if err == nil {
			err = c.r.Err()
		}
		if err == nil {
			err = c.w.Flush()
		}
		if err != nil {
			return fmt.Errorf("operation %d: %w", op, err)
		}
	}
}

// Start serves the store on a connection in memory and returns the client's
// end. The server ends when that is closed.
func (s *Server) Start() *wiretest.Conn {
	client, server := wiretest.Pipe(64 << 10)
	go func() {
		s.Serve(server, server) //nolint:errcheck // the client notices
		server.Close()
	}()
	return client
}

type conn struct {
	server  *Server
	store   *wiretest.Store
	r       *wire.Reader
	version wire.Version

	mu sync.Mutex // a build's log lines may come from anywhere
	w  *wire.Writer
}

func (c *conn) handshake() error {
	s := c.server
	io.WriteString(c.w, s.Noise) //nolint:errcheck // Flush tells
	version := s.Version
	if version == 0 {
		version = wire.MakeVersion(1, 38)
	}
	if c.r.Uint64() != clientMagic {
		return errors.Join(errors.New("protocol mismatch"), c.r.Err())
	}
	c.w.Uint64(serverMagic)
	c.w.Uint64(uint64(version))
	if err := c.w.Flush(); err != nil {
		return err
	}
	c.version = min(version, wire.Version(c.r.Uint64()))
	if c.version >= wire.MakeVersion(1, 38) {
		c.r.Strings(wire.MaxTokens, wire.MaxToken)
		c.w.StringSet([]string{"delete-dead-specific-referrers", "realisation-with-path-not-hash"})
		if err := c.w.Flush(); err != nil {
			return err
		}
	}
	c.r.Int(0)   // CPU affinity
	c.r.Uint64() // reserve space
	c.w.String("2.fake")
	if c.version >= wire.MakeVersion(1, 35) {
		c.w.Uint64(uint64(s.Trust))
	}
	if s.Refuse != "" {
		c.fail(s.Refuse)
		return errors.Join(c.w.Flush(), errClose)
	}
	c.w.Uint64(msgLast)
	return errors.Join(c.w.Flush(), c.r.Err())
}

// fail answers an operation with an error.
func (c *conn) fail(msg string) {
	c.w.Uint64(msgError)
	c.w.String("Error")
	c.w.Uint64(0) // level
	c.w.String("Error")
	c.w.String(msg)
	c.w.Uint64(0) // no position
	c.w.Uint64(1) // traces
	c.w.Uint64(0) // no position
	c.w.String("while performing an operation")
}

// done answers an operation with success, or with err; the result follows if it
// returns true.
func (c *conn) done(err error) bool {
	if err != nil {
		c.fail(err.Error())
		return false
	}
	c.w.Uint64(msgLast)
	return true
}

// logLine sends a line of a build's log at once.
func (c *conn) logLine(activity uint64, line string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.w.Uint64(msgResult)
	c.w.Uint64(activity)
	c.w.Uint64(worker.ResBuildLogLine)
	c.w.Uint64(1)
	c.w.Uint64(1) // a text
	c.w.String(line)
	c.w.Flush() //nolint:errcheck // the writer keeps its error
}

func (c *conn) readOptions() worker.Options {
	o := worker.Options{
		KeepFailed: c.r.Bool(), KeepGoing: c.r.Bool(), Fallback: c.r.Bool(),
		Verbosity:     c.r.Uint64(),
		MaxJobs:       c.r.Uint64(),
		MaxSilentTime: time.Duration(c.r.Uint64()) * time.Second,
	}
	c.r.Uint64()
	o.QuietBuilds = c.r.Uint64() != 0
	c.r.Uint64()
	c.r.Uint64()
	o.Cores = c.r.Uint64()
	o.Substitutes = c.r.Bool()
	o.Overrides = c.r.StringMap(wire.MaxTokens, wire.MaxText)
	return o
}

// readNAR reads a NAR out of a framed stream.
func readNAR(r *wire.Reader, w io.Writer) error {
	_, err := nar.Copy(w, r)
	return err
}
