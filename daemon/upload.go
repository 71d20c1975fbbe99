package daemon

import (
	"context"
	"io"
	"slices"

	"nixdispatch/proto/nix"
)

// inputs are the paths that the machine must have before it can build.
func (a *attempt) inputs(ctx context.Context) ([]nix.StorePath, error) {
	var err error
	if a.given, err = a.b.inputs.await(ctx); err != nil || !a.whole {
		return a.given, err
	}
	conn, err := a.b.store.open(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	infos, err := conn.closure(nil, []nix.StorePath{a.b.drvPath})
	if err != nil {
		return nil, err
	}
	known := make(map[nix.StorePath]bool, len(infos))
	for _, i := range infos {
		known[i.Path] = true
	}
	infosOfInputs, err := conn.QueryPathInfos(a.given)
	if err != nil {
		return nil, &localError{doing: "query inputs", err: err}
	}
	for _, i := range infosOfInputs {
		if i.CA != "" && !known[i.Path] {
			infos = append(infos, i)
		}
	}
	paths := make([]nix.StorePath, len(infos))
	for n, i := range infos {
		paths[n] = i.Path
	}
	return paths, nil
}

// copyInputs brings paths to the machine. Each travels once, whichever of the
// builds that need it carries it.
func (a *attempt) copyInputs(ctx context.Context, paths []nix.StorePath) error {
	asked := a.m.uploads.moment()
	lacking, err := a.r.missing(paths, a.b.substitute)
	if err == nil && len(paths) == 0 && a.r.builds > 1 {
		_, err = a.r.pathInfos([]nix.StorePath{a.b.drvPath}) // does it still answer?
	}
	if err != nil && a.r.builds > 1 {
		return errStale
	}
	if err != nil {
		return a.fault(doingMissing, err)
	}
	if len(lacking) == 0 {
		return nil
	}
	conn, err := a.b.store.open(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	known := make(map[nix.StorePath]nix.PathInfo)
	if err := conn.learn(known, lacking); err != nil {
		return err
	}
	infos := make([]nix.PathInfo, len(lacking))
	for n, p := range lacking {
		infos[n] = known[p]
	}
	infos, err = nix.TopoSort(infos)
	if err != nil {
		return &localError{doing: "query inputs", err: err}
	}
	u := &upload{
		attempt:  a,
		conn:     conn,
		held:     make(map[nix.StorePath]*claim),
		asked:    asked,
		progress: newTransfer(a.b, a.d.metrics.sent(a.m.line.StoreURI), uploading, infos),
	}
	defer func() { a.b.account.sent += u.progress.now.BytesDone }()
	defer u.abandon()
	if err := u.run(ctx, infos); err != nil {
		return err
	}
	conn.clean = true
	return nil
}

// An upload copies the paths that one build lacks, in turns with other builds
// that lack some of the same.
type upload struct {
	*attempt
	conn     *localConn
	held     map[nix.StorePath]*claim
	asked    uint64 // the moment after which the machine was asked what it lacks
	progress *transfer
}

// abandon gives up what was claimed but not sent.
func (u *upload) abandon() {
	rest := make([]nix.StorePath, 0, len(u.held))
	for p := range u.held {
		rest = append(rest, p)
	}
	u.m.uploads.release(rest, u.held, false)
}

// run sends infos, references first, until none is missing.
func (u *upload) run(ctx context.Context, infos []nix.PathInfo) error {
	for len(infos) > 0 {
		t := u.m.uploads.take(pathsOf(infos), u.held)
		if len(t.mine) > 0 && t.moment != u.asked {
			var err error
			if infos, err = u.askAgain(infos, t); err != nil {
				return err
			}
		}
		ready, rest := split(infos, t.theirs)
		if len(ready) > 0 {
			if err := u.inTurn(ctx, ready); err != nil {
				return err
			}
			u.m.uploads.release(pathsOf(ready), u.held, true)
			infos = rest
			continue
		}
		if len(rest) == 0 {
			return nil
		}
		var err error
		if infos, err = u.awaitOthers(ctx, rest, t); err != nil {
			return err
		}
	}
	return nil
}

// askAgain leaves out of infos what somebody has brought between the last
// question and our claim.
func (u *upload) askAgain(infos []nix.PathInfo, t taking) ([]nix.PathInfo, error) {
	missing, err := u.r.missing(t.mine, false)
	if err != nil {
		return nil, u.fault(doingMissing, err)
	}
	u.asked = t.moment
	there := without(t.mine, missing)
	u.m.uploads.release(there, u.held, true)
	return u.leaveOut(infos, there), nil
}

// leaveOut takes out of infos the paths that somebody else has brought.
func (u *upload) leaveOut(infos []nix.PathInfo, there []nix.StorePath) []nix.PathInfo {
	out := make(map[nix.StorePath]bool, len(there))
	for _, p := range there {
		out[p] = true
	}
	return slices.DeleteFunc(infos, func(i nix.PathInfo) bool {
		if out[i.Path] {
			u.progress.skip(i)
		}
		return out[i.Path]
	})
}

// split separates, of paths in reference order, those that can be sent now from
// those that others are sending or that refer to such.
func split(infos []nix.PathInfo, theirs map[nix.StorePath]*claim) (ready, rest []nix.PathInfo) {
	held := make(map[nix.StorePath]bool)
	for _, i := range infos {
		wait := theirs[i.Path] != nil || slices.ContainsFunc(i.References, func(r nix.StorePath) bool { return held[r] })
		if wait {
			held[i.Path] = true
			rest = append(rest, i)
		} else {
			ready = append(ready, i)
		}
	}
	return ready, rest
}

// Uploads of this size and more take turns.
const bulk = 1 << 20

// inTurn sends paths, after having waited for its turn if they are large. The paths
// of all builds in one go would fill a slow line as well, but arrive all at the
// same time: no build could begin before, and while they run the line would be
// idle.
func (u *upload) inTurn(ctx context.Context, infos []nix.PathInfo) error {
	var size uint64
	for _, i := range infos {
		size += i.NarSize
	}
	if size >= bulk {
		select {
		case u.m.turns <- struct{}{}:
			defer func() { <-u.m.turns }()
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-u.r.session.Done():
			return u.fault("copy inputs", errSessionGone)
		}
	}
	return u.send(infos)
}

// send uploads paths in one go.
func (u *upload) send(infos []nix.PathInfo) error {
	var local error
	err := u.r.upload(infos, func(i nix.PathInfo, w io.Writer) error {
		out := u.progress.begin(i, w)
		_, err := u.conn.NarFromPath(i.Path, i.NarSize, out)
		if err != nil && out.err == nil {
			local = err // reading failed, not writing
		}
		return err
	})
	u.progress.flush()
	switch {
	case local != nil:
		return &localError{doing: "read input", err: local}
	case err != nil:
		return u.fault(doingInputs, err)
	default:
		return nil
	}
}

// awaitOthers waits until another build has finished with some path, and returns
// what is still missing then. An owner that failed leaves its paths to be claimed
// anew.
func (u *upload) awaitOthers(ctx context.Context, infos []nix.PathInfo, t taking) ([]nix.PathInfo, error) {
	select {
	case <-t.released:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	var sent []nix.StorePath
	for p, c := range t.theirs {
		if c.over() && c.sent {
			sent = append(sent, p)
		}
	}
	return u.leaveOut(infos, sent), nil
}

func pathsOf(infos []nix.PathInfo) []nix.StorePath {
	paths := make([]nix.StorePath, len(infos))
	for n, i := range infos {
		paths[n] = i.Path
	}
	return paths
}
