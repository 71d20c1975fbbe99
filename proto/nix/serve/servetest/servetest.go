// Package servetest is an in-memory "nix-store --serve --write", for tests.
package servetest

import (
	"errors"
	"fmt"
	"io"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
	"nixdispatch/proto/nix/wire/wiretest"
)

// The commands and magic numbers, as in src/libstore/include/nix/store/serve-protocol.hh.
const (
	clientMagic = 0x390c9deb
	serverMagic = 0x5452eecb

	cmdQueryValidPaths = 1
	cmdQueryPathInfos  = 2
	cmdDumpStorePath   = 3
	cmdBuildPaths      = 6
	cmdBuildDerivation = 8
	cmdAddToStoreNar   = 9
)

// A Server serves a store. Several connections may be served at once.
type Server struct {
	Store *wiretest.Store
	// Version is what the server announces, 2.7 if 0. Versions from 2.5 to 2.8 work.
	Version wire.Version
	// Noise is printed before the greeting, as by a careless login script.
	Noise string
	// Build is used in place of the store's, if it is not nil.
	Build func(wiretest.BuildRequest) nix.BuildResult
}

func (s *Server) runBuild(req wiretest.BuildRequest) nix.BuildResult {
	if s.Build != nil {
		return s.Build(req)
	}
	return s.Store.RunBuild(req)
}

// Serve serves one connection until the client's end, or until something fails;
// as in Nix a failure has no other form than the end of the connection.
func (s *Server) Serve(r io.Reader, w io.Writer) error {
	c := &conn{server: s, store: s.Store, r: wire.NewReader(r), w: wire.NewWriter(w)}
	io.WriteString(c.w, s.Noise) //nolint:errcheck // Flush tells
	version := s.Version
	if version == 0 {
		version = wire.MakeVersion(2, 7)
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
	for {
		cmd := c.r.Uint64()
		if c.r.Err() == io.EOF {
			return nil
		}
		err := c.perform(cmd)
		if err = errors.Join(err, c.r.Err()); err != nil {
			return fmt.Errorf("serve command %d: %w", cmd, err)
		}
		if err := c.w.Flush(); err != nil {
			return err
		}
	}
}

// Start serves store on a connection in memory and returns the client's end.
// The server ends when that is closed.
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
	w       *wire.Writer
	version wire.Version
}

func (c *conn) perform(cmd uint64) error {
	switch cmd {
	case cmdQueryValidPaths:
		lock, substitute := c.r.Bool(), c.r.Bool()
		paths := c.r.StorePaths(wire.MaxPaths)
		if lock {
			c.store.AddRoots(paths...)
		}
		c.w.StorePathSet(c.store.Valid(paths, substitute))
	case cmdQueryPathInfos:
		c.queryPathInfos()
	case cmdDumpStorePath:
		path := c.r.StorePath()
		_, nar, ok := c.store.Get(path)
		if !ok {
			return fmt.Errorf("path '%s' is not valid", path)
		}
		c.w.Write(nar) //nolint:errcheck // Flush tells
	case cmdBuildPaths:
		c.buildPaths()
	case cmdBuildDerivation:
		c.buildDerivation()
	case cmdAddToStoreNar:
		return c.addToStoreNar()
	default:
		return errors.New("unknown serve command")
	}
	return nil
}

func (c *conn) queryPathInfos() {
	for _, path := range c.r.StorePaths(wire.MaxPaths) {
		info, _, ok := c.store.Get(path)
		if !ok {
			continue
		}
		c.w.StorePath(path)
		c.w.StorePath(info.Deriver)
		c.w.StorePathSet(info.References)
		c.w.Uint64(info.NarSize) // download size
		c.w.Uint64(info.NarSize)
		c.w.String(info.NarHash.String())
		c.w.String(info.CA)
		c.w.StringSet(info.Sigs)
	}
	c.w.String("")
}

func (c *conn) addToStoreNar() error {
	info := c.r.PathInfo()
	if err := c.r.Err(); err != nil {
		return err
	}
	if c.store.BeforeAdd != nil {
		if err := c.store.BeforeAdd(info); err != nil {
			return err
		}
	}
	nar, err := io.ReadAll(io.LimitReader(c.r, int64(info.NarSize)))
	if err != nil {
		return err
	}
	if err := c.store.Add(info, nar); err != nil {
		return err
	}
	c.w.Uint64(1)
	return nil
}

func (c *conn) options() nix.BuildOptions {
	o := nix.BuildOptions{
		MaxSilentTime: time.Duration(c.r.Uint64()) * time.Second,
		Timeout:       time.Duration(c.r.Uint64()) * time.Second,
		MaxLogSize:    c.r.Uint64(),
	}
	c.r.Int(0)   // nrRepeats
	c.r.Uint64() // enforceDeterminism
	if c.version >= wire.MakeVersion(2, 7) {
		o.KeepFailed = c.r.Bool()
	}
	return o
}

func (c *conn) buildDerivation() {
	req := wiretest.BuildRequest{DrvPath: c.r.StorePath(), Drv: c.r.BasicDerivation(), Options: c.options(), Log: func(string) {}}
	if c.r.Err() != nil {
		return
	}
	res := c.server.runBuild(req)
	form := wire.ResultForm{Times: true}
	switch {
	case c.version >= wire.MakeVersion(2, 8):
		form.Outputs = wire.PathOutputs
	case c.version >= wire.MakeVersion(2, 6):
		form.Outputs = wire.RealisationOutputs
	}
	c.w.BuildResult(form, &res)
}

// exitCode is the exit code of a failed build, as in src/libstore/build-result.cc.
func exitCode(s nix.BuildStatus) uint64 {
	switch s {
	case nix.PermanentFailure, nix.InputRejected:
		return 100
	case nix.TimedOut:
		return 101
	case nix.OutputRejected:
		return 102
	case nix.NotDeterministic:
		return 104
	default:
		return 1
	}
}

func (c *conn) buildPaths() {
	targets := c.r.Strings(wire.MaxPaths, wire.MaxStorePath+wire.MaxToken)
	opts := c.options()
	if c.r.Err() != nil {
		return
	}
	for _, target := range targets {
		drv, _ := wiretest.SplitTarget(target)
		if drv == "" {
			continue
		}
		res := c.server.runBuild(wiretest.BuildRequest{DrvPath: drv, Options: opts, Log: func(string) {}})
		if !res.Status.Success() {
			c.w.Uint64(exitCode(res.Status))
			c.w.String(res.ErrorMsg)
			return
		}
	}
	c.w.Uint64(0)
}
