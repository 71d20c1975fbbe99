package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/worker"
)

// A realisation is one Build call: derivations, and whatever of their input
// derivations has no valid outputs yet, built in the order of their dependence.
type realisation struct {
	d          *Daemon
	caller     caller
	since      time.Time
	limits     limits
	substitute bool
	keepGoing  bool
	priority   int
	store      *localStore
	lease      *lease // on the list of machines to build on

	sendMu sync.Mutex
	tell   func(*dispatchv1.BuildResponse) error
	// keep is called with the outputs wanted that are there, before the temporary
	// roots go; nil for nothing to be done.
	keep func([]*dispatchv1.Output) error

	// rootsMu guards conn, whose temporary roots keep everything concerned from
	// the garbage collector until the call ends, and what was asked over it.
	rootsMu sync.Mutex
	conn    *localConn
	known   map[nix.StorePath]nix.PathInfo
	outputs map[nix.StorePath]map[string]nix.StorePath // by derivation

	// substituted is closed when all that can be substituted has been;
	// substitution is then why some of it could not.
	substituted  chan struct{}
	substitution error
	localSlots   chan struct{}

	mu     sync.Mutex // guards the goals' states and failed
	goals  map[nix.StorePath]*goal
	failed []string
	work   sync.WaitGroup
	cancel context.CancelCauseFunc
}

// A target is a derivation asked for and the outputs wanted of it, in order.
type target struct {
	drvPath nix.StorePath
	outputs []string // empty: all
	size    int      // at most, of what a Summary says of them, in bytes
}

// String is the target in the worker protocol's form.
func (t target) String() string {
	if len(t.outputs) == 0 {
		return string(t.drvPath) + "!*"
	}
	return string(t.drvPath) + "!" + strings.Join(t.outputs, ",")
}

// Build realises derivations. See the method's comment in dispatch.proto.
func (s *server) Build(req *dispatchv1.BuildRequest, stream grpc.ServerStreamingServer[dispatchv1.BuildResponse]) error {
	if !s.d.beginRealising() {
		return toStatus(errShutdown)
	}
	defer s.d.realising.Done()
	c, _ := callerFrom(stream.Context())
	if req.GetDetach() {
		return toStatus(s.d.detach(req, c, stream.Send))
	}
	ctx, cancel := s.d.whileAlive(stream.Context())
	defer cancel()
	r, targets, err := s.d.newRealisation(ctx, req, c, stream.Send)
	if err != nil {
		return toStatus(err)
	}
	defer r.lease.release()
	if req.GetHoldRoots() {
		r.keep = func([]*dispatchv1.Output) error {
			s.d.holdRoots(stream.Context())
			return nil
		}
	}
	return toStatus(r.run(ctx, targets))
}

// newRealisation makes one of a request. The caller must release its lease.
func (d *Daemon) newRealisation(ctx context.Context, req *dispatchv1.BuildRequest, c caller, tell func(*dispatchv1.BuildResponse) error) (*realisation, []target, error) {
	store, err := d.stores.find(req.GetStore(), req.GetEnvironment())
	if err != nil {
		return nil, nil, err
	}
	reader := d.derivationReader(store, c)
	defer reader.use.Release() // nothing that is read here is kept
	targets, err := store.parseTargets(ctx, req.GetDerivations(), reader.read)
	if err != nil {
		return nil, nil, err
	}
	priority, err := c.priority(req.GetPriority())
	if err != nil {
		return nil, nil, err
	}
	machines, err := d.leaseFor(req, c)
	if err != nil {
		return nil, nil, err
	}
	return &realisation{
		d: d, caller: c, since: time.Now(), tell: tell, store: store, lease: machines,
		limits:      limitsFrom(req.GetLimits()),
		substitute:  req.GetBuildersUseSubstitutes(),
		keepGoing:   req.GetKeepGoing(),
		priority:    priority,
		known:       make(map[nix.StorePath]nix.PathInfo),
		outputs:     make(map[nix.StorePath]map[string]nix.StorePath),
		goals:       make(map[nix.StorePath]*goal),
		substituted: make(chan struct{}),
		localSlots:  make(chan struct{}, runtime.NumCPU()),
	}, targets, nil
}

// leaseFor returns the list that a request goes by.
func (d *Daemon) leaseFor(req *dispatchv1.BuildRequest, by caller) (*lease, error) {
	if req.Builders == nil {
		return &lease{list: d.machines.current()}, nil
	}
	return d.lease(req.GetBuilders(), by)
}

// parseTarget reads "DRVPATH" or "DRVPATH!OUTPUT,...", and opens nothing.
func parseTarget(text string) (target, error) {
	name, outputs, some := strings.Cut(text, "!")
	p, err := nix.ParseStorePath(name)
	if err != nil {
		return target{}, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	if !p.IsDerivation() {
		return target{}, fmt.Errorf("%w: %s is not a derivation", errBadRequest, p)
	}
	t := target{drvPath: p}
	if some && outputs != "*" {
		t.outputs = strings.Split(outputs, ",")
	}
	return t, nil
}

// parseTargets checks what a caller asks for. A derivation that is named several times is
// one target. read is called once for each.
func (s *localStore) parseTargets(ctx context.Context, texts []string, read func(nix.StorePath) (*nix.Derivation, error)) ([]target, error) {
	targets, err := mergeTargets(ctx, texts)
	if err != nil {
		return nil, err
	}
	drvs := make([]nix.StorePath, len(targets))
	for n, t := range targets {
		drvs[n] = t.drvPath
	}
	if err := s.checkValid(ctx, drvs...); err != nil {
		return nil, requestFault(err)
	}
	for n := range targets {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		t := &targets[n]
		drv, err := read(t.drvPath)
		if err != nil {
			return nil, requestFault(err)
		}
		if err := t.checkOutputs(drv); err != nil {
			return nil, err
		}
		t.size = t.summarySize(drv)
	}
	return targets, nil
}

// mergeTargets reads targets, and opens nothing. Those of one derivation become one, where
// the first of them is.
func mergeTargets(ctx context.Context, texts []string) ([]target, error) {
	if len(texts) == 0 {
		return nil, fmt.Errorf("%w: no derivation given", errBadRequest)
	}
	var targets []target
	at := make(map[nix.StorePath]int)
	for _, text := range unique(texts) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		t, err := parseTarget(text)
		if err != nil {
			return nil, err
		}
		n, known := at[t.drvPath]
		if !known {
			at[t.drvPath] = len(targets)
			targets = append(targets, t)
			continue
		}
		if first := &targets[n]; len(first.outputs) > 0 && len(t.outputs) > 0 {
			first.outputs = append(first.outputs, t.outputs...)
		} else {
			first.outputs = nil // all of them
		}
	}
	for n := range targets {
		targets[n].outputs = unique(targets[n].outputs)
	}
	return targets, nil
}

// summarySize is how much a Summary says of the target, at most, in bytes.
func (t target) summarySize(drv *nix.Derivation) int {
	names := t.outputs
	if len(names) == 0 {
		names = drv.OutputNames()
	}
	const paths = 2 * 256 // the derivation's and the output's, with what is between them
	n := 0
	for _, name := range names {
		n += paths + len(name)
	}
	return n
}

// readTarget reads a derivation that a caller named.
func (s *localStore) readTarget(ctx context.Context, t target) (*nix.Derivation, error) {
	if err := s.checkValid(ctx, t.drvPath); err != nil {
		return nil, err
	}
	drv, err := s.derivation(t.drvPath)
	if err != nil {
		return nil, err
	}
	return drv, t.checkOutputs(drv)
}

// checkOutputs refuses outputs that the derivation does not have.
func (t target) checkOutputs(drv *nix.Derivation) error {
	for _, o := range t.outputs {
		if _, ok := drv.Outputs[o]; !ok {
			return fmt.Errorf("%w: derivation %s has no output %q, only %s",
				errBadRequest, t.drvPath, o, strings.Join(drv.OutputNames(), ", "))
		}
	}
	return nil
}

// requestFault blames the request for a derivation that is not one of this store
// or cannot be parsed.
func requestFault(err error) error {
	if _, local := errors.AsType[*localError](err); local || errors.Is(err, errNotInStore) || errors.Is(err, errBadRequest) || errors.Is(err, context.Canceled) || isBound(err) {
		return err
	}
	return fmt.Errorf("%w: %w", errBadRequest, err)
}

// run plans, builds and sums up.
func (r *realisation) run(ctx context.Context, targets []target) error {
	var err error
	if r.conn, err = r.store.open(ctx); err != nil {
		return err
	}
	defer r.conn.Close()
	reader := r.d.derivationReader(r.store, r.caller)
	defer reader.use.Release()
	missing, err := r.plan(ctx, reader, targets)
	if err != nil {
		return contextCause(ctx, err)
	}
	calling := ctx
	ctx, r.cancel = context.WithCancelCause(ctx)
	defer r.cancel(nil)
	r.work.Go(func() { r.substituteAll(ctx, missing.WillSubstitute) })
	r.start(ctx)
	r.work.Wait()
	if err := context.Cause(ctx); err != nil && (len(r.failed) == 0 || errors.Is(err, errShutdown)) {
		return err
	}
	outputs, err := r.sum(calling, targets)
	if err != nil || r.keep == nil {
		return err
	}
	return r.keep(outputs)
}

// rootsHeld bounds how long a caller may take to make roots of its own.
const rootsHeld = 10 * time.Minute

// plan asks the local store what there is to do, keeps all of it from the
// garbage collector, and makes a goal of each derivation to be built.
func (r *realisation) plan(ctx context.Context, reader *derivationReader, targets []target) (worker.Missing, error) {
	var names []string
	var drvs []nix.StorePath
	for _, t := range targets {
		names = append(names, t.String())
		drvs = append(drvs, t.drvPath)
	}
	if err := r.conn.AddTempRoots(drvs); err != nil {
		return worker.Missing{}, &localError{doing: "take temporary roots", err: err}
	}
	invalid, err := r.conn.invalid(drvs)
	if err != nil {
		return worker.Missing{}, err
	}
	if len(invalid) > 0 {
		return worker.Missing{}, fmt.Errorf("derivation %s %w", invalid[0], errNotInStore)
	}
	missing, err := r.conn.QueryMissing(names)
	if err != nil {
		return missing, &localError{doing: "ask what is missing", err: err}
	}
	roots := slices.Concat(missing.WillBuild, missing.WillSubstitute)
	for _, p := range missing.WillBuild {
		if ctx.Err() != nil {
			return missing, context.Cause(ctx)
		}
		drv, err := reader.read(p)
		if err != nil {
			return missing, err
		}
		r.goals[p] = &goal{r: r, drvPath: p, drv: drv}
		for _, o := range drv.OutputPaths() {
			roots = append(roots, o)
		}
	}
	inputs, err := r.validInputs(ctx)
	if err != nil {
		return missing, err
	}
	if err := r.conn.AddTempRoots(slices.Concat(roots, inputs)); err != nil {
		return missing, &localError{doing: "take temporary roots", err: err}
	}
	r.link()
	return missing, r.send(&dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Plan{Plan: &dispatchv1.Plan{
		WillBuild: pathNames(missing.WillBuild), WillSubstitute: pathNames(missing.WillSubstitute),
	}}})
}

// validInputs are the goals' inputs that are no goal's outputs, without their
// closure: what a rooted path refers to is safe with it.
func (r *realisation) validInputs(ctx context.Context) ([]nix.StorePath, error) {
	r.rootsMu.Lock()
	defer r.rootsMu.Unlock()
	// The goals are valid, or Nix would not build them.
	others := make(map[nix.StorePath]bool)
	for _, g := range r.goals {
		for input := range g.drv.InputDrvs {
			if r.goals[input] == nil {
				others[input] = true
			}
		}
	}
	if err := r.conn.checkValid(slices.Collect(maps.Keys(others))...); err != nil {
		return nil, err
	}
	var paths []nix.StorePath
	for _, g := range r.goals {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		paths = append(paths, g.drv.InputSrcs...)
		for input, names := range g.drv.InputDrvs {
			if r.goals[input] != nil {
				continue
			}
			outputs, err := r.outputsLocked(ctx, input)
			if err != nil {
				return nil, err
			}
			for _, name := range names {
				if outputs[name] != "" {
					paths = append(paths, outputs[name])
				}
			}
		}
	}
	return paths, nil
}

// substituteAll has the local Nix fetch what it can. What cannot be had is
// missed, and named, by the derivations that need it.
func (r *realisation) substituteAll(ctx context.Context, paths []nix.StorePath) {
	defer close(r.substituted)
	if len(paths) == 0 {
		return
	}
	r.d.localWork.Add(1)
	defer r.d.localWork.Add(-1)
	conn, err := r.store.open(ctx)
	if err != nil {
		r.substitution = err
		return
	}
	defer conn.Close()
	results, err := conn.BuildPathsWithResults(pathNames(paths))
	if err != nil {
		r.substitution = &localError{doing: "substitute", err: contextCause(ctx, err)}
	}
	for _, result := range results {
		if !result.Status.Success() {
			r.substitution = &localError{doing: "substitute", err: errors.New(nix.PlainText(result.ErrorMsg))}
		}
	}
}

// send is safe for concurrent use.
func (r *realisation) send(m *dispatchv1.BuildResponse) error {
	r.sendMu.Lock()
	defer r.sendMu.Unlock()
	return r.tell(m)
}

func (r *realisation) sendEvent(e *dispatchv1.BuildEvent) error {
	return r.send(&dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Event{Event: e}})
}

// sum says how it all ended, by what is valid now, and returns the outputs.
func (r *realisation) sum(ctx context.Context, targets []target) ([]*dispatchv1.Output, error) {
	sum := &dispatchv1.Summary{Success: len(r.failed) == 0, Failed: r.failed}
	for _, t := range targets {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		paths, err := r.conn.QueryDerivationOutputMap(t.drvPath)
		if err != nil {
			return nil, &localError{doing: "ask for outputs", err: err}
		}
		drv, err := r.store.derivation(t.drvPath)
		if err != nil {
			return nil, err
		}
		names := t.outputs
		if len(names) == 0 {
			names = drv.OutputNames()
		}
		for _, name := range names {
			valid := paths[name] != ""
			if valid {
				if valid, err = r.conn.IsValidPath(paths[name]); err != nil {
					return nil, &localError{doing: "check outputs", err: err}
				}
			}
			if !valid {
				sum.Success = false
				continue
			}
			sum.Outputs = append(sum.Outputs, &dispatchv1.Output{
				DrvPath: string(t.drvPath), Name: name, Path: string(paths[name])})
		}
	}
	return sum.Outputs, r.send(&dispatchv1.BuildResponse{Message: &dispatchv1.BuildResponse_Summary{Summary: sum}})
}

func pathNames(paths []nix.StorePath) []string {
	names := make([]string, len(paths))
	for n, p := range paths {
		names[n] = string(p)
	}
	return names
}
