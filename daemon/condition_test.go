package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/wire/wiretest"
	"nixdispatch/sshpool"
)

func TestWhatAMachineIsParkedFor(t *testing.T) {
	t.Parallel()
	gb := func(n float64) *uint64 { return proto.Uint64(uint64(n * (1 << 30))) }
	for _, tt := range []struct {
		name   string
		gates  Gates
		load   *dispatchv1.MachineLoad
		word   string
		reason string
	}{
		{"not known", everyGate, nil, "", ""},
		{"tells nothing", everyGate, &dispatchv1.MachineLoad{}, "", ""},
		{"no gates", Gates{}, &dispatchv1.MachineLoad{StoreFreeBytes: gb(0), StoreSizeBytes: gb(1), Load1: proto.Float64(1e5)}, "", ""},
		{"store full", Gates{MinFree: 1 << 30}, &dispatchv1.MachineLoad{StoreFreeBytes: gb(0.5), StoreSizeBytes: gb(100)},
			"disk", "disk low: 512.0 MiB free in its store, less than 1.0 GiB (--min-free)"},
		{"nothing free where it builds", Gates{MinFree: 1 << 30},
			&dispatchv1.MachineLoad{StoreFreeBytes: gb(5), StoreSizeBytes: gb(100), BuildDirFreeBytes: gb(0), BuildDirSizeBytes: gb(1)},
			"disk", "disk low: 0.0 KiB free where it builds, less than 51.2 MiB (a twentieth of that disk)"},
		{"a small disk", Gates{MinFree: 1 << 30}, &dispatchv1.MachineLoad{StoreFreeBytes: gb(0.1), StoreSizeBytes: gb(1)}, "", ""},
		{"load", Gates{MaxLoad: 1.5}, &dispatchv1.MachineLoad{Load1: proto.Float64(12.1), Cores: proto.Uint32(8)},
			"load", "load high: 12.10 on 8 cores, more than the 1.50 a core of --max-load"},
		{"some load", Gates{MaxLoad: 1.5}, &dispatchv1.MachineLoad{Load1: proto.Float64(12), Cores: proto.Uint32(8)}, "", ""},
		{"memory", Gates{MinMemory: 2 << 30}, &dispatchv1.MachineLoad{MemoryAvailableBytes: gb(1)},
			"memory", "memory low: 1.0 GiB available, less than the 2.0 GiB of --min-memory"},
		{"pressure", Gates{MaxPressure: map[string]float64{"memory": 0.1}}, &dispatchv1.MachineLoad{CpuPressure: proto.Float64(1), MemoryPressure: proto.Float64(0.25)},
			"pressure", "pressure high: memory 25 %, more than the 10 % of --max-pressure"},
	} {
		c := newCondition(tt.gates)
		c.load = tt.load
		word, reason := c.parked(time.Now())
		if word != tt.word || reason != tt.reason {
			t.Errorf("%s: parked for %q: %q, want %q: %q", tt.name, word, reason, tt.word, tt.reason)
		}
		// Whatever it is, the last machine is not kept out of use for it.
		c.hoped(true, time.Now())
		if word, _ := c.parked(time.Now()); word != "" {
			t.Errorf("%s: parked though nothing else can do what waits", tt.name)
		}
	}
}

func TestSickMachineIsTriedLessAndLess(t *testing.T) {
	t.Parallel()
	c := newCondition(Gates{})
	now := time.Now()
	bad := errors.New("it ended")
	for range 20 { // all at once, for there were many builds on it
		c.failed(bad, now)
	}
	for n := range 10 {
		probe, _ := c.due()
		d, mean := probe.Sub(now), min(sickMin<<n, sickMax)
		if d < mean/2 || d > mean*3/2 {
			t.Errorf("tried again after %v, the %dth time, want about %v", d, n, mean)
		}
		now = probe
		c.probed(bad, now)
	}
	c.hoped(false, now)
	if probe, _ := c.due(); probe.Sub(now) > hopeRetry {
		t.Errorf("tried again after %v though something waits for it", probe.Sub(now))
	}
	if word, reason := c.parked(now); word != "nix" || !strings.Contains(reason, "it ended") {
		t.Errorf("parked for %q: %q", word, reason)
	}
	c.probed(nil, now)
	if word, _ := c.parked(now); word != "" {
		t.Errorf("parked for %q though it answers", word)
	}
}

// TestMachineWhoseNixFailsIsParked has ssh work on a machine and its Nix not: one
// build finds out, the others do not go there, and it is back by itself.
func TestMachineWhoseNixFailsIsParked(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m, m2 := oneMachine(scheme), namedMachine(scheme, "m2")
		s := newSite(t, m, m2)
		m.ssh.RefuseExec(true)
		st := s.mustBuild(s.drv("first", drvConfig{}))
		if placed := st.placed(); len(placed) != 2 || placed[0] != m.uri() {
			t.Errorf("placed on %v, want both machines", placed)
		}
		if got := s.machineStatus(m); got.GetState() != dispatchv1.MachineState_MACHINE_STATE_PARKED || got.GetParked() != "nix" || !strings.Contains(got.GetReason(), "its Nix failed") {
			t.Errorf("the machine is %v", got)
		}
		if n := s.metric("nix_dispatch_machine_parked", map[string]string{"machine": m.uri(), "reason": "nix"}); n != 1 {
			t.Errorf("machine_parked is %v", n)
		}
		for n := range 3 {
			if placed := s.mustBuild(s.drv(fmt.Sprint("other-", n), drvConfig{})).placed(); len(placed) != 1 || placed[0] != m2.uri() {
				t.Errorf("placed on %v while it is parked", placed)
			}
		}
		m.ssh.RefuseExec(false)
		s.eventually("it is back", func() bool {
			return s.machineStatus(m).GetState() == dispatchv1.MachineState_MACHINE_STATE_UP
		})
		if placed := s.mustBuild(s.drv("last", drvConfig{})).placed(); placed[0] != m.uri() {
			t.Errorf("placed on %v when it is back", placed)
		}
	})
}

// TestLastMachineIsNotParkedForLong has the only machine come back in the middle of a
// long pause.
// hopeSoon has the daemon soon see to a machine that is a build's only hope.
func hopeSoon(s *site) { s.d.lastResort, s.d.hopeRetry = 20*time.Millisecond, 20*time.Millisecond }

func TestLastMachineIsNotParkedForLong(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{m},
		ssh:      func(o *sshpool.Options) { o.BackoffMin, o.BackoffMax = time.Hour, time.Hour },
		prepare:  hopeSoon,
	})
	m.vanish()
	s.eventually("the machine is down", func() bool {
		return s.machineStatus(m).GetState() == dispatchv1.MachineState_MACHINE_STATE_DOWN
	})
	h := s.hook()
	h.accepted(s.drv("patient", drvConfig{}))
	m.ssh.FailDials(nil)
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT) // it would be asked again after half an hour
}

// TestOnlyMachineWithoutSpaceIsTriedAgain has a build that only a machine can do
// whose disk is full for a while.
func TestOnlyMachineWithoutSpaceIsTriedAgain(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	var full, met atomic.Bool
	m.shell = func(string) string {
		free := 2048
		if full.Load() {
			free = 0
		}
		return fmt.Sprintf("%s\nstore dev 4096 0 %d 50%% /\nend\n", lookGreeting, free)
	}
	m.build = func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult {
		if met.CompareAndSwap(false, true) {
			full.Store(true)
			return nix.BuildResult{Status: nix.MiscFailure, ErrorMsg: "writing to file: No space left on device"}
		}
		return m.site.recipe(req.DrvPath).build(m.store, req)
	}
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, options: func(o *Options) {
		o.LoadInterval, o.Gates = time.Second, Gates{MinFree: 1 << 30}
	}})
	s.eventually("the machine has reported its load", func() bool { return s.machineStatus(m).GetLoad() != nil })
	h := s.hook()
	h.accepted(s.drv("big", drvConfig{}))
	s.eventually("the machine is parked", func() bool {
		got := s.machineStatus(m)
		return got.GetState() == dispatchv1.MachineState_MACHINE_STATE_PARKED && strings.HasPrefix(got.GetReason(), "disk low: ")
	})
	full.Store(false)
	h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
}

// TestWordsParkNoMachine has builds fail that say the disk is full, on machines that can be
// asked and on one that cannot: none is parked.
func TestWordsParkNoMachine(t *testing.T) {
	t.Parallel()
	told, silent := namedMachine("ssh", "told"), namedMachine("ssh-ng", "silent")
	var asked atomic.Int32
	told.shell = func(string) string {
		asked.Add(1)
		return lookGreeting + "\nstore dev 4096000000 0 2048000000 50% /\nend\n"
	}
	for _, m := range []*fakeMachine{told, silent} {
		m.build = func(_ context.Context, req wiretest.BuildRequest) nix.BuildResult {
			if strings.Contains(string(req.DrvPath), "-full") {
				return nix.BuildResult{Status: nix.MiscFailure, ErrorMsg: "writing to file: No space left on device"}
			}
			return m.site.recipe(req.DrvPath).build(m.store, req)
		}
	}
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{told, silent}, options: func(o *Options) {
		o.LoadInterval, o.Gates = time.Hour, Gates{MinFree: 1 << 30}
	}})
	s.eventually("the machine has reported its load", func() bool { return s.machineStatus(told).GetLoad() != nil })
	before := asked.Load()
	s.build(s.drv("full", drvConfig{})).mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_MISC_FAILURE)
	for _, m := range []*fakeMachine{told, silent} {
		if got := s.machineStatus(m); got.GetState() != dispatchv1.MachineState_MACHINE_STATE_UP {
			t.Errorf("%s is %v: %s", m.uri(), got.GetState(), got.GetReason())
		}
	}
	s.eventually("the machine that can tell was asked", func() bool { return asked.Load() > before })
	s.mustBuild(s.drv("other", drvConfig{}))
}

// shellOf answers the scripts of look.go and leftover.go: the sshd process is a new
// one for every connection.
func shellOf(m *fakeMachine, ended *atomic.Int32, gone func() string) func(string) string {
	return func(script string) string {
		if strings.Contains(script, endGreeting) {
			ended.Add(1)
			return endGreeting + "\n" + gone() + "\n"
		}
		return fmt.Sprintf("%s\nboot b\nparent %d (sshd) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 77\nstore dev 4096 0 2048 50%% /\nend\n",
			lookGreeting, 1000+m.ssh.Handshakes())
	}
}

// TestLeftoverIsEndedBeforeItsSlotIsFree cuts a machine off with two builds on it.
func TestLeftoverIsEndedBeforeItsSlotIsFree(t *testing.T) {
	t.Parallel()
	m, m2 := oneMachine("ssh"), namedMachine("ssh", "m2")
	m.slots, m2.slots = 2, 2
	var ended atomic.Int32
	var gone atomic.Value
	gone.Store("left")
	m.shell = shellOf(m, &ended, func() string { return gone.Load().(string) })
	m.build = untilGone
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m, m2}, options: func(o *Options) { o.LoadInterval = time.Minute }})
	s.eventually("the machine has reported its load", func() bool { return s.machineStatus(m).GetLoad().GetStoreFreeBytes() == 2<<20 })
	if got := s.machineStatus(m2); got.GetLoad() != nil || !strings.Contains(got.GetLoadUnknown(), "runs no other commands") {
		t.Errorf("the other machine: %v", got)
	}
	var asked []*hookClient
	for n := range 2 {
		h := s.hook()
		h.accepted(s.drv(fmt.Sprint("lost-", n), drvConfig{}))
		asked = append(asked, h)
	}
	s.eventually("one of them is there", func() bool { return m.building() >= 1 })
	lost := m.building()
	m.ssh.Cut() // and is back at once
	for _, h := range asked {
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	}
	s.eventually("it was tried to end what is left", func() bool { return ended.Load() > 0 })
	if got := s.machineStatus(m).GetRunning(); int(got) != lost {
		t.Errorf("%d slots in use while something is left, want %d", got, lost)
	}
	gone.Store("gone")
	s.eventually("its slots are free", func() bool { return s.machineStatus(m).GetRunning() == 0 })
}

// TestLostConnectionIsTidiedUp cuts off a machine on which nothing is built: what
// copied inputs, or did nothing, is ended there as well.
func TestLostConnectionIsTidiedUp(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	var ended atomic.Int32
	m.shell = shellOf(m, &ended, func() string { return "gone" })
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, options: func(o *Options) { o.LoadInterval = time.Minute }})
	s.eventually("the machine has reported its load", func() bool { return s.machineStatus(m).GetLoad() != nil })
	if n := ended.Load(); n != 0 {
		t.Errorf("something was ended %d times before", n)
	}
	m.ssh.Cut()
	s.eventually("what is left is ended", func() bool { return ended.Load() == 1 })
}
