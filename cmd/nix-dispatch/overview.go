package main

import (
	"bytes"
	"cmp"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// An overview is what "top" shows.
type overview struct {
	status *dispatchv1.StatusResponse
	ended  []*dispatchv1.FinishedBuild
	at     time.Time
	// silent is why the daemon has not answered since; "" if it has.
	silent string
}

// A line is one of a terminal's. style is what stands in an escape sequence for it;
// "" for none.
type line struct{ text, style string }

// The styles of lines.
const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	amber = "33"
)

// lines are the overview in so many rows at most, or all of it with 0. Where there is
// no room, what has ended goes first, then what waits, then what is on machines.
func (o *overview) lines(rows int) []line {
	building, waiting := o.builds()
	head := o.head(len(building))
	sections := [][]line{o.machines(), building, waiting, o.recent()}
	// The daemon was not asked for all that wait.
	untold := []int{2: max(0, int(o.status.GetQueued())-max(0, len(waiting)-1)), 3: 0}
	if rows == 0 {
		for n, s := range sections {
			sections[n] = cut(s, len(s)+1, untold[n])
		}
	} else {
		room := rows - len(head)
		// Each needs a line before it.
		least := []int{3, 3, 3, 0}
		for n, s := range sections {
			later := 0
			for k := n + 1; k < len(sections); k++ {
				if len(sections[k]) > 0 {
					later += min(len(sections[k])+untold[k], least[k]) + 1
				}
			}
			sections[n] = cut(s, max(0, room-later-1), untold[n])
			if len(sections[n]) > 0 {
				room -= len(sections[n]) + 1
			}
		}
	}
	all := head
	for _, s := range sections {
		if len(s) > 0 {
			all = append(append(all, line{}), s...)
		}
	}
	if rows > 0 {
		all = all[:min(len(all), rows)]
	}
	return all
}

// cut leaves at most so many lines, of which the last tells how many are missing,
// with those that were not there in the first place.
func cut(lines []line, most, untold int) []line {
	switch {
	case len(lines) == 0, len(lines) <= most && untold == 0:
		return lines
	case most < 2:
		return nil
	}
	keep := min(len(lines), most-1)
	return append(lines[:keep:keep], line{fmt.Sprintf("... and %d more", len(lines)-keep+untold), dim})
}

func (o *overview) head(onMachines int) []line {
	up, inUse, slots := 0, uint32(0), uint32(0)
	for _, m := range o.status.GetMachines() {
		switch m.GetState() {
		case dispatchv1.MachineState_MACHINE_STATE_UP, dispatchv1.MachineState_MACHINE_STATE_SUSPECT:
			up++
			slots += m.GetSlots()
		}
		inUse += m.GetRunning()
	}
	lines := []line{{fmt.Sprintf("%s  %d of %d up, %d of %d slots, %d at work, %d waiting",
		o.at.Format("15:04:05"), up, len(o.status.GetMachines()), inUse, slots, max(0, onMachines-1), o.status.GetQueued()), bold}}
	if o.silent != "" {
		lines = append(lines, line{"nix-dispatchd has not answered since: " + o.silent, red})
	}
	if r := o.status.GetReload(); r != nil && !r.GetSuccess() {
		lines = append(lines, line{"the list of machines is broken, and used as it was before: 'nix-dispatch status' has the errors", red})
	}
	if n := o.status.GetUnplaceable(); n > 0 {
		lines = append(lines, line{fmt.Sprintf("builds that no machine can ever run: %d", n), red})
	}
	return lines
}

func (o *overview) machines() []line {
	t := newColumns("MACHINE\tSTATE\tSLOTS\tFREE\tLOAD\tWHY")
	for _, m := range o.status.GetMachines() {
		style := ""
		switch m.GetState() {
		case dispatchv1.MachineState_MACHINE_STATE_DOWN:
			style = red
		case dispatchv1.MachineState_MACHINE_STATE_UP:
		default:
			style = amber
		}
		t.add(style, "%s\t%s\t%d of %d\t%s\t%s\t%s", cell(m.GetUri()), stateName(m.GetState()), m.GetRunning(), m.GetSlots(),
			free(m.GetLoad()), load(m.GetLoad()), cell(m.GetReason()))
	}
	return t.lines()
}

// builds are those on machines, and those that wait, each below a heading.
func (o *overview) builds() (building, waiting []line) {
	on := newColumns("BUILD\tPHASE\tTIME\tMACHINE\tUSER\tDERIVATION")
	queue := newColumns("WAITING\tTIME\tSYSTEM\tUSER\tDERIVATION\tWHY")
	for _, b := range o.status.GetBuilds() {
		since := cmp.Or(b.GetBuildingSince(), b.GetSince())
		took := max(0, o.at.Sub(since.AsTime())).Round(time.Second)
		name := strings.TrimSuffix(cell(nix.StorePath(b.GetDrvPath()).Name()), ".drv")
		if b.GetPhase() == dispatchv1.Phase_PHASE_QUEUED {
			queue.add("", "%d\t%v\t%s\t%s\t%s\t%s", b.GetId(), took, cell(b.GetSystem()), cell(b.GetUser()), name, cell(b.GetReason()))
			continue
		}
		on.add("", "%d\t%s\t%v\t%s\t%s\t%s", b.GetId(), phaseName(b.GetPhase()), took, cell(b.GetMachine()), cell(b.GetUser()), name)
	}
	return on.lines(), queue.lines()
}

func (o *overview) recent() []line {
	t := newColumns("ENDED\tAGO\tBUILT\tMACHINE\tSTATUS\tDERIVATION")
	for _, b := range o.ended {
		style := ""
		if b.GetFailed() {
			style = red
		}
		t.add(style, "%d\t%v\t%v\t%s\t%s\t%s", b.GetId(), max(0, o.at.Sub(b.GetEnded().AsTime())).Round(time.Second),
			b.GetBuilding().AsDuration().Round(100*time.Millisecond), cell(b.GetMachine()), cell(b.GetStatus()),
			strings.TrimSuffix(cell(nix.StorePath(b.GetDrvPath()).Name()), ".drv"))
	}
	return t.lines()
}

// columns are lines of cells below each other, with a heading.
type columns struct {
	text   bytes.Buffer
	writer *tabwriter.Writer
	styles []string
}

func newColumns(heading string) *columns {
	c := new(columns)
	c.writer = tabwriter.NewWriter(&c.text, 0, 8, 2, ' ', 0)
	c.add(bold, "%s", heading)
	return c
}

func (c *columns) add(style, format string, cells ...any) {
	fmt.Fprintf(c.writer, format+"\n", cells...)
	c.styles = append(c.styles, style)
}

// lines are nothing if there is nothing below the heading.
func (c *columns) lines() []line {
	c.writer.Flush()
	if len(c.styles) == 1 {
		return nil
	}
	var all []line
	for n, text := range strings.Split(strings.TrimSuffix(c.text.String(), "\n"), "\n") {
		all = append(all, line{text, c.styles[n]})
	}
	return all
}
