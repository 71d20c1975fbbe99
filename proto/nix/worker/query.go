package worker

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/nar"
	"nixdispatch/proto/nix/wire"
)

type opcode uint64

// The operations (src/libstore/include/nix/store/worker-protocol.hh).
const (
	opIsValidPath              opcode = 1
	opEnsurePath               opcode = 10
	opAddTempRoot              opcode = 11
	opAddIndirectRoot          opcode = 12
	opSetOptions               opcode = 19
	opQueryPathInfo            opcode = 26
	opQueryValidPaths          opcode = 31
	opBuildDerivation          opcode = 36
	opNarFromPath              opcode = 38
	opAddToStoreNar            opcode = 39
	opQueryMissing             opcode = 40
	opQueryDerivationOutputMap opcode = 41
	opAddMultipleToStore       opcode = 44
	opBuildPathsWithResults    opcode = 46
)

// IsValidPath asks whether path is valid.
func (c *Client) IsValidPath(path nix.StorePath) (bool, error) {
	var valid bool
	err := c.call(fmt.Sprintf("query %s", path), opIsValidPath,
		func() { c.w.StorePath(path) },
		func() { valid = c.r.Bool() })
	return valid, err
}

// QueryValidPaths asks which of paths are valid. With substitute the server
// first tries to fetch the missing ones from its substituters.
func (c *Client) QueryValidPaths(paths []nix.StorePath, substitute bool) ([]nix.StorePath, error) {
	var valid []nix.StorePath
	err := c.call("query valid paths", opQueryValidPaths,
		func() { c.w.StorePathSet(paths); c.w.Bool(substitute) },
		func() { valid = c.r.StorePaths(len(paths)) })
	return valid, err
}

// QueryPathInfo asks what is known of path; ok is false if it is not valid.
func (c *Client) QueryPathInfo(path nix.StorePath) (info nix.PathInfo, ok bool, err error) {
	infos, err := c.QueryPathInfos([]nix.StorePath{path})
	if err != nil || len(infos) == 0 {
		return nix.PathInfo{}, false, err
	}
	return infos[0], true, nil
}

// QueryPathInfos asks what is known of paths, all at once. Paths that are not
// valid are missing from the answer, which otherwise has the order of paths.
func (c *Client) QueryPathInfos(paths []nix.StorePath) ([]nix.PathInfo, error) {
	var infos []nix.PathInfo
	err := c.pipeline("query path infos", len(paths),
		func(i int) {
			c.w.Uint64(uint64(opQueryPathInfo))
			c.w.StorePath(paths[i])
		},
		func(i int) error {
			err := c.answer(func() {
				if c.r.Bool() {
					infos = append(infos, c.r.UnkeyedPathInfo(paths[i]))
				}
			})
			if saysNotValid(err) {
				return nil
			}
			return err
		})
	return infos, err
}

// saysNotValid recognises the other way in which a server says that a path is
// not valid (queryPathInfo in src/libstore/worker-protocol-connection.cc).
func saysNotValid(err error) bool {
	remote, ok := errors.AsType[*RemoteError](err)
	return ok && strings.Contains(remote.Message, "is not valid")
}

// NarFromPath copies the path's NAR, which must be size bytes long, to dst and
// returns how many were copied. If dst fails, or the server, which then says why
// in a [*RemoteError], the client is unusable: a NAR has no end but its own.
func (c *Client) NarFromPath(path nix.StorePath, size uint64, dst io.Writer) (int64, error) {
	what := fmt.Sprintf("NAR of %s", path)
	var n int64
	var nerr error
	err := c.call(what, opNarFromPath,
		func() { c.w.StorePath(path) },
		func() {
			// The server finds out that it has no such path when it should begin to
			// send it (NarFromPath in src/libstore/daemon.cc).
			if c.r.PeekUint64() == msgError {
				nerr = c.messages()
				return
			}
			n, nerr = nar.CopySized(size, dst, c.r)
		})
	if nerr != nil {
		err = c.fail(what, brokenOff(nerr))
	}
	return n, err
}

// brokenOff explains a NAR in the middle of which the server begins its error
// message, as Nix 2.8 does even for a path that is not valid. The message is
// lost: where a NAR ends and an error begins cannot be told for certain.
func brokenOff(err error) error {
	if e, ok := errors.AsType[*wire.LengthError](err); ok && e.Length == msgError {
		return fmt.Errorf("the server failed while it sent the NAR, mostly because the path is not valid: %w", err)
	}
	return err
}

// AddTempRoot keeps path from the server's garbage collector until the
// connection ends. The path need not be valid yet.
func (c *Client) AddTempRoot(path nix.StorePath) error {
	return c.AddTempRoots([]nix.StorePath{path})
}

// AddTempRoots is [Client.AddTempRoot] for many paths at once.
func (c *Client) AddTempRoots(paths []nix.StorePath) error {
	return c.pipeline("add temporary roots", len(paths),
		func(i int) {
			c.w.Uint64(uint64(opAddTempRoot))
			c.w.StorePath(paths[i])
		},
		func(int) error { return c.answer(func() { c.r.Uint64() }) })
}

// AddIndirectRoot tells the server that link, the absolute path of a symbolic
// link outside the store, is a root of its garbage collector.
func (c *Client) AddIndirectRoot(link string) error {
	return c.call(fmt.Sprintf("add root %q", link), opAddIndirectRoot,
		func() { c.w.String(link) },
		func() { c.r.Uint64() })
}

// EnsurePath makes path valid by substitution if it is not.
func (c *Client) EnsurePath(path nix.StorePath) error {
	return c.call(fmt.Sprintf("ensure %s", path), opEnsurePath,
		func() { c.w.StorePath(path) },
		func() { c.r.Uint64() })
}

// QueryDerivationOutputMap asks for the outputs of a derivation in the store, by
// name. A path that is not known yet is "".
func (c *Client) QueryDerivationOutputMap(drvPath nix.StorePath) (map[string]nix.StorePath, error) {
	outputs := make(map[string]nix.StorePath)
	err := c.call(fmt.Sprintf("query outputs of %s", drvPath), opQueryDerivationOutputMap,
		func() { c.w.StorePath(drvPath) },
		func() {
			for n := c.r.Count(wire.MaxTokens); n > 0 && c.r.Err() == nil; n-- {
				name := c.r.String(wire.MaxToken)
				outputs[name] = c.r.OptStorePath()
			}
		})
	return outputs, err
}

// Missing is what a server would have to do to make targets valid.
type Missing struct {
	WillBuild, WillSubstitute, Unknown []nix.StorePath
	// DownloadSize and NarSize are bytes, of what will be substituted.
	DownloadSize, NarSize uint64
}

// QueryMissing asks what it would take to make targets valid; see
// [Client.BuildPathsWithResults] for their form.
func (c *Client) QueryMissing(targets []string) (Missing, error) {
	var m Missing
	err := c.call("query missing paths", opQueryMissing,
		func() { c.w.Strings(targets) },
		func() {
			m = Missing{
				WillBuild:      c.r.StorePaths(wire.MaxPaths),
				WillSubstitute: c.r.StorePaths(wire.MaxPaths),
				Unknown:        c.r.StorePaths(wire.MaxPaths),
				DownloadSize:   c.r.Uint64(),
				NarSize:        c.r.Uint64(),
			}
		})
	return m, err
}
