package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"

	"nixdispatch/proto/nix"
)

const defaultMachinesFile = "/etc/nix/machines"

const machinesAbout = `Reads a machines file, prints the machines in it as they are understood, and says
what is wrong with the others. FILE '-' is standard input; without FILE it is
` + defaultMachinesFile + `. It needs no daemon.

Each line of output is a line of a machines file with every column filled in; '-'
stands for a column that is unset.

Examples:
  nix-dispatch machines check
  nix-dispatch machines check --json ./machines
  nix-dispatch machines check --builders 'ssh://mac aarch64-darwin; @/etc/nix/machines'

Exit status: 0 all is good, 1 something is wrong, 2 wrong usage.`

// machinesCommand is "nix-dispatch machines check": it shows how the daemon would
// read a list of machines.
func machinesCommand() *command {
	c := newCommand("machines", "check [FILE|-]", "show how a machines file is understood", machinesAbout)
	asJSON := c.Flags.Bool("json", false, "print a JSON array")
	builders := c.Flags.String("builders", "", "read `TEXT`, a value of Nix's setting \"builders\", instead of a file")
	c.run = func(_ context.Context, operands []string, std stdio) int {
		if len(operands) == 0 || operands[0] != "check" {
			return usageError(std, c.Name, "expected 'check'")
		}
		operands = operands[1:]
		given := false
		c.Flags.Visit(func(f *flag.Flag) { given = given || f.Name == "builders" })
		if len(operands) > 1 || given && len(operands) > 0 {
			return usageError(std, c.Name, "expected one FILE or --builders")
		}
		file, text, err := "--builders", *builders, error(nil)
		if !given {
			file, text, err = machinesText(operands, std)
		}
		if err != nil {
			fmt.Fprintf(std.err, "nix-dispatch machines: %v\n", err)
			return exitFailed
		}
		return checkMachineList(file, text, *asJSON, std)
	}
	return c
}

// checkMachineList prints the machines of text, and what is wrong with it.
func checkMachineList(file, text string, asJSON bool, std stdio) int {
	machines, bad := nix.ParseMachines(text, nix.MachinesOptions{
		DefaultSystems: []string{nix.SystemName(runtime.GOOS, runtime.GOARCH)},
		File:           file,
		ReadFile:       readMachinesFile,
		Warn:           func(e *nix.MachineError) { fmt.Fprintf(std.err, "warning: %v\n", e) },
	})
	for _, e := range bad {
		fmt.Fprintf(std.err, "error: %v\n", e)
	}
	show := printMachines
	if asJSON {
		show = printMachinesJSON
	}
	if err := show(std.out, machines); err != nil {
		fmt.Fprintf(std.err, "nix-dispatch machines: write the machines: %v\n", err)
		return exitFailed
	}
	if len(bad) > 0 {
		return exitFailed
	}
	return exitOK
}

// machinesText reads the file that operands name, and tells what to call it.
func machinesText(operands []string, std stdio) (file, text string, err error) {
	if len(operands) == 1 && operands[0] == "-" {
		data, err := readBounded(std.in)
		if err != nil {
			err = fmt.Errorf("read standard input: %w", err)
		}
		return "<stdin>", string(data), err
	}
	file = defaultMachinesFile
	if len(operands) == 1 {
		file = operands[0]
	}
	data, err := readMachinesFile(file)
	if len(operands) == 0 && errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(std.err, "warning: no file %s, so there are no machines\n", file)
		return file, "", nil
	}
	return file, string(data), err
}

func readMachinesFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := readBounded(f)
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", path, err)
	}
	return data, nil
}

func readBounded(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, nix.MaxMachinesSize+1))
	if err == nil && len(data) > nix.MaxMachinesSize {
		err = fmt.Errorf("larger than %d bytes", nix.MaxMachinesSize)
	}
	return data, err
}

// printMachines prints lines of a machines file.
func printMachines(w io.Writer, machines []nix.Machine) error {
	out := bufio.NewWriter(w)
	tab := tabwriter.NewWriter(out, 0, 0, 1, ' ', 0)
	for _, m := range machines {
		systems := columnText(strings.Join(m.SystemTypes, ","))
		if len(m.SystemTypes) == 0 {
			systems = "," // '-' would mean the local system
		}
		fmt.Fprintf(tab, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n",
			m.StoreURI, systems, columnText(m.SSHKey), m.MaxJobs, strconv.FormatFloat(m.SpeedFactor, 'g', -1, 64),
			columnText(strings.Join(m.SupportedFeatures, ",")), columnText(strings.Join(m.MandatoryFeatures, ",")), columnText(m.SSHPublicHostKey))
	}
	if err := tab.Flush(); err != nil {
		return err
	}
	return out.Flush()
}

// columnText is one column of a machines file. Text that a terminal might act on is
// quoted.
func columnText(s string) string {
	if s == "" {
		return "-"
	}
	if q := strconv.Quote(s); strings.ContainsFunc(s, func(c rune) bool { return !strconv.IsPrint(c) }) {
		return q
	}
	return s
}

// machineEntry is what "machines check --json" prints of a machine.
type machineEntry struct {
	StoreURI          string   `json:"storeUri"`
	Systems           []string `json:"systems"`
	SSHKey            string   `json:"sshKey"`
	MaxJobs           int      `json:"maxJobs"`
	SpeedFactor       float64  `json:"speedFactor"`
	SupportedFeatures []string `json:"supportedFeatures"`
	MandatoryFeatures []string `json:"mandatoryFeatures"`
	SSHPublicHostKey  string   `json:"sshPublicHostKey"`
}

func printMachinesJSON(w io.Writer, machines []nix.Machine) error {
	list := func(s []string) []string { return append([]string{}, s...) } // [] and not null
	all := make([]machineEntry, 0, len(machines))
	for _, m := range machines {
		all = append(all, machineEntry{
			StoreURI: m.StoreURI, Systems: list(m.SystemTypes), SSHKey: m.SSHKey,
			MaxJobs: m.MaxJobs, SpeedFactor: m.SpeedFactor,
			SupportedFeatures: list(m.SupportedFeatures), MandatoryFeatures: list(m.MandatoryFeatures),
			SSHPublicHostKey: m.SSHPublicHostKey,
		})
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(all)
}
