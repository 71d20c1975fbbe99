package daemon

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strings"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/scheduler"
	"nixdispatch/sshpool"
)

// machines are the machines of the builders setting. Once connect has been called
// the set does not change, and is safe for concurrent use.
type machines struct {
	builders string // the setting, verbatim
	lines    []nix.Machine
	errs     []*nix.MachineError
	byURI    map[string]*machine
	// others are machines of kinds that the daemon cannot serve; all are lines and
	// others in the list's order.
	others, all []nix.Machine
}

// readMachines parses the builders setting. Bad entries are reported and left
// out; so are second entries of a URI.
func readMachines(builders string, log *slog.Logger) *machines {
	set := &machines{builders: builders, byURI: make(map[string]*machine)}
	lines, errs := parseBuilders(builders, log)
	set.errs = errs
	seen := make(map[string]bool)
	for _, line := range lines {
		switch {
		case seen[line.StoreURI]:
			set.errs = append(set.errs, &nix.MachineError{
				Source: line.Source, Column: 0, Name: "store URI", Found: line.StoreURI,
				Expected: "each machine to be listed once; this entry is not used",
			})
		case unsupported(line) != "":
			seen[line.StoreURI] = true
			log.Warn("machine is left to the stock hook", "machine", line.StoreURI, "reason", unsupported(line))
			set.others = append(set.others, line)
			set.all = append(set.all, line)
		default:
			seen[line.StoreURI] = true
			set.lines = append(set.lines, line)
			set.all = append(set.all, line)
		}
	}
	for _, err := range set.errs {
		log.Error("bad entry in the builders setting is left out", "err", err)
	}
	return set
}

func parseBuilders(builders string, log *slog.Logger) ([]nix.Machine, []*nix.MachineError) {
	return nix.ParseMachines(builders, nix.MachinesOptions{
		DefaultSystems: []string{nixSystem()},
		File:           "builders",
		ReadFile:       readMachinesFile,
		Warn:           func(e *nix.MachineError) { log.Warn("odd entry in the builders setting", "err", e) },
	})
}

// readMachinesFile reads an included file, within bounds.
func readMachinesFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, nix.MaxMachinesSize+1))
	if err == nil && len(data) > nix.MaxMachinesSize {
		err = fmt.Errorf("larger than %d bytes", nix.MaxMachinesSize)
	}
	return data, err
}

// connect starts connecting to all machines, in the background.
func (s *machines) connect(pool *sshpool.Pool, log *slog.Logger) {
	for _, line := range s.lines {
		s.byURI[line.StoreURI] = newMachine(line, pool, log)
	}
}

// get finds a machine by its store URI; nil if there is none.
func (s *machines) get(uri scheduler.MachineID) *machine { return s.byURI[string(uri)] }

// forScheduler is what the scheduler needs to know of the machines.
func (s *machines) forScheduler() []scheduler.Machine {
	out := make([]scheduler.Machine, len(s.lines))
	for n, line := range s.lines {
		out[n] = scheduler.Machine{
			ID:                scheduler.MachineID(line.StoreURI),
			Systems:           line.SystemTypes,
			SupportedFeatures: line.SupportedFeatures,
			MandatoryFeatures: line.MandatoryFeatures,
			MaxJobs:           line.MaxJobs,
			SpeedFactor:       line.SpeedFactor,
		}
	}
	return out
}

// badEntries are the entries left out, for the API.
func (s *machines) badEntries() []*dispatchv1.MachineError {
	out := make([]*dispatchv1.MachineError, len(s.errs))
	for n, e := range s.errs {
		out[n] = &dispatchv1.MachineError{
			File:    e.Source.File,
			Line:    uint32(e.Source.Line), //nolint:gosec // the parser bounds it
			Message: e.Error(),
		}
	}
	return out
}

// sameList tells whether a caller's builders setting is the daemon's own. Files
// that a caller names are not read on its word, so lists with includes are
// compared by their text.
func (s *machines) sameList(builders string) bool {
	if strings.TrimSpace(builders) == strings.TrimSpace(s.builders) {
		return true
	}
	if strings.Contains(builders, "@") || len(s.errs) > 0 {
		return false
	}
	lines, errs := nix.ParseMachines(builders, nix.MachinesOptions{DefaultSystems: []string{nixSystem()}})
	return len(errs) == 0 && slices.EqualFunc(lines, s.all, sameMachine)
}

func sameMachine(a, b nix.Machine) bool {
	return a.StoreURI == b.StoreURI && slices.Equal(a.SystemTypes, b.SystemTypes) && a.SSHKey == b.SSHKey &&
		a.MaxJobs == b.MaxJobs && a.SpeedFactor == b.SpeedFactor &&
		slices.Equal(a.SupportedFeatures, b.SupportedFeatures) &&
		slices.Equal(a.MandatoryFeatures, b.MandatoryFeatures) && a.SSHPublicHostKey == b.SSHPublicHostKey
}

// unsupportedCouldRun tells whether a machine of a kind that the daemon cannot
// serve could run a derivation.
func (s *machines) unsupportedCouldRun(drv *nix.Derivation) bool {
	features := drv.RequiredSystemFeatures()
	return slices.ContainsFunc(s.others, func(m nix.Machine) bool {
		return m.SystemSupported(drv.Platform) && m.AllSupported(features) && m.MandatoryMet(features)
	})
}

// nixSystem is this host's system in Nix's words.
func nixSystem() string { return nix.SystemName(runtime.GOOS, runtime.GOARCH) }
