package daemon

import (
	"crypto/sha256"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/sshpool/plainfile"
)

// A machineList is a builders setting as it was read at one time. It is never
// changed.
type machineList struct {
	builders string // the setting, verbatim
	// lines are the good entries of kinds that the daemon serves, others those that
	// it cannot; all are both. Each in the list's order.
	lines, others, all []nix.Machine
	// errs are the bad entries, which are left out.
	errs []*nix.MachineError
	// print is different when anything that was read is different: the setting and
	// the contents of all files it includes.
	print [sha256.Size]byte
}

// readMachineList parses a builders setting and reads the files it includes.
func readMachineList(builders string, log *slog.Logger) *machineList {
	list := &machineList{builders: builders}
	read := sha256.New()
	fmt.Fprintf(read, "%q\n", builders)
	list.all, list.errs = nix.ParseMachines(builders, nix.MachinesOptions{
		DefaultSystems: []string{nixSystem()},
		File:           "builders",
		ReadFile: func(path string) ([]byte, error) {
			data, err := readMachinesFile(path)
			fmt.Fprintf(read, "%q %v %x\n", path, err, sha256.Sum256(data))
			return data, err
		},
		Warn: func(e *nix.MachineError) { log.Warn("odd entry in the builders setting", "err", e) },
	})
	read.Sum(list.print[:0])
	for _, line := range list.all {
		if unsupported(line) == "" {
			list.lines = append(list.lines, line)
		} else {
			list.others = append(list.others, line)
		}
	}
	return list
}

// readList reads the list of machines that the daemon serves.
func (d *Daemon) readList(log *slog.Logger) *machineList {
	conf := d.opts.NixConf
	if conf == nil {
		return readMachineList(d.opts.Builders, log)
	}
	source := *conf
	source.ReadFile = readMachinesFile
	builders, found, err := source.Setting("builders")
	if !found {
		builders = "@" + source.ConfDir() + "/machines"
	}
	list := readMachineList(builders, log)
	if err != nil {
		list.errs = append(list.errs, &nix.MachineError{
			Source: nix.Position{File: source.ConfDir() + "/nix.conf"}, Column: -1,
			Found: "a configuration that Nix rejects", Expected: "the setting builders, or none", Err: err,
		})
		list.print = sha256.Sum256(append(list.print[:], err.Error()...))
	}
	return list
}

// readMachinesFile reads a file that a list of machines includes.
func readMachinesFile(path string) ([]byte, error) { return plainfile.Read(path, nix.MaxMachinesSize) }

// badEntries are the entries left out, for the API.
func (l *machineList) badEntries() []*dispatchv1.MachineError {
	out := make([]*dispatchv1.MachineError, len(l.errs))
	for n, e := range l.errs {
		out[n] = &dispatchv1.MachineError{
			File:    e.Source.File,
			Line:    uint32(e.Source.Line), //nolint:gosec // the parser bounds it
			Message: e.Error(),
		}
	}
	return out
}

// same tells whether a caller's builders setting is this list. Files that a
// caller names are not read on its word, so lists with includes are compared by
// their text.
func (l *machineList) same(builders string) bool {
	if strings.TrimSpace(builders) == strings.TrimSpace(l.builders) {
		return true
	}
	if strings.Contains(builders, "@") || len(l.errs) > 0 {
		return false
	}
	lines, errs := nix.ParseMachines(builders, nix.MachinesOptions{DefaultSystems: []string{nixSystem()}})
	return len(errs) == 0 && slices.EqualFunc(lines, l.all, sameLine)
}

// sameLine tells whether two lines mean the same, wherever they stand.
func sameLine(a, b nix.Machine) bool {
	return a.StoreURI == b.StoreURI && slices.Equal(a.SystemTypes, b.SystemTypes) && a.SSHKey == b.SSHKey &&
		a.MaxJobs == b.MaxJobs && a.SpeedFactor == b.SpeedFactor &&
		slices.Equal(a.SupportedFeatures, b.SupportedFeatures) &&
		slices.Equal(a.MandatoryFeatures, b.MandatoryFeatures) && a.SSHPublicHostKey == b.SSHPublicHostKey
}

// unsupportedCouldRun tells whether a machine of a kind that the daemon cannot
// serve could run a derivation.
func (l *machineList) unsupportedCouldRun(drv *nix.Derivation) bool {
	features := drv.RequiredSystemFeatures()
	return slices.ContainsFunc(l.others, func(m nix.Machine) bool {
		return m.SystemSupported(drv.Platform) && m.AllSupported(features) && m.MandatoryMet(features)
	})
}

// nixSystem is this host's system in Nix's words.
func nixSystem() string { return nix.SystemName(runtime.GOOS, runtime.GOARCH) }
