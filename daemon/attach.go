package daemon

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
)

// Attach follows a build. See the method's comment in dispatch.proto.
func (s *server) Attach(req *dispatchv1.AttachRequest, stream grpc.ServerStreamingServer[dispatchv1.BuildResponse]) error {
	c, _ := callerFrom(stream.Context())
	a := &attached{d: s.d, stream: stream}
	if j := s.d.detached.find(req.GetBuildId()); j != nil {
		if !c.mayRead(owners{j.caller.uid}) {
			return toStatus(errNotYours)
		}
		return toStatus(a.watch(stream.Context(), j))
	}
	return toStatus(a.join(stream.Context(), scheduler.BuildID(req.GetBuildId()), c, req.GetHoldRoots()))
}

// An attached is an Attach call.
type attached struct {
	d      *Daemon
	sendMu sync.Mutex
	stream grpc.ServerStreamingServer[dispatchv1.BuildResponse]
}

// send is safe for concurrent use.
func (a *attached) send(m *dispatchv1.BuildResponse) error {
	a.sendMu.Lock()
	defer a.sendMu.Unlock()
	return a.stream.Send(m)
}

func (a *attached) sendEvent(e *dispatchv1.BuildEvent) error {
	return a.send(&dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Event{Event: e}})
}

func (a *attached) sendSummary(s *dispatchv1.Summary) error {
	return a.send(&dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Summary{Summary: s}})
}

// An attachCursor is how far an attached caller has read, and in what.
type attachCursor struct {
	news            *detachedNews // what there was at the first reading; nil before that
	began, finished int
}

// An attachReading is what there is of a detached build beyond a cursor.
type attachReading struct {
	plan     *dispatchv1.Plan
	began    []begun
	finished []*dispatchv1.BuildEvent
	summary  *dispatchv1.Summary
	ended    bool
	cut      bool
	err      string
	changed  <-chan struct{}
}

// read returns what is new since c, which is moved past it.
func (j *detachedBuild) read(c *attachCursor) attachReading {
	j.mu.Lock()
	defer j.mu.Unlock()
	if c.news == nil {
		c.news = j.news
	}
	r := attachReading{
		plan: c.news.plan, summary: j.summary, ended: !j.ended.IsZero(), cut: j.cut, err: j.err, changed: j.changed,
		began:    c.news.began[c.began:],
		finished: c.news.finished[c.finished:],
	}
	c.began, c.finished = len(c.news.began), len(c.news.finished)
	return r
}

// watch tells of a detached build until it has ended. Each of its builds is followed
// at the caller's pace.
func (a *attached) watch(ctx context.Context, j *detachedBuild) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var following sync.WaitGroup
	defer following.Wait()
	ended := make(chan struct{}) // closed when there is no more news
	var once sync.Once
	defer once.Do(func() { close(ended) })
	results := make(map[string]chan *dispatchv1.BuildEvent) // by derivation followed
	var c attachCursor
	for planned := false; ; {
		r := j.read(&c)
		if !planned && r.plan != nil {
			planned = true
			if err := a.send(&dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Plan{Plan: r.plan}}); err != nil {
				return err
			}
		}
		for _, b := range r.began {
			result := make(chan *dispatchv1.BuildEvent, 1)
			results[b.drvPath] = result
			following.Go(func() {
				if err := a.follow(ctx, b, result, ended); err != nil {
					cancel(err)
				}
			})
		}
		for _, e := range r.finished {
			if result := results[e.GetDrvPath()]; result != nil {
				result <- e // there is one
			} else if err := a.sendEvent(e); err != nil {
				return err
			}
		}
		if r.ended {
			once.Do(func() { close(ended) })
			following.Wait()
			return a.conclude(r)
		}
		select {
		case <-r.changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// conclude tells how a detached build has ended.
func (a *attached) conclude(r attachReading) error {
	switch {
	case r.cut:
		return errShutdown
	case r.summary == nil:
		return fmt.Errorf("%w: %s", errEndedBadly, r.err)
	default:
		return a.sendSummary(r.summary)
	}
}

// follow tells of one of the builds, and at last the result that the detached build
// had of it. Without one, as after a cancellation, it ends with it.
func (a *attached) follow(ctx context.Context, of begun, result <-chan *dispatchv1.BuildEvent, ended <-chan struct{}) error {
	if b, done := a.d.dispatcher.read(scheduler.BuildID(of.id), ""); b != nil {
		f := &follower{b: b, leave: func(error) {}}
		_, err := f.follow(ctx, a.sendEvent, nil)
		done()
		if ctx.Err() != nil {
			return err
		}
	} else if err := a.sendKeptLog(of); err != nil {
		return err
	}
	select {
	case e := <-result:
		return a.sendEvent(e)
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-ended:
	}
	select {
	case e := <-result:
		return a.sendEvent(e)
	default:
		return nil
	}
}

// sendKeptLog tells what a build has printed that ended before the caller had come to it.
func (a *attached) sendKeptLog(of begun) error {
	c, _ := callerFrom(a.stream.Context())
	text, err := a.d.record.openLog(of.id, c)
	if err != nil {
		return nil //nolint:nilerr // the result is told in any case
	}
	defer text.Close()
	for {
		data := make([]byte, logChunk)
		n, err := text.Read(data)
		if n > 0 {
			e := &dispatchv1.BuildEvent{BuildId: of.id, DrvPath: of.drvPath}
			e.Event = &dispatchv1.BuildEvent_Log{Log: &dispatchv1.Log{Data: data[:n]}}
			if err := a.sendEvent(e); err != nil {
				return err
			}
		}
		if err != nil {
			return nil //nolint:nilerr // io.EOF, or a file that cannot be read: likewise
		}
	}
}

// join makes the caller one of those who wait for a build.
func (a *attached) join(ctx context.Context, id scheduler.BuildID, by caller, hold bool) error {
	f, err := a.d.dispatcher.joinByID(id, by)
	if err != nil {
		return err
	}
	defer f.leave(errCancelled)
	conn, err := f.b.store.open(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	outputs := f.b.drv.OutputPaths()
	var roots []nix.StorePath
	for _, p := range outputs {
		roots = append(roots, p)
	}
	if err := conn.AddTempRoots(roots); err != nil {
		return &localError{doing: "take temporary roots", err: err}
	}
	if err := f.b.provideInputs(ctx); err != nil {
		return err
	}
	o, err := f.follow(ctx, a.sendEvent, nil)
	if err != nil {
		return err
	}
	if err := a.sendEvent(finished(f.b, o)); err != nil {
		return err
	}
	sum := &dispatchv1.Summary{Success: o.status.Succeeded()}
	if !sum.Success {
		sum.Failed = []string{string(f.b.drvPath)}
		return a.sendSummary(sum)
	}
	for _, name := range f.b.drv.OutputNames() {
		sum.Outputs = append(sum.Outputs, &dispatchv1.Output{DrvPath: string(f.b.drvPath), Name: name, Path: string(outputs[name])})
	}
	if err := a.sendSummary(sum); err != nil || !hold {
		return err
	}
	a.d.holdRoots(ctx)
	return nil
}

// provideInputs says what the build's inputs are if nobody has yet: who was to say it
// may leave.
func (b *build) provideInputs(ctx context.Context) error {
	select {
	case <-b.inputs.ready:
		return nil
	default:
	}
	paths, err := b.store.inputClosure(ctx, b.drv)
	if err != nil {
		return err
	}
	b.inputs.provide(paths)
	return nil
}

// holdRoots waits until the caller ends the call, or has had long enough.
func (d *Daemon) holdRoots(ctx context.Context) {
	timer := time.NewTimer(rootsHeld)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-d.life.Done():
	}
}

// joinByID makes a caller follow a build in flight.
func (q *dispatcher) joinByID(id scheduler.BuildID, by caller) (*follower, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	b := q.findLocked(id)
	switch {
	case b == nil || q.shared[b.key()] != b: // it is about to end
		return nil, errNoSuchBuild
	case !by.mayRead(b.owners):
		return nil, errNotYours
	}
	f := new(follower)
	q.joinLocked(f, b, by) // root may look at a build without making it everybody's
	return f, nil
}
