package daemon

import (
	"context"
	"errors"
	"time"

	"nixdispatch/daemon/usage"
	"nixdispatch/proto/nix"
)

// A goal is one derivation of a realisation that has to be built.
type goal struct {
	r       *realisation
	drvPath nix.StorePath
	drv     *nix.Derivation
	users   []*goal
	// chain is how many goals wait for it in the longest chain.
	chain int

	// The realisation's mutex guards the rest.

	pending int // inputs yet to be built
}

// link tells the goals of each other.
func (r *realisation) link() {
	for _, g := range r.goals {
		for input := range g.drv.InputDrvs {
			if i := r.goals[input]; i != nil {
				g.pending++
				i.users = append(i.users, g)
			}
		}
	}
	r.measureChains()
}

// measureChains works out every goal's chain, from those that none waits for down.
func (r *realisation) measureChains() {
	waiting := make(map[*goal]int, len(r.goals)) // users yet to be looked at
	var next []*goal
	for _, g := range r.goals {
		if waiting[g] = len(g.users); waiting[g] == 0 {
			next = append(next, g)
		}
	}
	for len(next) > 0 {
		g := next[len(next)-1]
		next = next[:len(next)-1]
		for input := range g.drv.InputDrvs {
			if i := r.goals[input]; i != nil {
				i.chain = max(i.chain, g.chain+1)
				if waiting[i]--; waiting[i] == 0 {
					next = append(next, i)
				}
			}
		}
	}
}

// start begins with the goals that wait for no other.
func (r *realisation) start(ctx context.Context) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, g := range r.goals {
		if g.pending == 0 {
			r.work.Go(func() { g.run(ctx) })
		}
	}
}

// run builds the derivation and then those that only waited for it.
func (g *goal) run(ctx context.Context) {
	r := g.r
	// What is in progress of a graph that is larger than the bound goes on, and makes room.
	use, err := r.d.usage.Wait(ctx, originOf(r.caller, nil).user(), usage.Builds)
	if err != nil {
		return // the realisation ends
	}
	defer use.Release()
	b, f, o, err := g.begin(ctx)
	if f != nil {
		f.b.feed.awaitNews(ctx) // thousands may wait: here, where each needs little stack
		o, err = f.follow(ctx, r.sendEvent, nil)
		f.leave(errCancelled)
		if f.last { // the call reports its end when nothing of it is in progress
			f.b.feed.awaitEnd(context.WithoutCancel(ctx))
		}
		b = f.b
	}
	ok := g.ended(ctx, b, o, err)
	r.mu.Lock()
	defer r.mu.Unlock()
	if !ok {
		r.failed = append(r.failed, string(g.drvPath))
		if !r.keepGoing {
			r.cancel(errFirstFailure)
		}
		return
	}
	for _, user := range g.users {
		if user.pending--; user.pending == 0 && ctx.Err() == nil {
			r.work.Go(func() { user.run(ctx) })
		}
	}
}

// errFirstFailure ends a realisation that does not keep going.
var errFirstFailure = errors.New("another derivation failed")

// ended tells the caller how the build that was followed has ended. One that was cut
// off by the end of the realisation has not failed.
func (g *goal) ended(ctx context.Context, b *build, o outcome, err error) (ok bool) {
	if err != nil {
		if errors.Is(err, errShutdown) {
			g.r.cancel(err)
		}
		if ctx.Err() != nil {
			return true
		}
		o = outcomeOf(err)
	}
	// The stream's end ends the context, too.
	_ = g.r.sendEvent(finished(b, o))
	return o.status.Succeeded()
}

// begin has the derivation built and returns a follower of its build, which may be
// one that another caller had begun. Without a follower it has been built already, by
// the local Nix, or could not be.
func (g *goal) begin(ctx context.Context) (*build, *follower, outcome, error) {
	b := g.r.d.newBuild(g.r.store, g.drvPath, g.drv, g.r.substitute, g.r.caller)
	b.lease, b.asked, b.chain = g.r.lease, g.r.since, g.chain
	b.wantedFor(originOf(g.r.caller, nil), g.r.priority)
	if err := g.awaitInputs(ctx); err != nil {
		return b, nil, outcome{}, err
	}
	if here, why := g.local(b); here {
		o, err := g.buildLocally(ctx, b)
		if err == nil && !o.status.Succeeded() && why != "" {
			o.err += "\n" + why
		}
		return b, nil, o, err
	}
	inputs, err := g.inputs(ctx)
	if err != nil {
		return b, nil, outcome{}, err
	}
	f, err := g.r.d.submit(b, g.r.limits, inputs)
	return b, f, outcome{}, err
}

// inputPoll is how often a derivation looks whether its inputs have come while the
// local Nix substitutes, which tells only when all is done.
const inputPoll = time.Second

// awaitInputs waits for what the local Nix substitutes for the derivation. It ends
// with the substitution: what has not come by then does not come.
func (g *goal) awaitInputs(ctx context.Context) error {
	for {
		select {
		case <-g.r.substituted:
			return nil
		default:
		}
		there, err := g.inputsThere(ctx)
		if there || err != nil {
			return err
		}
		select {
		case <-g.r.substituted:
		case <-time.After(inputPoll):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// inputsThere tells whether all inputs are valid. What they refer to is so with
// them.
func (g *goal) inputsThere(ctx context.Context) (bool, error) {
	r := g.r
	for input := range g.drv.InputDrvs {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		drv, err := r.store.derivation(input)
		if err != nil || !drv.AllOutputsKnown() {
			return false, err // the store may learn its paths yet
		}
	}
	r.rootsMu.Lock()
	defer r.rootsMu.Unlock()
	roots, err := inputRoots(g.drv, func(p nix.StorePath) (map[string]nix.StorePath, error) { return r.outputsLocked(ctx, p) })
	if err != nil {
		return false, err
	}
	lacking, err := r.conn.invalid(roots)
	return len(lacking) == 0, err
}

// local tells whether the derivation is left to the local Nix: because no
// machine could ever build it, which why explains, because its outputs' paths are
// not known beforehand, or because moving its inputs would cost more than building it.
func (g *goal) local(b *build) (here bool, why string) {
	features := g.drv.RequiredSystemFeatures()
	switch {
	case !g.drv.AllOutputsKnown(), g.drv.Platform == "builtin":
		return true, ""
	case g.drv.PreferLocalBuild() && g.drv.Platform == nixSystem() && len(features) == 0:
		return true, ""
	}
	if g.r.d.dispatcher.possible(b.request()) {
		return false, ""
	}
	g.r.d.metrics.leftUnplaceable(g.drv)
	return true, g.r.d.dispatcher.explain(b.request()).Text(maxExplained)
}

// buildLocally asks the local Nix, which may have other ways to build it.
func (g *goal) buildLocally(ctx context.Context, b *build) (outcome, error) {
	select {
	case g.r.localSlots <- struct{}{}:
		defer func() { <-g.r.localSlots }()
	case <-ctx.Done():
		return outcome{}, context.Cause(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	b.postPlaced(placement{why: "left to the local Nix"})
	b.feed.startBuilding(b.since)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b.feed.finish(g.askLocalNix(ctx, b))
	}()
	defer func() {
		cancel(nil)
		<-ended
		b.feed.log.close()
	}()
	f := &follower{b: b, limits: g.r.limits, leave: cancel}
	return f.follow(ctx, g.r.sendEvent, nil)
}

func (g *goal) askLocalNix(ctx context.Context, b *build) outcome {
	g.r.d.localWork.Add(1)
	defer g.r.d.localWork.Add(-1)
	conn, err := g.r.store.connect(ctx, &workerLog{log: b.feed})
	if err != nil {
		return outcomeOf(err)
	}
	defer conn.Close()
	defer g.r.d.leftLocal.add(b.drvKey())()
	result, err := buildAll(conn.Client, g.drvPath)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return outcomeOf(cause)
	}
	if err != nil {
		return outcomeOf(&localError{doing: "build", err: err})
	}
	return outcome{status: buildStatus(result.Status), err: result.ErrorMsg}
}

// inputs is the closure of what the derivation needs, all of it valid by now.
func (g *goal) inputs(ctx context.Context) ([]nix.StorePath, error) {
	r := g.r
	r.rootsMu.Lock()
	defer r.rootsMu.Unlock()
	roots, err := inputRoots(g.drv, func(p nix.StorePath) (map[string]nix.StorePath, error) { return r.outputsLocked(ctx, p) })
	if err != nil {
		return nil, err
	}
	infos, err := r.conn.closure(r.known, roots)
	if err != nil {
		return nil, errors.Join(err, r.substitution)
	}
	return pathsOf(infos), nil
}

// outputsLocked are the paths of a derivation's outputs.
func (r *realisation) outputsLocked(ctx context.Context, drvPath nix.StorePath) (map[string]nix.StorePath, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if known, ok := r.outputs[drvPath]; ok {
		return known, nil
	}
	drv, err := r.store.derivation(drvPath)
	if err != nil {
		return nil, err
	}
	paths := drv.OutputPaths()
	if !drv.AllOutputsKnown() {
		// Built or found valid before this: the store knows by now.
		if paths, err = r.conn.QueryDerivationOutputMap(drvPath); err != nil {
			return nil, &localError{doing: "ask for outputs", err: err}
		}
	}
	r.outputs[drvPath] = paths
	return paths, nil
}
