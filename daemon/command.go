package daemon

import (
	"context"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
)

// Drain has a machine take no new builds.
func (s *server) Drain(ctx context.Context, req *dispatchv1.DrainRequest) (*dispatchv1.DrainResponse, error) {
	uri, err := s.setDrained(ctx, req.GetMachine(), true)
	if err != nil {
		return nil, toStatus(err)
	}
	r := &dispatchv1.DrainResponse{Machine: uri}
	for _, m := range s.d.dispatcher.machines() {
		if m.ID.URI() == uri {
			r.Builds += uint32(m.Placed + m.Held) //nolint:gosec // bounded by the scheduler
		}
	}
	return r, nil
}

// Undrain ends what Drain began.
func (s *server) Undrain(ctx context.Context, req *dispatchv1.UndrainRequest) (*dispatchv1.UndrainResponse, error) {
	uri, err := s.setDrained(ctx, req.GetMachine(), false)
	if err != nil {
		return nil, toStatus(err)
	}
	return &dispatchv1.UndrainResponse{Machine: uri}, nil
}

func (s *server) setDrained(ctx context.Context, name string, drained bool) (string, error) {
	c, ok := callerFrom(ctx)
	if !ok || !c.commands() {
		return "", errNotAllowed
	}
	return s.d.setDrained(name, drained, c)
}

// Reload reads the builders setting anew.
func (s *server) Reload(ctx context.Context, _ *dispatchv1.ReloadRequest) (*dispatchv1.ReloadResponse, error) {
	c, ok := callerFrom(ctx)
	if !ok || !c.commands() {
		return nil, toStatus(errNotAllowed)
	}
	result, err := s.d.reloadNow("asked to by " + c.String())
	if err != nil {
		return nil, toStatus(err)
	}
	s.d.retire() // a machine that is listed no more is nowhere when the call returns
	return &dispatchv1.ReloadResponse{
		Errors:   result.list.badEntries(),
		Machines: uint32(len(s.d.machines.current().all)), //nolint:gosec // the parser bounds it
	}, nil
}
