package daemon

import (
	"context"
	"fmt"
	"strings"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
)

// Explain tells where a build can go, and why not elsewhere.
func (s *server) Explain(ctx context.Context, req *dispatchv1.ExplainRequest) (*dispatchv1.ExplainResponse, error) {
	ctx, cancel := s.d.whileAlive(ctx)
	defer cancel()
	r := scheduler.Request{System: req.GetSystem(), Features: req.GetFeatures()}
	var drv *nix.Derivation
	var asked drvKey
	switch {
	case req.GetDrvPath() != "":
		store, err := s.d.stores.find(req.GetStore(), req.GetEnvironment())
		if err != nil {
			return nil, toStatus(err)
		}
		t, err := parseTarget(req.GetDrvPath())
		if err != nil {
			return nil, toStatus(err)
		}
		asked = drvKey{store.key, t.drvPath}
		if drv, err = store.readTarget(ctx, t); err != nil {
			return nil, toStatus(requestFault(err))
		}
		r.System, r.Features = drv.Platform, drv.RequiredSystemFeatures()
	case r.System == "":
		return nil, toStatus(fmt.Errorf("%w: neither a derivation nor a system is given", errBadRequest))
	}
	id, e := s.d.dispatcher.explainDrv(asked, r)
	out := explanation(e)
	out.BuildId = uint64(id)
	out.Text = e.Text(0)
	for _, line := range s.d.machines.current().others {
		v := &dispatchv1.Verdict{
			Machine: line.StoreURI, Text: unsupported(line),
			Reason: dispatchv1.VerdictReason_VERDICT_REASON_UNSUPPORTED,
		}
		out.Machines = append(out.Machines, v)
		out.Text += "\n  " + v.Machine + ": " + v.Text
	}
	if drv != nil {
		out.Text = strings.Join(append([]string{out.Text}, notes(drv)...), "\nnote: ")
	}
	return out, nil
}

// notes are what keeps a derivation from the machines whatever they are.
func notes(drv *nix.Derivation) []string {
	var notes []string
	if !drv.AllOutputsKnown() {
		notes = append(notes, "its output paths are not known beforehand: Nix's own hook serves it")
	}
	if drv.PreferLocalBuild() {
		notes = append(notes, "it has preferLocalBuild: Nix builds it itself where it can, and asks nobody")
	}
	return notes
}

// explainDrv explains the build of a derivation that is in progress on the
// daemon's own machines, else a
// build such as r.
func (d *dispatcher) explainDrv(drv drvKey, r scheduler.Request) (scheduler.BuildID, scheduler.Explanation) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if b := d.shared[buildKey{drvKey: drv}]; b != nil {
		if e, ok := d.queue.ExplainBuild(b.id); ok {
			return b.id, e
		}
	}
	return 0, d.queue.Explain(r)
}

// explanation is a scheduler's explanation for the API.
func explanation(e scheduler.Explanation) *dispatchv1.ExplainResponse {
	out := &dispatchv1.ExplainResponse{
		System: e.System, Features: e.Features,
		Possible: e.Situation != scheduler.Impossible,
		Chosen:   e.Chosen.URI(), Why: e.Why,
	}
	for _, v := range e.Machines {
		out.Machines = append(out.Machines, &dispatchv1.Verdict{
			Machine: v.Machine.URI(), Reason: verdictReasons[v.Reason], Text: v.Text})
	}
	return out
}

var verdictReasons = map[scheduler.Reason]dispatchv1.VerdictReason{
	scheduler.Eligible:             dispatchv1.VerdictReason_VERDICT_REASON_ELIGIBLE,
	scheduler.SystemUnsupported:    dispatchv1.VerdictReason_VERDICT_REASON_SYSTEM,
	scheduler.FeatureMissing:       dispatchv1.VerdictReason_VERDICT_REASON_FEATURE_MISSING,
	scheduler.MandatoryNotRequired: dispatchv1.VerdictReason_VERDICT_REASON_MANDATORY_FEATURE,
	scheduler.NoSlots:              dispatchv1.VerdictReason_VERDICT_REASON_NO_SLOTS,
	scheduler.StillConnecting:      dispatchv1.VerdictReason_VERDICT_REASON_CONNECTING,
	scheduler.OutOfReach:           dispatchv1.VerdictReason_VERDICT_REASON_DOWN,
	scheduler.BeingDrained:         dispatchv1.VerdictReason_VERDICT_REASON_DRAINED,
	scheduler.IsParked:             dispatchv1.VerdictReason_VERDICT_REASON_PARKED,
	scheduler.IsSuspect:            dispatchv1.VerdictReason_VERDICT_REASON_SUSPECT,
	scheduler.FailedBefore:         dispatchv1.VerdictReason_VERDICT_REASON_FAILED_BEFORE,
	scheduler.SlotsTaken:           dispatchv1.VerdictReason_VERDICT_REASON_FULL,
}
