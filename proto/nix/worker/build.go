package worker

import (
	"fmt"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire"
)

// normalMode is BuildMode bmNormal: neither repair nor check.
const normalMode = 0

// Options are settings for the rest of a connection. All of them are applied,
// so the zero value is not "no change": it has MaxJobs 0, builds nothing, for
// example.
//
// If the server is a nix-daemon --stdio whose user does not own the store, they
// do not reach the daemon behind it (Nix 2.26 to 2.34).
type Options struct {
	KeepFailed, KeepGoing, Fallback bool
	// Verbosity is Nix's level: 0 errors, 3 information, 7 everything.
	Verbosity uint64
	MaxJobs   uint64
	// MaxSilentTime is sent in whole seconds; 0 is none.
	MaxSilentTime time.Duration
	// QuietBuilds keeps builders' output out of the server's own log.
	QuietBuilds bool
	// Cores is how many cores a build may use; 0 is all.
	Cores       uint64
	Substitutes bool
	// Overrides are settings by name. A server ignores most of them if it does
	// not trust the user, and says so in a log message.
	Overrides map[string]string
}

// SetOptions changes the server's settings for this connection.
func (c *Client) SetOptions(o Options) error {
	const lvlError, lvlVomit = 0, 7
	verboseBuild := uint64(lvlError)
	if o.QuietBuilds {
		verboseBuild = lvlVomit
	}
	return c.call("set options", opSetOptions, func() {
		c.w.Bool(o.KeepFailed)
		c.w.Bool(o.KeepGoing)
		c.w.Bool(o.Fallback)
		c.w.Uint64(o.Verbosity)
		c.w.Uint64(o.MaxJobs)
		c.w.Seconds(o.MaxSilentTime)
		c.w.Uint64(1) // useBuildHook, obsolete
		c.w.Uint64(verboseBuild)
		c.w.Uint64(0) // logType, obsolete
		c.w.Uint64(0) // printBuildTrace, obsolete
		c.w.Uint64(o.Cores)
		c.w.Bool(o.Substitutes)
		c.w.StringMap(o.Overrides)
	}, nil)
}

// resultForm is the form of a build result in version v without the feature
// realisation-with-path-not-hash, which this client does not announce.
func resultForm(v wire.Version) wire.ResultForm {
	return wire.ResultForm{Times: true, CPU: v >= 1<<8|37, Outputs: wire.RealisationOutputs}
}

// BuildDerivation builds drv on the server, which needs its inputs but not the
// .drv file. A build that ran and failed is a result, not an error. A server
// that does not trust the user refuses input-addressed derivations with a
// [*RemoteError].
func (c *Client) BuildDerivation(drvPath nix.StorePath, drv *nix.BasicDerivation) (nix.BuildResult, error) {
	var res nix.BuildResult
	err := c.call(fmt.Sprintf("build derivation %s", drvPath), opBuildDerivation,
		func() {
			c.w.StorePath(drvPath)
			c.w.BasicDerivation(drv)
			c.w.Uint64(normalMode)
		},
		func() { res = c.r.BuildResult(resultForm(c.version), drvPath.Dir()) })
	return res, err
}

// A TargetResult is the result of building one target.
type TargetResult struct {
	Target string
	nix.BuildResult
}

// BuildPathsWithResults makes targets valid, by building or substituting. A
// target is "/…/x.drv!*" for all outputs of a derivation in the store,
// "/…/x.drv!out,dev" for some, or a path. Failed builds are results, not errors.
// The results may be in another order, and without [Options] KeepGoing a target
// that was given up because another failed may have none (seen with Nix 2.34.8).
func (c *Client) BuildPathsWithResults(targets []string) ([]TargetResult, error) {
	var results []TargetResult
	err := c.call("build paths", opBuildPathsWithResults,
		func() {
			c.w.Strings(targets)
			c.w.Uint64(normalMode)
		},
		func() {
			for n := c.r.Count(wire.MaxPaths); n > 0 && c.r.Err() == nil; n-- {
				target := c.r.String(maxTarget)
				results = append(results, TargetResult{
					Target:      target,
					BuildResult: c.r.BuildResult(resultForm(c.version), nix.StorePath(target).Dir()),
				})
			}
		})
	return results, err
}

// maxTarget is the longest target: a path and the names of all its outputs.
const maxTarget = wire.MaxStorePath + 64<<10
