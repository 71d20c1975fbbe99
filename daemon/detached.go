package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

const (
	// maxDetached bounds how many detached builds of a user are in progress.
	maxDetached = 16
	// keepDetached is how long it is known how one ended, and its outputs are kept.
	keepDetached = 7 * 24 * time.Hour
	// maxEndedDetached bounds how many of a user's are kept that have ended.
	maxEndedDetached = 64
	// maxDetachedStarts bounds how many daemons may begin with one: it may be what
	// they die of.
	maxDetachedStarts = 20
	// maxFailures bounds how many failures are kept with their messages.
	maxFailures = 20
)

// errEndedBadly is a detached build that came to no result.
var errEndedBadly = errors.New("the detached build has ended")

// detachedBuilds are the Build calls that go on without their callers, and those
// that have ended some days ago at most. They survive the daemon in files of the
// state directory. Safe for concurrent use.
type detachedBuilds struct {
	dir string
	log *slog.Logger

	running sync.WaitGroup

	// files is held while files are written or removed, and taken before mu.
	files sync.Mutex

	mu  sync.Mutex
	all map[uint64]*detachedBuild
}

// A detachedBuild is one of them.
type detachedBuild struct {
	id      uint64
	request *dispatchv1.BuildRequest
	caller  caller
	since   time.Time
	starts  int        // how many daemons have begun with it
	use     *usage.Use // while it goes on

	ctx    context.Context //nolint:containedctx // it is nobody's call
	cancel context.CancelCauseFunc

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at each change below
	plan     *dispatchv1.Plan
	planned  int
	began    []begun                  // builds followed, in order; none once it has ended
	seen     map[string]bool          // the derivations of these
	finished []*dispatchv1.BuildEvent // once it has ended, only the first failures
	built    int
	failed   int
	summary  *dispatchv1.Summary
	ended    time.Time // zero while it goes on
	err      string
	cut      bool // ended by the daemon's own end: the next one goes on with it
}

// A begun is a derivation that a machine builds.
type begun struct {
	id      uint64
	drvPath string
}

// newDetached makes a build that is to go on from now.
func (d *Daemon) newDetached(id uint64, req *dispatchv1.BuildRequest, by caller, since time.Time) *detachedBuild {
	j := &detachedBuild{
		id: id, request: req, caller: by, since: since,
		changed: make(chan struct{}), seen: make(map[string]bool),
	}
	j.ctx, j.cancel = context.WithCancelCause(d.life)
	return j
}

// detach begins a Build call that goes on without its caller, and tells the caller
// what it consists of. Until that is known an error ends it.
func (d *Daemon) detach(req *dispatchv1.BuildRequest, by caller, send func(*dispatchv1.BuildResponse) error) error {
	if req.Builders != nil {
		return fmt.Errorf("%w: a detached build goes by the daemon's own list of machines", errBadRequest)
	}
	req = proto.CloneOf(req)
	req.Detach, req.HoldRoots = false, false
	use, err := d.usage.Take(by.user(), usage.DetachedBuilds, 1)
	if err != nil {
		return err
	}
	j := d.newDetached(d.dispatcher.nextID(), req, by, time.Now())
	j.use = use
	if err := d.detached.add(j); err != nil {
		use.Release()
		return err
	}
	began := make(chan error, 1)
	d.detached.running.Add(1) // the call itself is counted among realising
	go d.runDetached(j, began)
	if err := <-began; err != nil {
		d.detached.forget(j)
		return err
	}
	d.log.Info("detached build", "build_id", j.id, "user", originOf(by, nil).String())
	if err := send(&dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Plan{Plan: j.read(new(attachCursor)).plan}}); err != nil {
		return err
	}
	return send(&dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Detached{Detached: &dispatchv1.Detached{BuildId: j.id}}})
}

// resumeDetached goes on with what an earlier daemon has left.
func (d *Daemon) resumeDetached() {
	for _, j := range d.detached.load(d) {
		d.dispatcher.skipID(j.id)
		if !j.ended.IsZero() {
			continue
		}
		if j.starts++; j.starts > maxDetachedStarts {
			j.end(fmt.Errorf("%d daemons in turn have not come to its end", maxDetachedStarts))
			d.detached.save(j)
			continue
		}
		d.log.Info("going on with a detached build", "build_id", j.id)
		d.detached.save(j)
		j.use = d.usage.Count(j.caller.user(), usage.DetachedBuilds, 1)
		d.detached.running.Add(1)
		go d.runDetached(j, nil)
	}
	d.detached.prune(time.Now())
}

// runDetached builds. began gets nil once it is known what there is to do, or why
// that cannot be; it may be nil.
func (d *Daemon) runDetached(j *detachedBuild, began chan<- error) {
	defer d.detached.running.Done()
	defer j.cancel(nil)
	tell := func(err error) {
		if began != nil {
			began <- err
		}
		began = nil
	}
	send := func(m *dispatchv1.BuildResponse) error {
		if j.note(m); m.GetPlan() != nil {
			tell(nil)
		}
		return nil
	}
	r, targets, err := d.newRealisation(j.ctx, j.request, j.caller, send)
	if err == nil {
		r.keep = func(outputs []*dispatchv1.Output) error { return d.detached.keepOutputs(j, r.conn, outputs) }
		err = r.run(j.ctx, targets)
		r.lease.release()
	}
	j.use.Release() // before it is told, so that who waited for it can detach another
	j.end(err)
	d.detached.save(j)
	d.detached.prune(time.Now())
	d.log.Info("detached build ended", "build_id", j.id, "err", err)
	tell(err)
}

// note keeps what there is to know of the news of the build.
func (j *detachedBuild) note(m *dispatchv1.BuildResponse) {
	j.mu.Lock()
	defer j.mu.Unlock()
	e := m.GetEvent()
	switch {
	case m.GetPlan() != nil:
		j.plan, j.planned = m.GetPlan(), len(m.GetPlan().GetWillBuild())
	case m.GetSummary() != nil:
		j.summary = m.GetSummary()
	case e.GetFinished() != nil:
		j.finished = append(j.finished, e)
		if e.GetFinished().GetStatus().Succeeded() {
			j.built++
		} else {
			j.failed++
		}
	case e.GetBuildId() != 0 && !j.seen[e.GetDrvPath()]:
		j.seen[e.GetDrvPath()] = true
		j.began = append(j.began, begun{e.GetBuildId(), e.GetDrvPath()})
	default:
		return
	}
	j.signalLocked()
}

// end notes that the build has ended, for the reason given.
func (j *detachedBuild) end(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ended = time.Now()
	if err != nil {
		j.err = err.Error()
	}
	j.cut = errors.Is(err, errShutdown)
	j.signalLocked()
}

// awaitEnd waits until the build has ended, for endedWait at most.
func (j *detachedBuild) awaitEnd(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, endedWait)
	defer cancel()
	for {
		r := j.read(new(attachCursor))
		if r.ended {
			return
		}
		select {
		case <-r.changed:
		case <-ctx.Done():
			return
		}
	}
}

// forgetDetails frees what only serves to follow a build.
func (j *detachedBuild) forgetDetails() {
	j.mu.Lock()
	defer j.mu.Unlock()
	failures := slices.DeleteFunc(slices.Clone(j.finished), func(e *dispatchv1.BuildEvent) bool {
		return e.GetFinished().GetStatus().Succeeded()
	})
	j.finished = slices.Clip(failures[:min(len(failures), maxFailures)])
	j.plan, j.began, j.seen = nil, nil, nil
}

func (j *detachedBuild) signalLocked() {
	close(j.changed)
	j.changed = make(chan struct{})
}

// info is the build for Status.
func (j *detachedBuild) info() *dispatchv1.DetachedBuild {
	j.mu.Lock()
	defer j.mu.Unlock()
	drvs := j.request.GetDerivations()
	i := &dispatchv1.DetachedBuild{
		Id:          j.id,
		Derivations: drvs[:min(len(drvs), 100)],
		User:        originOf(j.caller, nil).String(),
		Since:       timestamppb.New(j.since),
		Planned:     uint32(j.planned), //nolint:gosec // bounded by the message it came in
		Built:       uint32(j.built),   //nolint:gosec // no more than that
		Failed:      uint32(j.failed),  //nolint:gosec // no more than that
		Success:     j.summary.GetSuccess(),
		Error:       j.err,
	}
	if !j.ended.IsZero() {
		i.Ended = timestamppb.New(j.ended)
	}
	return i
}

// endedAt is when the build ended, zero while it goes on.
func (j *detachedBuild) endedAt() time.Time {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.ended
}

// add takes in a build, and writes it down for the next daemon.
func (s *detachedBuilds) add(j *detachedBuild) error {
	s.files.Lock()
	defer s.files.Unlock()
	j.starts = 1
	if err := s.write(j); err != nil {
		return &localError{doing: "write down the detached build", err: err}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all[j.id] = j
	return nil
}

// find returns a build; nil if there is none with that id.
func (s *detachedBuilds) find(id uint64) *detachedBuild {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all[id]
}

// list returns all, by id.
func (s *detachedBuilds) list() []*detachedBuild {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []*detachedBuild
	for _, j := range s.all {
		list = append(list, j)
	}
	slices.SortFunc(list, func(a, b *detachedBuild) int { return cmp.Compare(a.id, b.id) })
	return list
}

// end ends a build on purpose. The error is errNoSuchBuild or errNotYours.
func (s *detachedBuilds) end(id uint64, by caller) error {
	j := s.find(id)
	switch {
	case j == nil || !j.endedAt().IsZero():
		return errNoSuchBuild
	case !by.commands() && by.uid != j.caller.uid:
		return errNotYours
	}
	j.cancel(errCancelled)
	return nil
}

// prune forgets the builds that ended too long ago, or before too many others of
// their user.
func (s *detachedBuilds) prune(now time.Time) {
	ended := make(map[uint32][]*detachedBuild)
	for _, j := range s.list() {
		if !j.endedAt().IsZero() {
			ended[j.caller.uid] = append(ended[j.caller.uid], j)
		}
	}
	for _, list := range ended {
		slices.SortFunc(list, func(a, b *detachedBuild) int { return b.endedAt().Compare(a.endedAt()) })
		for n, j := range list {
			if n >= maxEndedDetached || now.Sub(j.endedAt()) > keepDetached {
				s.forget(j)
			}
		}
	}
}
