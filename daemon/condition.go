package daemon

import (
	"cmp"
	"fmt"
	"strings"
	"sync"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/sshpool"
)

// Gates say when a machine is too short of something to be given builds. The zero
// value keeps none away.
type Gates struct {
	// MinFree is how many bytes must be free in the machine's store and where it
	// builds. On a disk smaller than twenty times that, a twentieth must.
	MinFree uint64
	// MaxLoad is the load average of a minute that each core may have.
	MaxLoad float64
	// MinMemory is how many bytes of memory must be available.
	MinMemory uint64
	// MaxPressure is, by "cpu", "memory" and "io", the share of time, from 0 to 1, in
	// which something may wait for it.
	MaxPressure map[string]float64
}

// The words for what a machine is parked for: label values of a metric.
const (
	parkedNix      = "nix"
	parkedDisk     = "disk"
	parkedLoad     = "load"
	parkedMemory   = "memory"
	parkedPressure = "pressure"
)

// A condition is what is known of how a machine is, beyond its connection, and
// whether it is parked for that. The moment it is asked for is given, for it is told
// of in the past too. Safe for concurrent use.
type condition struct {
	gates Gates

	mu      sync.Mutex
	load    *dispatchv1.MachineLoad // not changed once it is here; nil: not known
	unknown string                  // why
	// sick is why its Nix is of no use, though ssh is; nil if it is. It is tried again
	// at probeAt.
	sick    error
	probeAt time.Time
	again   sshpool.Backoff // after failures of its Nix
	// yieldTill is until when it takes builds though it is short of something.
	yieldTill time.Time
	// word is what it was last parked for; "" if it never was.
	word string
}

// How long a machine is parked whose Nix failed, before it is tried: from the first to the
// last, growing.
const (
	sickMin = time.Second
	sickMax = time.Minute
	// yieldFor is how long a machine takes builds though it is short of something,
	// because nothing else can do what waits.
	yieldFor = time.Minute
)

func newCondition(gates Gates) *condition {
	return &condition{
		gates: gates,
		again: sshpool.Backoff{Min: sickMin, Max: sickMax},
	}
}

// known is what the machine last told of its load, or why that is not known.
func (c *condition) known() (load *dispatchv1.MachineLoad, unknown string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.load != nil {
		return c.load, ""
	}
	return nil, cmp.Or(c.unknown, "it has not been asked yet")
}

// told notes what the machine told of its load.
func (c *condition) told(load *dispatchv1.MachineLoad) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.load, c.unknown = load, ""
}

// notTold notes that it told nothing.
func (c *condition) notTold(why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.load, c.unknown = nil, why
}

// failed notes that the machine's Nix failed in a way that no build is to blame for.
// When many builds meet it at once that is one failure.
func (c *condition) failed(err error, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sick == nil {
		c.probeAt = now.Add(c.again.Next())
	}
	c.sick = err
}

// probed notes what became of trying its Nix again.
func (c *condition) probed(err error, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sick = err
	if err != nil {
		c.probeAt = now.Add(c.again.Next())
	}
}

// worked notes that it has built.
func (c *condition) worked() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sick == nil {
		c.again.Reset()
	}
}

// connected notes that its Nix was found to answer on a new connection, and
// disconnected that there is none any more.
func (c *condition) connected() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sick = nil
}

func (c *condition) disconnected() { c.notTold("it is not connected to") }

// hoped notes that builds wait that nothing else can do. Its Nix is tried again soon,
// and if they have waited for long, it takes builds though it is short of something.
func (c *condition) hoped(long bool, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if soon := now.Add(hopeRetry); c.sick != nil && c.probeAt.After(soon) {
		c.probeAt = soon
	}
	if long && c.yieldTill.Before(now) {
		c.yieldTill = now.Add(yieldFor)
	}
}

// parked tells what the machine is parked for at a moment: a word, and the reason
// for people; "" if it is not. The reason may stand without a word: then it would be
// parked, were there others for what waits.
func (c *condition) parked(now time.Time) (word, reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	word, reason = c.parkedLocked(now)
	c.word = cmp.Or(word, c.word)
	return word, reason
}

// lastParked is what the machine is parked for, or was last: the scheduler may not
// know yet that it is no more. "" if it never was.
func (c *condition) lastParked(now time.Time) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	word, _ := c.parkedLocked(now)
	return cmp.Or(word, c.word)
}

func (c *condition) parkedLocked(now time.Time) (word, reason string) {
	if c.sick != nil {
		return parkedNix, fmt.Sprintf("its Nix failed, and is tried again in the background: %v", c.sick)
	}
	if word, reason = c.shortLocked(); word != "" && now.Before(c.yieldTill) {
		return "", reason + "; it is used all the same, for nothing else can do what waits"
	}
	return word, reason
}

// shortLocked tells what the machine is short of.
func (c *condition) shortLocked() (word, reason string) {
	low := c.diskLow()
	switch {
	case low != "":
		return parkedDisk, "disk low: " + low
	case c.load == nil:
		return "", ""
	}
	g, l := c.gates, c.load
	if cores := max(l.GetCores(), 1); g.MaxLoad > 0 && l.GetLoad1() > g.MaxLoad*float64(cores) {
		return parkedLoad, fmt.Sprintf("load high: %.2f on %d cores, more than the %.2f a core of --max-load", l.GetLoad1(), cores, g.MaxLoad)
	}
	if l.MemoryAvailableBytes != nil && l.GetMemoryAvailableBytes() < g.MinMemory {
		return parkedMemory, fmt.Sprintf("memory low: %s available, less than the %s of --min-memory",
			nix.SizeText(l.GetMemoryAvailableBytes()), nix.SizeText(g.MinMemory))
	}
	for _, p := range []struct {
		resource string
		share    *float64
	}{{"cpu", l.CpuPressure}, {"memory", l.MemoryPressure}, {"io", l.IoPressure}} {
		most, gated := g.MaxPressure[p.resource]
		if gated && p.share != nil && *p.share > most {
			return parkedPressure, fmt.Sprintf("pressure high: %s %.0f %%, more than the %.0f %% of --max-pressure", p.resource, 100**p.share, 100*most)
		}
	}
	return "", ""
}

// diskLow tells where there is too little space; "" if nowhere, or not known.
func (c *condition) diskLow() string {
	if c.load == nil || c.gates.MinFree == 0 {
		return ""
	}
	var low []string
	for _, d := range []struct {
		where      string
		free, size *uint64
	}{
		{"in its store", c.load.StoreFreeBytes, c.load.StoreSizeBytes},
		{"where it builds", c.load.BuildDirFreeBytes, c.load.BuildDirSizeBytes},
	} {
		if d.free == nil || d.size == nil {
			continue
		}
		least, of := c.gates.MinFree, "--min-free"
		if twentieth := *d.size / 20; twentieth < least {
			least, of = twentieth, "a twentieth of that disk"
		}
		if *d.free < least {
			low = append(low, fmt.Sprintf("%s free %s, less than %s (%s)", nix.SizeText(*d.free), d.where, nix.SizeText(least), of))
		}
	}
	return strings.Join(low, "; ")
}

// due is when something is to be done or may change: its Nix is tried again, or it is
// parked no more. The zero time means that nothing is.
func (c *condition) due() (probe, change time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sick != nil {
		probe = c.probeAt
	}
	if c.yieldTill.After(time.Now()) {
		change = c.yieldTill
	}
	return probe, change
}
