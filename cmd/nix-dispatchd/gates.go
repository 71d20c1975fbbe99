package main

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"nixdispatch/daemon"
)

// gateFlags are those that keep builds off machines that are short of something.
func gateFlags(flags *flag.FlagSet, opts *daemon.Options) {
	flags.DurationVar(&opts.LoadInterval, "load-interval", 30*time.Second, "how often a machine in use is asked for its free disk space and its load, where its account runs commands, a `DURATION`; 0: never, and no commands but Nix's are run there at all")
	flags.TextVar((*size)(&opts.Gates.MinFree), "min-free", size(1<<30), "a machine gets no new builds while others can take them and it has less than this `SIZE` free in its store or where it builds, or less than a twentieth of a smaller disk; a number with K, M, G or T after it, 0 for no bound")
	flags.Float64Var(&opts.Gates.MaxLoad, "max-load", 0, "as --min-free, for machines with more than this load average, a `NUMBER`, for each of their cores; 0 for no bound")
	flags.TextVar((*size)(&opts.Gates.MinMemory), "min-memory", size(0), "as --min-free, for machines with less than this `SIZE` of memory available; 0 for no bound")
	flags.TextVar((*pressure)(&opts.Gates.MaxPressure), "max-pressure", pressure(nil), "as --min-free, for machines with more pressure than that, in per cent of the last ten seconds, such as \"cpu=80,memory=10,io=50\" (Linux's PSI); a `LIST` of any of these three")
}

// A size is a number of bytes, written with K, M, G or T for powers of 1024.
type size uint64

const sizeUnits = "KMGT"

// MarshalText writes what UnmarshalText reads.
func (s size) MarshalText() ([]byte, error) {
	n, unit := uint64(s), -1
	for n != 0 && n%1024 == 0 && unit < len(sizeUnits)-1 {
		n, unit = n/1024, unit+1
	}
	text := strconv.FormatUint(n, 10)
	if unit >= 0 {
		text += sizeUnits[unit : unit+1]
	}
	return []byte(text), nil
}

// UnmarshalText reads a size.
func (s *size) UnmarshalText(text []byte) error {
	digits := strings.TrimRight(string(text), sizeUnits)
	n, err := strconv.ParseUint(digits, 10, 64)
	units := len(text) - len(digits)
	if err != nil || units > 1 {
		return errors.New("want a number of bytes, with K, M, G or T after it for powers of 1024")
	}
	if units == 1 {
		shift := 10 * (1 + strings.IndexByte(sizeUnits, text[len(text)-1]))
		if n > 1<<63>>shift {
			return errors.New("too large")
		}
		n <<= shift
	}
	*s = size(n)
	return nil
}

// A pressure is shares of time by resource, written in per cent.
type pressure map[string]float64

// MarshalText writes what UnmarshalText reads.
func (p pressure) MarshalText() ([]byte, error) {
	var words []string
	for _, resource := range slices.Sorted(maps.Keys(p)) {
		words = append(words, fmt.Sprintf("%s=%g", resource, 100*p[resource]))
	}
	return []byte(strings.Join(words, ",")), nil
}

// UnmarshalText reads shares.
func (p *pressure) UnmarshalText(text []byte) error {
	*p = make(pressure)
	if len(text) == 0 {
		return nil
	}
	for word := range strings.SplitSeq(string(text), ",") {
		resource, percent, _ := strings.Cut(word, "=")
		n, err := strconv.ParseFloat(percent, 64)
		if err != nil || !(n >= 0 && n <= 100) || !slices.Contains([]string{"cpu", "memory", "io"}, resource) {
			return fmt.Errorf("%q: want cpu, memory or io, \"=\" and a number from 0 to 100", word)
		}
		(*p)[resource] = n / 100
	}
	return nil
}

// checkGates tells what is wrong with the settings of gateFlags.
func checkGates(opts daemon.Options) error {
	switch {
	case opts.LoadInterval < 0 || opts.LoadInterval > 0 && opts.LoadInterval < time.Second:
		return errors.New("--load-interval must be 0 or at least a second")
	case !(opts.Gates.MaxLoad >= 0):
		return errors.New("--max-load must not be negative")
	}
	return nil
}
