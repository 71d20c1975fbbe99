package main

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// This file compares Nix's own setting builders with the list that nix-dispatchd
// serves: they come from the same files, unless somebody has named another.

// buildersSubject is what the findings are about.
const buildersSubject = "builders"

// A servedList is what nix-dispatchd has for machines.
type servedList struct {
	lines []*dispatchv1.Machine
	// others are the URIs of machines that it leaves to Nix's own hook.
	others []string
}

// served asks nix-dispatchd for its list; nil if it does not tell.
func (p *pinger) served(ctx context.Context, st *dispatchv1.StatusResponse) *servedList {
	if st == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := p.conn.Machines(ctx, &dispatchv1.MachinesRequest{})
	if err != nil {
		return nil
	}
	list := &servedList{lines: r.GetMachines()}
	for _, m := range st.GetMachines() {
		if m.GetState() == dispatchv1.MachineState_MACHINE_STATE_UNSUPPORTED {
			list.others = append(list.others, m.GetUri())
		}
	}
	return list
}

// lookAtBuilders tells whether nix-daemon goes by the list that nix-dispatchd serves.
func (h *host) lookAtBuilders(d *nixDaemon, served *servedList, tell func(finding)) {
	set, err := h.daemonSetting(buildersSubject, d, false)
	if err != nil {
		return // told about build-hook, which stands in the same files
	}
	if !set.found {
		dir := nix.ConfSource{Getenv: func(name string) string { return d.env[name] }}.ConfDir()
		set = confSetting{"@" + dir + "/machines", "default", true}
	}
	lines, errs := nix.ParseMachines(set.value, nix.MachinesOptions{
		DefaultSystems: []string{nix.SystemName(runtime.GOOS, runtime.GOARCH)},
		File:           buildersSubject,
		ReadFile:       h.readFile,
	})
	where := "set by " + set.where
	if set.where == "default" {
		where = "which is the default, " + set.value
	}
	const same = "give both the same list: nix-dispatchd reads Nix's configuration unless --builders is given"
	switch only, missing, other := served.differences(lines); {
	case strings.TrimSpace(set.value) == "":
		tell(problem(buildersSubject, "take that out, or name the machines there: builders = @/etc/nix/machines",
			"nix-daemon's setting is empty (%s): its builds ask for no machine", where))
	case len(errs) > 0 && len(lines) == 0:
		tell(problem(buildersSubject, "mend it; 'nix-dispatch machines check' shows how a list is read", "nix-daemon's setting (%s): %v", where, errs[0]))
	case len(only)+len(missing)+len(other) > 0:
		var how []string
		for _, part := range []struct {
			what string
			uris []string
		}{{"only Nix has ", only}, {"only nix-dispatchd has ", missing}, {"not the same in both: ", other}} {
			if len(part.uris) > 0 {
				how = append(how, part.what+strings.Join(part.uris, ", "))
			}
		}
		tell(warning(buildersSubject, same, "nix-daemon's setting (%s) is not the list that nix-dispatchd serves: %s; builds go by Nix's",
			where, strings.Join(how, "; ")))
	default:
		tell(fine(buildersSubject, "nix-daemon and nix-dispatchd have the same list (%s)", where))
	}
}

// differences compares with the lines of another list: the URIs that only those
// have, that only the served list has, and whose lines say something else.
func (l *servedList) differences(lines []nix.Machine) (only, missing, other []string) {
	mine, theirs := make(map[string][]string), make(map[string][]string)
	for _, m := range l.lines {
		mine[m.GetStoreUri()] = append(mine[m.GetStoreUri()], fmt.Sprint(m.GetSystems(), m.GetSshKey(), m.GetMaxJobs(), m.GetSpeedFactor(),
			m.GetSupportedFeatures(), m.GetMandatoryFeatures(), m.GetSshPublicHostKey()))
	}
	for _, m := range lines {
		if slices.Contains(l.others, m.StoreURI) {
			continue
		}
		theirs[m.StoreURI] = append(theirs[m.StoreURI], fmt.Sprint(m.SystemTypes, m.SSHKey, m.MaxJobs, m.SpeedFactor,
			m.SupportedFeatures, m.MandatoryFeatures, m.SSHPublicHostKey))
	}
	for uri, said := range theirs {
		switch {
		case mine[uri] == nil:
			only = append(only, uri)
		case !slices.Equal(mine[uri], said):
			other = append(other, uri)
		}
	}
	for uri := range mine {
		if theirs[uri] == nil {
			missing = append(missing, uri)
		}
	}
	for _, uris := range [][]string{only, missing, other} {
		slices.Sort(uris)
	}
	return only, missing, other
}
