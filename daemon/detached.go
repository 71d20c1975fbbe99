package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
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
	// maxFailures bounds how many failures are kept with their messages, and maxFailed of
	// how many the names are.
	maxFailures, maxFailed = 20, 1000
	// maxDetachedSize bounds what is kept of one: its request, and the outputs that its
	// summary will name. That is 15,000 derivations or more.
	maxDetachedSize = 4 << 20
	// maxDetachedSizes bounds the same of all of a user's that are in progress, and apart
	// from these of all that have ended.
	maxDetachedSizes = 4 * maxDetachedSize
	// maxInfoDerivations is how many of its derivations Status names, and are kept once
	// it has ended.
	maxInfoDerivations = 100
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
	bytes   *usage.Use // likewise

	ctx    context.Context //nolint:containedctx // it is nobody's call
	cancel context.CancelCauseFunc

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each change below
	news    *detachedNews
	planned int
	built   int
	failed  int
	summary *dispatchv1.Summary
	ended   time.Time // zero while it goes on
	err     string
	cut     bool // ended by the daemon's own end: the next one goes on with it
}

// detachedNews is what callers who attach are told. Once the build has ended, its owner
// keeps less than was told while it went on, in a second one: callers who had attached
// before go on reading the first, however slowly. Guarded by the mu of its build.
type detachedNews struct {
	plan     *dispatchv1.Plan         // nil once the build has ended
	began    []begun                  // builds followed, in order; none once it has ended
	seen     map[string]bool          // the derivations of these
	finished []*dispatchv1.BuildEvent // once the build has ended, only the first failures
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
		changed: make(chan struct{}), news: &detachedNews{seen: make(map[string]bool)},
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
	req = keptRequest(req)
	if n := proto.Size(req); n > maxDetachedSize {
		return tooLargeToDetach(n)
	}
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

// keptRequest is what a detached build needs of its request, and nothing else.
func keptRequest(req *dispatchv1.BuildRequest) *dispatchv1.BuildRequest {
	kept := &dispatchv1.BuildRequest{
		Derivations:            unique(req.GetDerivations()),
		Limits:                 limitsFrom(req.GetLimits()).proto(),
		BuildersUseSubstitutes: req.GetBuildersUseSubstitutes(),
		KeepGoing:              req.GetKeepGoing(),
		Store:                  req.GetStore(),
		Priority:               req.GetPriority(),
	}
	vars := storeVariables(req.GetEnvironment())
	for _, name := range slices.Sorted(maps.Keys(vars)) {
		kept.Environment = append(kept.Environment, name+"="+vars[name])
	}
	return kept
}

// unique is the list without repetitions.
func unique(list []string) []string {
	seen := make(map[string]bool, len(list))
	var kept []string
	for _, s := range list {
		if !seen[s] {
			seen[s] = true
			kept = append(kept, s)
		}
	}
	return kept
}

func tooLargeToDetach(n int) error {
	return fmt.Errorf("%w: a detached build may have %d bytes of derivations and outputs, and this has %d; ask for fewer derivations at once, or one that needs them all",
		errBadRequest, maxDetachedSize, n)
}

// takeBytes counts what will be kept of the build and its summary for its user.
func (d *Daemon) takeBytes(j *detachedBuild, targets []target) (err error) {
	n := proto.Size(j.request)
	for _, t := range targets {
		n += t.size
	}
	if n > maxDetachedSize {
		return tooLargeToDetach(n)
	}
	j.bytes, err = d.usage.Take(j.caller.user(), usage.DetachedBytes, int64(n))
	return err
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
		if err = d.takeBytes(j, targets); err != nil {
			r.lease.release()
		}
	}
	if err == nil {
		r.keep = func(outputs []*dispatchv1.Output) error { return d.detached.keepOutputs(j, r.conn, outputs) }
		err = r.run(j.ctx, targets)
		r.lease.release()
	}
	// Before it is told, so that who waited for it can detach another.
	j.use.Release()
	j.bytes.Release()
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
		j.news.plan, j.planned = m.GetPlan(), len(m.GetPlan().GetWillBuild())
	case m.GetSummary() != nil:
		j.summary = m.GetSummary()
	case e.GetFinished() != nil:
		j.news.finished = append(j.news.finished, e)
		if e.GetFinished().GetStatus().Succeeded() {
			j.built++
		} else {
			j.failed++
		}
	case e.GetBuildId() != 0 && !j.news.seen[e.GetDrvPath()]:
		j.news.seen[e.GetDrvPath()] = true
		j.news.began = append(j.news.began, begun{e.GetBuildId(), e.GetDrvPath()})
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
		j.err = clipped(err.Error())
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

// forgetDetails frees what only serves to follow a build. Who follows it keeps that until
// they have read it.
func (j *detachedBuild) forgetDetails() {
	j.mu.Lock()
	defer j.mu.Unlock()
	failures := slices.DeleteFunc(slices.Clone(j.news.finished), func(e *dispatchv1.BuildEvent) bool {
		return e.GetFinished().GetStatus().Succeeded()
	})
	kept := new(detachedNews)
	for _, e := range failures[:min(len(failures), maxFailures)] {
		e = proto.CloneOf(e) // others may be reading it
		e.GetFinished().Error = clipped(e.GetFinished().GetError())
		kept.finished = append(kept.finished, e)
	}
	j.news = kept
	if drvs := j.request.GetDerivations(); len(drvs) > maxInfoDerivations {
		j.request = proto.CloneOf(j.request)
		j.request.Derivations = slices.Clone(drvs[:maxInfoDerivations])
	}
	if failed := j.summary.GetFailed(); len(failed) > maxFailed {
		j.summary = proto.CloneOf(j.summary)
		j.summary.Failed = failed[:maxFailed]
	}
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
		Derivations: drvs[:min(len(drvs), maxInfoDerivations)],
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

// size is how many bytes there are of what is kept once the build has ended.
func (j *detachedBuild) size() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	n := proto.Size(j.request) + proto.Size(j.summary)
	for _, e := range j.news.finished {
		n += proto.Size(e)
	}
	return n
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
// their user, or too large ones.
func (s *detachedBuilds) prune(now time.Time) {
	ended := make(map[uint32][]*detachedBuild)
	for _, j := range s.list() {
		if !j.endedAt().IsZero() {
			ended[j.caller.uid] = append(ended[j.caller.uid], j)
		}
	}
	for _, list := range ended {
		slices.SortFunc(list, func(a, b *detachedBuild) int { return b.endedAt().Compare(a.endedAt()) })
		bytes := 0
		for n, j := range list {
			bytes += j.size()
			if n >= maxEndedDetached || n > 0 && bytes > maxDetachedSizes || now.Sub(j.endedAt()) > keepDetached {
				s.forget(j)
			}
		}
	}
}
