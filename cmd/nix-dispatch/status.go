package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// callTimeout bounds the calls that the daemon answers from memory.
const callTimeout = 10 * time.Second

// interruptible is a context that ends with SIGINT or SIGTERM.
func interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
}

// The JSON form of "status".
type (
	statusJSON struct {
		Machines []machineJSON `json:"machines"`
		Builds   []buildJSON   `json:"builds"`
		// Unplaceable counts the builds that no machine can ever run.
		Unplaceable uint32 `json:"unplaceable"`
		// Detached are the builds that go on without their callers, or did.
		Detached []detachedJSON `json:"detached"`
		Reload   *reloadJSON    `json:"reload"`
		// Users is what each user has in progress, and UserBounds the most that one may
		// have, 0 for no bound; only with --users.
		Users      []userJSON `json:"users,omitempty"`
		UserBounds *userJSON  `json:"userBounds,omitempty"`
	}
	userJSON struct {
		User          string `json:"user,omitempty"`
		Connections   uint64 `json:"connections"`
		Calls         uint64 `json:"calls"`
		Streams       uint64 `json:"streams"`
		RequestBytes  uint64 `json:"requestBytes"`
		DrvBytes      uint64 `json:"derivationBytes"`
		Hooks         uint64 `json:"hooks"`
		HookBytes     uint64 `json:"hookBytes"`
		Builds        uint64 `json:"builds"`
		Pings         uint64 `json:"pings"`
		Detached      uint64 `json:"detached"`
		DetachedBytes uint64 `json:"detachedBytes"`
		LogBytes      uint64 `json:"logBytes"`
	}
	detachedJSON struct {
		ID          uint64     `json:"id"`
		Derivations []string   `json:"derivations"`
		User        string     `json:"user"`
		State       string     `json:"state"`
		Since       time.Time  `json:"since"`
		Ended       *time.Time `json:"ended"`
		Planned     uint32     `json:"planned"`
		Built       uint32     `json:"built"`
		Failed      uint32     `json:"failed"`
		Error       string     `json:"error"`
	}
	reloadJSON struct {
		Time    time.Time `json:"time"`
		Success bool      `json:"success"`
		Errors  []string  `json:"errors"`
	}
	machineJSON struct {
		URI     string `json:"uri"`
		State   string `json:"state"`
		Slots   uint32 `json:"slots"`
		Running uint32 `json:"running"`
		Reason  string `json:"reason"`
		Drained bool   `json:"drained"`
		Removed bool   `json:"removed"`
		// Parked is what the machine is parked for, in a word; "" unless it is.
		Parked string `json:"parked"`
		// Load is null when it is not known, for the reason LoadUnknown.
		Load        *loadJSON `json:"load"`
		LoadUnknown string    `json:"loadUnknown"`
	}
	// What a machine does not tell is null.
	loadJSON struct {
		Time                 time.Time `json:"time"`
		StoreFreeBytes       *uint64   `json:"storeFreeBytes"`
		StoreSizeBytes       *uint64   `json:"storeSizeBytes"`
		BuildDirFreeBytes    *uint64   `json:"buildDirFreeBytes"`
		BuildDirSizeBytes    *uint64   `json:"buildDirSizeBytes"`
		Load1                *float64  `json:"load1"`
		Load5                *float64  `json:"load5"`
		Load15               *float64  `json:"load15"`
		Cores                *uint32   `json:"cores"`
		MemoryAvailableBytes *uint64   `json:"memoryAvailableBytes"`
		MemorySizeBytes      *uint64   `json:"memorySizeBytes"`
		CPUPressure          *float64  `json:"cpuPressure"`
		MemoryPressure       *float64  `json:"memoryPressure"`
		IOPressure           *float64  `json:"ioPressure"`
	}
	buildJSON struct {
		ID      uint64  `json:"id"`
		DrvPath string  `json:"drvPath"`
		Phase   string  `json:"phase"`
		Machine string  `json:"machine"`
		Seconds float64 `json:"seconds"`
		Reason  string  `json:"reason"`
		// User is whose build it is, as far as that is known.
		User     string `json:"user"`
		Priority int32  `json:"priority"`
	}
)

func statusCommand() *command {
	c := newCommand("status", "", "show machines and builds", `Shows the machines and the builds in progress.

Examples:
  nix-dispatch status --json | jq -r '.machines[] | select(.state != "up") | .uri'`)
	socket := socketFlag(c.Flags)
	asJSON := c.Flags.Bool("json", false, "print JSON")
	users := c.Flags.Bool("users", false, "show what each user has in progress, and the most that one may have; with --json in addition")
	c.run = func(ctx context.Context, _ []string, std stdio) int {
		return withDaemon(ctx, *socket, std, func(ctx context.Context, conn *daemonConn) (int, error) {
			resp, err := conn.Status(ctx, &dispatchv1.StatusRequest{Users: *users})
			if err != nil {
				return exitFailed, err
			}
			if *asJSON {
				return printJSON(std, statusOf(resp, time.Now())), nil
			}
			if *users {
				printUsers(std.out, resp)
				return exitOK, nil
			}
			printStatus(std.out, resp, time.Now())
			return exitOK, nil
		})
	}
	return c
}

func statusOf(resp *dispatchv1.StatusResponse, now time.Time) statusJSON {
	s := statusJSON{Machines: []machineJSON{}, Builds: []buildJSON{}, Unplaceable: resp.GetUnplaceable(), Detached: []detachedJSON{}}
	if r := resp.GetReload(); r != nil {
		s.Reload = &reloadJSON{Time: r.GetTime().AsTime(), Success: r.GetSuccess(), Errors: []string{}}
		for _, e := range r.GetErrors() {
			s.Reload.Errors = append(s.Reload.Errors, e.GetMessage())
		}
	}
	for _, m := range resp.Machines {
		s.Machines = append(s.Machines, machineJSON{
			URI: m.Uri, State: stateName(m.State), Slots: m.Slots, Running: m.Running,
			Reason: m.Reason, Drained: m.Drained, Removed: m.Removed,
			Parked: m.Parked, Load: loadOf(m.Load), LoadUnknown: m.LoadUnknown,
		})
	}
	for _, b := range resp.Builds {
		s.Builds = append(s.Builds, buildJSON{
			ID: b.Id, DrvPath: b.DrvPath, Phase: phaseName(b.Phase), Machine: b.Machine,
			Seconds: age(b, now).Seconds(), Reason: b.Reason, User: b.User, Priority: b.Priority,
		})
	}
	for _, b := range resp.GetDetached() {
		d := detachedJSON{
			ID: b.Id, Derivations: b.Derivations, User: b.User, State: detachedState(b), Since: b.GetSince().AsTime(),
			Planned: b.Planned, Built: b.Built, Failed: b.Failed, Error: b.Error,
		}
		if b.Ended != nil {
			ended := b.Ended.AsTime()
			d.Ended = &ended
		}
		s.Detached = append(s.Detached, d)
	}
	for _, u := range resp.GetUsers() {
		s.Users = append(s.Users, userOf(u))
	}
	if b := resp.GetUserBounds(); b != nil {
		bounds := userOf(b)
		s.UserBounds = &bounds
	}
	return s
}

func userOf(u *dispatchv1.UserUsage) userJSON {
	return userJSON{
		User: u.User, Connections: u.Connections, Calls: u.Calls, Streams: u.Streams, RequestBytes: u.RequestBytes, DrvBytes: u.DerivationBytes,
		Hooks: u.Hooks, HookBytes: u.HookBytes, Builds: u.Builds, Pings: u.Pings,
		Detached: u.Detached, DetachedBytes: u.DetachedBytes, LogBytes: u.LogBytes,
	}
}

// printUsers writes what each user has in progress, and below it the bounds.
func printUsers(w io.Writer, resp *dispatchv1.StatusResponse) {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "USER\tCONNECTIONS\tCALLS\tSTREAMS\tREQUESTS\tDERIVATIONS\tHOOKS\tBUILDS\tPINGS\tDETACHED\tLOGS")
	row := func(u *dispatchv1.UserUsage, number, size func(uint64) string) {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", cmp.Or(cell(u.GetUser()), "(at most)"),
			number(u.GetConnections()), number(u.GetCalls()), number(u.GetStreams()), size(u.GetRequestBytes()+u.GetHookBytes()),
			size(u.GetDerivationBytes()), number(u.GetHooks()), number(u.GetBuilds()), number(u.GetPings()), number(u.GetDetached()), size(u.GetLogBytes()))
	}
	number := func(n uint64) string { return strconv.FormatUint(n, 10) }
	bound := func(format func(uint64) string) func(uint64) string {
		return func(n uint64) string {
			if n == 0 {
				return "-"
			}
			return format(n)
		}
	}
	for _, u := range resp.GetUsers() {
		row(u, number, nix.SizeText)
	}
	row(resp.GetUserBounds(), bound(number), bound(nix.SizeText))
	tw.Flush()
}

// detachedState is what has become of a detached build, in a word.
func detachedState(b *dispatchv1.DetachedBuild) string {
	switch {
	case b.GetEnded() == nil:
		return "building"
	case b.GetSuccess():
		return "built"
	default:
		return "failed"
	}
}

func loadOf(l *dispatchv1.MachineLoad) *loadJSON {
	if l == nil {
		return nil
	}
	return &loadJSON{
		Time:           l.GetTime().AsTime(),
		StoreFreeBytes: l.StoreFreeBytes, StoreSizeBytes: l.StoreSizeBytes,
		BuildDirFreeBytes: l.BuildDirFreeBytes, BuildDirSizeBytes: l.BuildDirSizeBytes,
		Load1: l.Load1, Load5: l.Load5, Load15: l.Load15, Cores: l.Cores,
		MemoryAvailableBytes: l.MemoryAvailableBytes, MemorySizeBytes: l.MemorySizeBytes,
		CPUPressure: l.CpuPressure, MemoryPressure: l.MemoryPressure, IOPressure: l.IoPressure,
	}
}

// free tells how much room there is for builds, for people.
func free(l *dispatchv1.MachineLoad) string {
	n, ok := l.Free()
	if !ok {
		return notKnown
	}
	return nix.SizeText(n)
}

// load tells the load average, and of how many cores.
func load(l *dispatchv1.MachineLoad) string {
	switch {
	case l == nil || l.Load1 == nil:
		return notKnown
	case l.Cores == nil:
		return fmt.Sprintf("%.2f", l.GetLoad1())
	default:
		return fmt.Sprintf("%.2f of %d", l.GetLoad1(), l.GetCores())
	}
}

const notKnown = "not known"

func age(b *dispatchv1.BuildInfo, now time.Time) time.Duration {
	if b.Since == nil {
		return 0
	}
	return max(0, now.Sub(b.Since.AsTime())).Round(time.Millisecond)
}

func stateName(s dispatchv1.MachineState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "MACHINE_STATE_"))
}

func phaseName(p dispatchv1.Phase) string {
	return strings.ToLower(strings.TrimPrefix(p.String(), "PHASE_"))
}

// printStatus writes tables for people. Everything foreign in it is sanitized.
func printStatus(w io.Writer, resp *dispatchv1.StatusResponse, now time.Time) {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "MACHINE\tSTATE\tRUNNING\tFREE\tLOAD\tREASON")
	for _, m := range resp.Machines {
		fmt.Fprintf(tw, "%s\t%s\t%d of %d\t%s\t%s\t%s\n", cell(m.Uri), stateName(m.State), m.Running, m.Slots,
			free(m.Load), load(m.Load), cell(m.Reason))
	}
	tw.Flush()
	if len(resp.Machines) == 0 {
		fmt.Fprintln(w, "(no machines)")
	}
	for _, e := range resp.Errors {
		fmt.Fprintf(w, "left out: %s\n", cell(e.Message))
	}
	if r := resp.GetReload(); r != nil && !r.GetSuccess() {
		fmt.Fprintf(w, "the list of machines was not read anew at %s, because of\n", r.GetTime().AsTime().Local().Format("2006-01-02 15:04:05"))
		for _, e := range r.GetErrors() {
			fmt.Fprintf(w, "  %s\n", cell(e.Message))
		}
	}
	fmt.Fprintln(w)
	printBuilds(w, resp, now)
	printDetached(w, resp.GetDetached(), now)
}

func printBuilds(w io.Writer, resp *dispatchv1.StatusResponse, now time.Time) {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	if len(resp.Builds) == 0 {
		fmt.Fprintln(w, "no builds in progress")
		return
	}
	fmt.Fprintln(tw, "BUILD\tPHASE\tTIME\tUSER\tMACHINE\tDERIVATION\tREASON")
	for _, b := range resp.Builds {
		fmt.Fprintf(tw, "%d\t%s\t%v\t%s\t%s\t%s\t%s\n", b.Id, phaseName(b.Phase), age(b, now).Round(time.Second),
			cell(b.User), cmp.Or(cell(b.Machine), "-"), cell(b.DrvPath), cell(b.Reason))
	}
	tw.Flush()
	if n := resp.GetUnplaceable(); n > 0 {
		fmt.Fprintf(w, "\nbuilds that no machine can ever run: %d; 'nix-dispatch explain DRV' tells why\n", n)
	}
}

func printDetached(w io.Writer, list []*dispatchv1.DetachedBuild, now time.Time) {
	if len(list) == 0 {
		return
	}
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "DETACHED\tSTATE\tTIME\tUSER\tBUILT\tFAILED\tDERIVATION\tREASON")
	for _, b := range list {
		drv := ""
		if drvs := b.GetDerivations(); len(drvs) > 0 {
			drv = cell(drvs[0])
			if len(drvs) > 1 {
				drv += ", ..."
			}
		}
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\t%d of %d\t%d\t%s\t%s\n", b.Id, detachedState(b), max(0, now.Sub(b.GetSince().AsTime())).Round(time.Second),
			cell(b.User), b.Built, b.Planned, b.Failed, drv, cell(firstLine(b.Error)))
	}
	tw.Flush()
}

// cell makes foreign text fit for one cell of a table.
func cell(s string) string {
	return strings.Join(strings.Fields(nix.PlainText(s)), " ")
}

func printJSON(std stdio, v any) int {
	enc := json.NewEncoder(std.out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		fmt.Fprintf(std.err, "nix-dispatch: %v\n", err)
		return exitFailed
	}
	return exitOK
}

func cancelCommand() *command {
	c := newCommand("cancel", "BUILD...", "end builds for all who wait for them", `Ends builds, by their numbers in 'nix-dispatch status', for all who wait for them.

Examples:
  nix-dispatch cancel 17`)
	socket := socketFlag(c.Flags)
	c.run = func(ctx context.Context, operands []string, std stdio) int {
		if len(operands) == 0 {
			return usageError(std, c.Name, "which build?")
		}
		var calls []func(context.Context, *daemonConn) (int, error)
		for _, operand := range operands {
			id, err := strconv.ParseUint(operand, 10, 64)
			if err != nil {
				return usageError(std, c.Name, "%q is not the number of a build", operand)
			}
			calls = append(calls, func(ctx context.Context, conn *daemonConn) (int, error) {
				_, err := conn.Cancel(ctx, &dispatchv1.CancelRequest{BuildId: id})
				return exitOK, err
			})
		}
		return withDaemon(ctx, *socket, std, calls...)
	}
	return c
}
