package workertest

import (
	"bytes"
	"fmt"
	"maps"
	"slices"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/proto/nix/worker"
)

// The operations, as in src/libstore/include/nix/store/worker-protocol.hh.
const (
	opIsValidPath              = 1
	opEnsurePath               = 10
	opAddTempRoot              = 11
	opAddIndirectRoot          = 12
	opSetOptions               = 19
	opQueryPathInfo            = 26
	opQueryValidPaths          = 31
	opBuildDerivation          = 36
	opNarFromPath              = 38
	opAddToStoreNar            = 39
	opQueryMissing             = 40
	opQueryDerivationOutputMap = 41
	opAddMultipleToStore       = 44
	opBuildPathsWithResults    = 46
)

// perform does one operation. Its error is one that ends the connection.
func (c *conn) perform(op uint64) error {
	switch op {
	case opIsValidPath:
		path := c.r.StorePath()
		_, _, ok := c.store.Get(path)
		c.done(nil)
		c.w.Bool(ok)
	case opQueryValidPaths:
		paths, substitute := c.r.StorePaths(wire.MaxPaths), c.r.Bool()
		valid := c.store.Valid(paths, substitute)
		c.done(nil)
		c.w.StorePathSet(valid)
	case opQueryPathInfo:
		info, _, ok := c.store.Get(c.r.StorePath())
		c.done(nil)
		c.w.Bool(ok)
		if ok {
			c.w.UnkeyedPathInfo(&info)
		}
	case opAddTempRoot:
		c.store.AddRoots(c.r.StorePath())
		c.done(nil)
		c.w.Uint64(1)
	case opAddIndirectRoot:
		c.r.String(wire.MaxToken)
		c.done(nil)
		c.w.Uint64(1)
	case opSetOptions:
		if o := c.readOptions(); c.server.Options != nil {
			c.server.Options(o)
		}
		c.done(nil)
	case opEnsurePath:
		c.ensurePath()
	case opNarFromPath:
		return c.narFromPath()
	case opAddToStoreNar:
		return c.addToStoreNar()
	case opAddMultipleToStore:
		return c.addMultipleToStore()
	default:
		return c.performBuild(op)
	}
	return nil
}

func (c *conn) performBuild(op uint64) error {
	switch op {
	case opBuildDerivation:
		c.buildDerivation()
	case opBuildPathsWithResults:
		c.buildPaths()
	case opQueryMissing:
		c.queryMissing()
	case opQueryDerivationOutputMap:
		c.queryOutputs()
	default:
		c.fail(fmt.Sprintf("invalid operation %d", op))
		c.w.Flush() //nolint:errcheck // closing anyway
		return errClose
	}
	return nil
}

func (c *conn) ensurePath() {
	path := c.r.StorePath()
	var err error
	if len(c.store.Valid([]nix.StorePath{path}, true)) == 0 {
		err = fmt.Errorf("path '%s' does not exist and cannot be created", path)
	}
	if c.done(err) {
		c.w.Uint64(1)
	}
}

// narFromPath finds out too late that a path is not valid, as Nix does, and
// then closes.
func (c *conn) narFromPath() error {
	path := c.r.StorePath()
	_, nar, ok := c.store.Get(path)
	c.done(nil)
	if !ok {
		c.fail(fmt.Sprintf("path '%s' is not valid", path))
		c.w.Flush() //nolint:errcheck // closing anyway
		return errClose
	}
	c.w.Write(nar) //nolint:errcheck // Flush tells
	return nil
}

func (c *conn) addToStoreNar() error {
	info := c.r.PathInfo()
	c.r.Bool() // repair
	c.r.Bool() // dontCheckSigs
	if c.r.Err() != nil {
		return c.r.Err()
	}
	framed := wire.NewFramedReader(c.r)
	err := c.addPath(wire.NewReader(framed), info)
	// As Nix: the answer comes after all that was sent is read.
	if derr := framed.Drain(); derr != nil {
		return derr
	}
	c.done(err)
	return nil
}

func (c *conn) addPath(r *wire.Reader, info nix.PathInfo) error {
	c.w.Uint64(msgNext)
	c.w.String(fmt.Sprintf("adding %s\n", info.Path))
	if err := c.w.Flush(); err != nil {
		return err
	}
	if c.store.BeforeAdd != nil {
		if err := c.store.BeforeAdd(info); err != nil {
			return err
		}
	}
	var nar bytes.Buffer
	if err := readNAR(r, &nar); err != nil {
		return err
	}
	return c.store.Add(info, nar.Bytes())
}

func (c *conn) addMultipleToStore() error {
	c.r.Bool() // repair
	c.r.Bool() // dontCheckSigs
	framed := wire.NewFramedReader(c.r)
	r := wire.NewReader(framed)
	var err error
	for n := r.Count(wire.MaxPaths); n > 0 && err == nil; n-- {
		info := r.PathInfo()
		if err = r.Err(); err == nil {
			err = c.addPath(r, info)
		}
	}
	if derr := framed.Drain(); derr != nil {
		return derr
	}
	c.done(err)
	return nil
}

const buildActivity = 42

func (c *conn) build(drvPath nix.StorePath, drv *nix.BasicDerivation) nix.BuildResult {
	c.w.Uint64(msgStartActivity)
	c.w.Uint64(buildActivity)
	c.w.Uint64(3) // lvlInfo
	c.w.Uint64(worker.ActBuild)
	c.w.String(fmt.Sprintf("building '%s'", drvPath))
	c.w.Uint64(2)
	c.w.Uint64(1) // a text
	c.w.StorePath(drvPath)
	c.w.Uint64(0) // a number
	c.w.Uint64(1)
	c.w.Uint64(0) // no parent
	res := c.server.runBuild(wiretest.BuildRequest{
		DrvPath: drvPath,
		Drv:     drv,
		Log:     func(line string) { c.logLine(buildActivity, line) },
	})
	c.w.Uint64(msgStopActivity)
	c.w.Uint64(buildActivity)
	return res
}

func (c *conn) form() wire.ResultForm {
	return wire.ResultForm{Times: true, CPU: c.version >= wire.MakeVersion(1, 37), Outputs: wire.RealisationOutputs}
}

func (c *conn) buildDerivation() {
	drvPath, drv := c.r.StorePath(), c.r.BasicDerivation()
	c.r.Int(2) // mode
	if c.r.Err() != nil {
		return
	}
	var err error
	if c.server.Trust == worker.NotTrusted && slices.ContainsFunc(slices.Collect(maps.Values(drv.Outputs)),
		func(o nix.DerivationOutput) bool { return o.Kind() == nix.InputAddressed }) {
		err = fmt.Errorf("you are not privileged to build input-addressed derivations")
	}
	var res nix.BuildResult
	if err == nil {
		res = c.build(drvPath, drv)
	}
	if c.done(err) {
		c.w.BuildResult(c.form(), &res)
	}
}

func (c *conn) buildPaths() {
	targets := c.r.Strings(wire.MaxPaths, wire.MaxStorePath+wire.MaxToken)
	c.r.Int(2) // mode
	if c.r.Err() != nil {
		return
	}
	results := make([]nix.BuildResult, len(targets))
	for i, target := range targets {
		drv, path := wiretest.SplitTarget(target)
		switch {
		case drv != "":
			results[i] = c.build(drv, nil)
		case len(c.store.Valid([]nix.StorePath{path}, true)) > 0:
			results[i].Status = nix.AlreadyValid
		default:
			results[i] = nix.BuildResult{Status: nix.NoSubstituters, ErrorMsg: "no substituter"}
		}
	}
	c.done(nil)
	c.w.Uint64(uint64(len(targets)))
	for i, target := range targets {
		c.w.String(target)
		c.w.BuildResult(c.form(), &results[i])
	}
}

func (c *conn) queryOutputs() {
	path := c.r.StorePath()
	var outputs map[string]nix.StorePath
	if c.store.Outputs != nil {
		outputs = c.store.Outputs(path)
	}
	if outputs == nil {
		c.done(fmt.Errorf("path '%s' is not valid", path))
		return
	}
	c.done(nil)
	c.w.Uint64(uint64(len(outputs)))
	for _, name := range slices.Sorted(maps.Keys(outputs)) {
		c.w.String(name)
		c.w.StorePath(outputs[name])
	}
}

func (c *conn) queryMissing() {
	targets := c.r.Strings(wire.MaxPaths, wire.MaxStorePath+wire.MaxToken)
	if c.r.Err() != nil {
		return
	}
	missing := c.server.missing
	if c.server.Missing != nil {
		missing = c.server.Missing
	}
	m := missing(targets)
	c.done(nil)
	c.w.StorePathSet(m.WillBuild)
	c.w.StorePathSet(m.WillSubstitute)
	c.w.StorePathSet(m.Unknown)
	c.w.Uint64(m.DownloadSize)
	c.w.Uint64(m.NarSize)
}

func (s *Server) missing(targets []string) worker.Missing {
	var m worker.Missing
	for _, target := range targets {
		drv, path := wiretest.SplitTarget(target)
		if drv != "" {
			m.WillBuild = append(m.WillBuild, drv)
		} else if _, _, ok := s.Store.Get(path); !ok {
			m.Unknown = append(m.Unknown, path)
		}
	}
	return m
}
