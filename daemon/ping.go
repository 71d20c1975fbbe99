package daemon

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"nixdispatch/daemon/usage"
	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// pingLimit bounds a ping, all steps together.
const pingLimit = 5 * time.Minute

// Ping tries to connect to a machine of the list, and tells of each step.
func (s *server) Ping(req *dispatchv1.PingRequest, stream dispatchv1.DispatchService_PingServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), pingLimit)
	defer cancel()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer context.AfterFunc(s.d.life, func() { end(errShutdown) })()
	ways, err := s.d.ways(req.GetMachine())
	if err != nil {
		return toStatus(err)
	}
	c, _ := callerFrom(ctx)
	use, err := s.d.usage.Wait(ctx, c.user(), usage.Pings)
	if err != nil {
		return toStatus(fmt.Errorf("wait for the user's other pings to end: %w", err))
	}
	defer use.Release()
	opts := ProbeOptions{Timeout: max(req.GetTimeout().AsDuration(), 0), Claims: req.GetClaims(), Logger: s.d.log}
	var broken error
	report := func(step ProbeStep) {
		if broken == nil {
			broken = stream.Send(step.proto())
		}
	}
	for _, lines := range ways {
		if why := unsupported(lines[0]); why != "" {
			report(ProbeStep{Name: stepMachine, Verdict: ProbeWarning, Detail: why, Cause: "unsupported",
				Fix: "nothing: Nix's own hook serves it"})
			continue
		}
		m := newMachine(lines[0], s.d.checkedStore(), s.d.log)
		ssh := s.d.ssh
		ssh.OnChange = nil
		probeMachine(ctx, m, lines, ssh, opts, report)
	}
	if err := context.Cause(ctx); err != nil {
		return toStatus(err)
	}
	return broken
}

// ways are the lines of the list for a machine, those together that lead there in
// the same way.
func (d *Daemon) ways(name string) ([][]nix.Machine, error) {
	for _, line := range d.machines.current().others {
		if line.StoreURI == name {
			return [][]nix.Machine{{line}}, nil
		}
	}
	uri, err := d.machines.named(name)
	if err != nil {
		return nil, err
	}
	var used []*machine
	var ways [][]nix.Machine
	for _, e := range d.machines.at(withURI(uri)) {
		i := slices.Index(used, e.m)
		if i < 0 {
			i, used, ways = len(used), append(used, e.m), append(ways, nil)
		}
		ways[i] = append(ways[i], e.line)
	}
	if len(ways) == 0 {
		return nil, fmt.Errorf("%w: %q is drained, and listed no more", errNoSuchMachine, uri)
	}
	return ways, nil
}

// proto is the step for the API.
func (s ProbeStep) proto() *dispatchv1.PingResponse {
	return &dispatchv1.PingResponse{
		Step: s.Name, Verdict: pingVerdicts[s.Verdict], Took: durationpb.New(s.Took),
		Detail: s.Detail, Cause: s.Cause, Fix: s.Fix,
	}
}

var pingVerdicts = map[ProbeVerdict]dispatchv1.PingVerdict{
	ProbeOK:      dispatchv1.PingVerdict_PING_VERDICT_OK,
	ProbeWarning: dispatchv1.PingVerdict_PING_VERDICT_WARNING,
	ProbeFailed:  dispatchv1.PingVerdict_PING_VERDICT_FAILED,
}
