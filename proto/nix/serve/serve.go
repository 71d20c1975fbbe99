// Package serve is a client of "nix-store --serve --write", the protocol behind
// ssh:// machines.
//
// It announces protocol 2.7, which Nix 2.8 to 2.34 and Lix speak, and accepts
// servers from 2.5 on (Nix 2.4). The protocol has no error messages: a server
// that fails prints on its standard error, which is not part of this stream,
// and ends; the client sees io.ErrUnexpectedEOF. Only builds report failure in
// band.
//
// Methods block. The owner cancels them by closing the transport: then every
// method returns an error, and no goroutine of the package stays behind.
//
// It follows src/libstore/serve-protocol.cc, serve-protocol-connection.cc and
// src/nix/nix-store/nix-store.cc (opServe) of Nix 2.34.8.
package serve

import (
	"errors"
	"fmt"
	"io"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/nar"
	"nixdispatch/proto/nix/wire"
)

const (
	clientMagic = 0x390c9deb
	serverMagic = 0x5452eecb

	announced = wire.Version(2<<8 | 7)
	// oldest is what Nix itself requires; AddToStoreNar exists since then.
	oldest = wire.Version(2<<8 | 5)
)

// The commands (src/libstore/include/nix/store/serve-protocol.hh).
const (
	cmdQueryValidPaths = 1
	cmdQueryPathInfos  = 2
	cmdDumpStorePath   = 3
	cmdBuildPaths      = 6
	cmdBuildDerivation = 8
	cmdAddToStoreNar   = 9
)

// A Client speaks to one server process. It does one operation at a time and is
// not safe for concurrent use.
//
// A failure of the transport or of the protocol makes it unusable: every
// further call fails at once, with that error inside.
type Client struct {
	r       *wire.Reader
	w       *wire.Writer
	version wire.Version
	err     error
}

// NewClient does the handshake with the server that reads w and writes r. Its
// errors are of type [*wire.HandshakeError].
func NewClient(r io.Reader, w io.Writer) (*Client, error) {
	c := &Client{r: wire.NewReader(r), w: wire.NewWriter(w)}
	c.w.Uint64(clientMagic)
	c.w.Uint64(uint64(announced))
	// What the other side said before it closed tells more than that it closed.
	werr := c.w.Flush()
	v, err := c.r.Greeting("nix-store --serve", serverMagic, oldest)
	if err != nil {
		return nil, err
	}
	if werr != nil {
		return nil, &wire.HandshakeError{Protocol: "nix-store --serve", Fault: wire.Closed, Err: werr}
	}
	c.version = min(v, announced)
	return c, nil
}

// Version is the version spoken: the older of the two sides'.
func (c *Client) Version() wire.Version { return c.version }

// Err tells why the client is unusable; nil while it is usable.
func (c *Client) Err() error { return c.err }

// begin refuses an operation on an unusable client.
func (c *Client) begin(op string) error {
	if c.err != nil {
		return fmt.Errorf("%s: connection unusable after: %w", op, c.err)
	}
	return nil
}

// fail makes the client unusable and names the operation.
func (c *Client) fail(op string, err error) error {
	c.err = fmt.Errorf("%s: %w", op, wire.UnexpectedEOF(err))
	return c.err
}

// finish ends an operation: nil if all went well with both streams.
func (c *Client) finish(op string) error {
	if err := errors.Join(c.w.Err(), c.r.Err()); err != nil {
		return c.fail(op, err)
	}
	return nil
}

// send flushes a request.
func (c *Client) send(op string) error {
	if err := c.w.Flush(); err != nil {
		return c.fail(op, err)
	}
	return nil
}

// QueryValidPaths asks which of paths are valid on the server. With lock the
// server keeps all of them from its garbage collector, also those that are yet
// to come, until its process ends. With substitute it first tries to fetch the
// missing ones, except derivations, from its substituters; a failure to do so
// is no error.
//
// A server never substitutes again after its first build.
func (c *Client) QueryValidPaths(paths []nix.StorePath, lock, substitute bool) ([]nix.StorePath, error) {
	const op = "query valid paths"
	if err := c.begin(op); err != nil {
		return nil, err
	}
	c.w.Uint64(cmdQueryValidPaths)
	c.w.Bool(lock)
	c.w.Bool(substitute)
	c.w.StorePathSet(paths)
	if err := c.send(op); err != nil {
		return nil, err
	}
	valid := c.r.StorePaths(len(paths))
	return valid, c.finish(op)
}

// QueryPathInfos asks what is known of paths. Paths that are not valid are
// missing from the answer; the order is the server's.
func (c *Client) QueryPathInfos(paths []nix.StorePath) ([]nix.PathInfo, error) {
	const op = "query path infos"
	if err := c.begin(op); err != nil {
		return nil, err
	}
	c.w.Uint64(cmdQueryPathInfos)
	c.w.StorePathSet(paths)
	if err := c.send(op); err != nil {
		return nil, err
	}
	asked := make(map[nix.StorePath]bool, len(paths))
	for _, p := range paths {
		asked[p] = true
	}
	var infos []nix.PathInfo
	for c.r.Err() == nil {
		path := c.r.OptStorePath()
		if path == "" {
			break
		}
		if !asked[path] {
			c.r.Fail(fmt.Errorf("the server told of %q, which was not asked for or told before", path))
			break
		}
		delete(asked, path) // bounds the answer by the question
		infos = append(infos, readPathInfo(c.r, path))
	}
	return infos, c.finish(op)
}

// readPathInfo reads UnkeyedValidPathInfo of protocol 2.4 and later.
func readPathInfo(r *wire.Reader, path nix.StorePath) nix.PathInfo {
	info := nix.PathInfo{
		Path:       path,
		Deriver:    r.OptStorePath(),
		References: r.StorePaths(wire.MaxReferences),
	}
	r.Uint64() // download size
	info.NarSize = r.Uint64()
	info.NarHash = r.NarHash()
	info.CA = r.String(wire.MaxToken)
	info.Sigs = r.Strings(wire.MaxTokens, wire.MaxToken)
	return info
}

// DumpStorePath copies the path's NAR, which must be size bytes long, to dst and
// returns how many were copied. The server ends if the path is not valid. If dst
// fails the client is unusable.
func (c *Client) DumpStorePath(path nix.StorePath, size uint64, dst io.Writer) (int64, error) {
	op := fmt.Sprintf("dump store path %s", path)
	if err := c.begin(op); err != nil {
		return 0, err
	}
	c.w.Uint64(cmdDumpStorePath)
	c.w.StorePath(path)
	if err := c.send(op); err != nil {
		return 0, err
	}
	n, err := nar.CopySized(size, dst, c.r)
	if err != nil {
		return n, c.fail(op, err)
	}
	return n, nil
}

// BuildDerivation builds drv on the server, which needs its inputs but not the
// .drv file. A build that ran and failed is a result, not an error.
//
// The server's process is from then on quiet, keeps no log and substitutes no
// more (opServe, getBuildSettings).
func (c *Client) BuildDerivation(drvPath nix.StorePath, drv *nix.BasicDerivation, opts nix.BuildOptions) (nix.BuildResult, error) {
	op := fmt.Sprintf("build derivation %s", drvPath)
	if err := c.begin(op); err != nil {
		return nix.BuildResult{}, err
	}
	c.w.Uint64(cmdBuildDerivation)
	c.w.StorePath(drvPath)
	c.w.BasicDerivation(drv)
	c.writeOptions(opts)
	if err := c.send(op); err != nil {
		return nix.BuildResult{}, err
	}
	res := c.r.BuildResult(resultForm(c.version), drvPath.Dir())
	return res, c.finish(op)
}

// BuildPaths builds what targets name: "/…/x.drv" for all outputs, "/…/x.drv!out,dev"
// for some, or a path to substitute. The result has a status and the server's
// message only. The status is [nix.Built] whenever all went well, for the protocol tells
// an exit code, and the kind of failure as far as that code tells it.
func (c *Client) BuildPaths(targets []string, opts nix.BuildOptions) (nix.BuildResult, error) {
	const op = "build paths"
	if err := c.begin(op); err != nil {
		return nix.BuildResult{}, err
	}
	c.w.Uint64(cmdBuildPaths)
	c.w.Strings(targets)
	c.writeOptions(opts)
	if err := c.send(op); err != nil {
		return nix.BuildResult{}, err
	}
	var res nix.BuildResult
	if code := c.r.Uint64(); code != 0 {
		res.Status = statusOfExit(code)
		res.ErrorMsg = c.r.Text(wire.MaxText)
	}
	return res, c.finish(op)
}

// statusOfExit reads Nix's exit code of a failed build: 1, or 0x60 with bits of
// what went wrong (ExitStatusFlags::failingExitStatus in
// src/libstore/build-result.cc; 2.8.0: Worker::exitStatus).
func statusOfExit(code uint64) nix.BuildStatus {
	switch {
	case code&^0xf != 0x60:
		return nix.MiscFailure
	case code&1 != 0:
		return nix.TimedOut
	case code&2 != 0:
		return nix.OutputRejected
	case code&4 != 0:
		return nix.PermanentFailure
	default:
		return nix.NotDeterministic
	}
}

func (c *Client) writeOptions(opts nix.BuildOptions) {
	c.w.Seconds(opts.MaxSilentTime)
	c.w.Seconds(opts.Timeout)
	c.w.Uint64(opts.MaxLogSize)
	c.w.Uint64(0) // nrRepeats, refused otherwise
	c.w.Uint64(0) // enforceDeterminism, ignored
	if c.version >= 2<<8|7 {
		c.w.Bool(opts.KeepFailed)
	}
}

// resultForm is the form of a build result in version v. 2.8 is Nix 2.35; this
// client does not announce it, and is ready for it.
func resultForm(v wire.Version) wire.ResultForm {
	form := wire.ResultForm{Times: true}
	switch {
	case v >= 2<<8|8:
		form.Outputs = wire.PathOutputs
	case v >= 2<<8|6:
		form.Outputs = wire.RealisationOutputs
	}
	return form
}
