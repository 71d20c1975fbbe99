package daemon

import (
	"io"
	"slices"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/serve"
	"nixdispatch/proto/nix/worker"
)

// A serveStore is a machine behind ssh://, which runs nix-store --serve.
type serveStore struct{ c *serve.Client }

func (s serveStore) missing(paths []nix.StorePath, substitute bool) ([]nix.StorePath, error) {
	if len(paths) == 0 {
		return nil, nil
	}
	valid, err := s.c.QueryValidPaths(paths, true, substitute)
	if err != nil {
		return nil, err
	}
	return without(paths, valid), nil
}

func (s serveStore) upload(infos []nix.PathInfo, nar func(nix.PathInfo, io.Writer) error) error {
	_, err := s.c.Upload(infos, func(i *nix.PathInfo, w io.Writer) error { return nar(*i, w) })
	return err
}

func (s serveStore) build(drvPath nix.StorePath, drv nix.BasicDerivation, opts nix.BuildOptions) (nix.BuildResult, error) {
	return s.c.BuildDerivation(drvPath, &drv, opts)
}

func (s serveStore) realise(drvPath nix.StorePath, opts nix.BuildOptions) (nix.BuildResult, error) {
	return s.c.BuildPaths([]string{string(drvPath)}, opts)
}

func (s serveStore) pathInfos(paths []nix.StorePath) ([]nix.PathInfo, error) {
	return s.c.QueryPathInfos(paths)
}

func (s serveStore) dump(info nix.PathInfo, w io.Writer) error {
	_, err := s.c.DumpStorePath(info.Path, info.NarSize, w)
	return err
}

// trust is unknown: the serve protocol has no word for it.
func (s serveStore) trust() worker.Trust { return worker.TrustUnknown }

// A workerStore is a machine behind ssh-ng://, which runs nix-daemon --stdio.
type workerStore struct{ c *worker.Client }

func (s workerStore) missing(paths []nix.StorePath, substitute bool) ([]nix.StorePath, error) {
	if len(paths) == 0 {
		return nil, nil
	}
	if err := s.c.AddTempRoots(paths); err != nil {
		return nil, err
	}
	valid, err := s.c.QueryValidPaths(paths, substitute)
	if err != nil {
		return nil, err
	}
	return without(paths, valid), nil
}

func (s workerStore) upload(infos []nix.PathInfo, nar func(nix.PathInfo, io.Writer) error) error {
	_, err := s.c.Upload(infos, true, func(i *nix.PathInfo, w io.Writer) error { return nar(*i, w) })
	return err
}

// build ignores the options: SetOptions would not reach a daemon behind
// nix-daemon --stdio, and overwrite more than it should where it does.
func (s workerStore) build(drvPath nix.StorePath, drv nix.BasicDerivation, _ nix.BuildOptions) (nix.BuildResult, error) {
	return s.c.BuildDerivation(drvPath, &drv)
}

func (s workerStore) realise(drvPath nix.StorePath, _ nix.BuildOptions) (nix.BuildResult, error) {
	return buildAll(s.c, drvPath)
}

func (s workerStore) pathInfos(paths []nix.StorePath) ([]nix.PathInfo, error) {
	return s.c.QueryPathInfos(paths)
}

func (s workerStore) dump(info nix.PathInfo, w io.Writer) error {
	_, err := s.c.NarFromPath(info.Path, info.NarSize, w)
	return err
}

func (s workerStore) trust() worker.Trust { return s.c.Trust() }

// buildAll makes all outputs of a derivation valid that is itself valid.
func buildAll(c *worker.Client, drvPath nix.StorePath) (nix.BuildResult, error) {
	results, err := c.BuildPathsWithResults([]string{string(drvPath) + "!*"})
	if err != nil {
		return nix.BuildResult{}, err
	}
	for _, r := range results {
		if !r.Status.Success() {
			return r.BuildResult, nil
		}
	}
	if len(results) == 0 {
		return nix.BuildResult{Status: nix.MiscFailure, ErrorMsg: "nix-daemon gave no result"}, nil
	}
	return results[0].BuildResult, nil
}

// without returns the paths that are not among valid.
func without(paths, valid []nix.StorePath) []nix.StorePath {
	have := make(map[nix.StorePath]bool, len(valid))
	for _, p := range valid {
		have[p] = true
	}
	return slices.DeleteFunc(slices.Clone(paths), func(p nix.StorePath) bool { return have[p] })
}

// A workerLog makes a builder's log of what a worker-protocol server tells.
type workerLog struct {
	log logSink
	buf []byte
}

func (*workerLog) Log(string)                    {}
func (*workerLog) StartActivity(worker.Activity) {}
func (*workerLog) StopActivity(uint64)           {}

// Result passes on lines and phases of the build.
func (l *workerLog) Result(r worker.Result) {
	if l.buf = worker.AppendBuildLog(l.buf[:0], r); len(l.buf) > 0 {
		_, _ = l.log.Write(l.buf) // a spool takes everything
	}
}
