package integration

import (
	"context"
	"strings"
	"syscall"
	"time"

	"nixdispatch/deploy/fleet"
)

// A mishap is something that happens to a machine, or on the way to it, while
// work is under way.
type mishap struct {
	name   string
	scheme string // of the machines; "" for ssh
	user   string // of the machines; "" for root
	rate   int64  // of the victim's line in bytes a second; 0 for no bound
	good   int    // pieces that can be built, for each of two callers; 0 for 6
	size   int    // of inputs and outputs
	script string // of the builders; "" to take a while
	at     string // when it begins: one of the moments
	begin  func(v victim)
	// end is called when all callers are done, and then heal.
	end func(v victim)
	// keeps says that the victim's connection must survive.
	keeps bool
	// leaves says that something is left on the victim, which must be ended.
	leaves bool
}

// A victim is the machine that a mishap happens to.
type victim struct {
	s *site
	*fleet.Host
}

// The moments at which a mishap can begin.
const (
	beforeAll  = "before all"        // before anything is asked for
	onUpload   = "copying an input"  // it is partly there
	whileBuilt = "building"          // a builder runs
	onDownload = "copying an output" // it is complete there
	lineRate   = 125_000             // 1 Mbit/s
	shortRate  = 400_000             // slow enough to cut into a copy
	someSize   = 600_000             // of an input that takes a while then
	flapsFor   = time.Minute         // how long a link flaps
	flapsEvery = 2 * time.Second     // and how long it is there, and not
	sshdLog    = "/var/log/sshd.log" // where the fleet has sshd's log
	fullStore  = "/nix/store"        // what has no room left
	buildDirs  = "/tmp /nix/var/nix/builds"
)

// mishaps happen one at a time to the machine that all builds prefer.
var mishaps = []mishap{
	{name: "killed", at: whileBuilt, begin: victim.kill},
	{name: "rebooted", scheme: "ssh-ng", at: whileBuilt, begin: func(v victim) { v.kill(); v.heal() }},
	{name: "frozen", scheme: "ssh-ng", at: whileBuilt, begin: victim.freeze},
	{name: "cut off before the first connection", at: beforeAll, begin: victim.cutOffAtStart},
	{name: "cut off while inputs travel", rate: shortRate, size: someSize, at: onUpload, begin: victim.cutOff},
	{name: "cut off while it builds", at: whileBuilt, begin: victim.cutOff, leaves: true},
	{name: "cut off while its nix-daemon builds", scheme: "ssh-ng", user: "nix", at: whileBuilt, begin: victim.cutOff, leaves: true},
	{name: "cut off while outputs travel", rate: shortRate, size: someSize, at: onDownload, begin: victim.cutOff},
	{name: "link flaps", scheme: "ssh-ng", at: whileBuilt, good: 40, begin: victim.flap},
	{name: "slow link", rate: lineRate, size: 1_000_000, at: beforeAll, begin: func(victim) {}, keeps: true},
	{name: "store full", at: beforeAll, begin: victim.fillStore, end: victim.emptyStore},
	{
		name: "build directory full", at: beforeAll, begin: victim.fillBuilds, end: victim.emptyBuilds,
		script: "head -c 3M /dev/zero >$TMPDIR/room || exit 1; sleep 2",
	},
	{name: "sshd restarted", scheme: "ssh-ng", at: whileBuilt, begin: victim.restartSSHD},
	{
		name: "nix-daemon stopped", scheme: "ssh-ng", user: "nix", at: whileBuilt,
		begin: func(v victim) { v.must(v.StopNixDaemon(v.s.t.Context())) },
		end:   func(v victim) { v.must(v.StartNixDaemon(v.s.t.Context())) },
	},
}

// must fails the test on an error.
func (v victim) must(err error) {
	v.s.t.Helper()
	if err != nil {
		v.s.t.Fatal(err)
	}
}

func (v victim) kill()   { v.must(v.Kill(v.s.t.Context())) }
func (v victim) freeze() { v.must(v.Freeze(v.s.t.Context())) }
func (v victim) cutOff() { v.must(v.CutOff(v.s.t.Context())) }

// cutOffAtStart has nix-dispatchd never have seen the machine.
func (v victim) cutOffAtStart() {
	v.cutOff()
	v.s.stopDaemon(syscall.SIGKILL)
	v.s.startUnready()
}

// flap has the link go and come back for a while.
func (v victim) flap() {
	for end := time.Now().Add(flapsFor); time.Now().Before(end); time.Sleep(flapsEvery) {
		v.cutOff()
		time.Sleep(flapsEvery)
		v.heal()
	}
}

// fillStore gives the machine, which has built nothing yet, a store of its own
// with no room. emptyStore makes room.
func (v victim) fillStore() {
	v.s.onHost(v.Host, "mount -t tmpfs -o size=1m,mode=1775,gid=nixbld tmpfs "+fullStore+
		"; head -c 2M /dev/zero >"+fullStore+"/.full 2>/dev/null || :")
}

func (v victim) emptyStore() { v.s.onHost(v.Host, "rm "+fullStore+"/.full") }

// fillBuilds gives the machine too little room to build in, wherever its Nix does
// so. emptyBuilds makes room.
func (v victim) fillBuilds() {
	v.s.onHost(v.Host, "for d in "+buildDirs+"; do mkdir -p $d; mount -t tmpfs -o size=1m,mode=$(stat -c %a $d) tmpfs $d; done")
}

func (v victim) emptyBuilds() {
	v.s.onHost(v.Host, "for d in "+buildDirs+"; do mount -o remount,size=64m $d; done")
}

// restartSSHD ends every connection with a reset, and has sshd back a second
// later.
func (v victim) restartSSHD() {
	v.signal(syscall.SIGKILL, "sshd")
	time.Sleep(time.Second)
	v.s.onHost(v.Host, "/usr/sbin/sshd -E "+sshdLog)
}

// signal signals all processes of the machine whose program's name begins so.
func (v victim) signal(sig syscall.Signal, program string) {
	for _, pid := range pids(v.Host, func(cmdline string) bool {
		return strings.HasPrefix(strings.TrimPrefix(cmdline, "/usr/sbin/"), program)
	}) {
		_ = syscall.Kill(pid, sig) // it may have ended with another
	}
}

// heal has the machine on, running and reachable.
func (v victim) heal() {
	v.s.t.Helper()
	ctx := context.WithoutCancel(v.s.t.Context())
	switch v.State() {
	case "off":
		v.must(v.Boot(ctx))
	case "frozen":
		v.must(v.Thaw(ctx))
	case "cut off":
		v.must(v.Restore(ctx))
	}
}

// await waits until work is at a moment on the machine.
func (v victim) await(moment, work string) {
	v.s.t.Helper()
	v.s.eventually(time.Minute, work+" has come to "+moment+" on "+v.Name(), func() bool {
		switch moment {
		case onUpload:
			return v.has("/nix/store", "-source-"+work)
		case whileBuilt:
			return v.has("/var/tmp", strings.TrimPrefix(began, "/var/tmp/")+work)
		case onDownload:
			return v.has("/var/tmp", strings.TrimPrefix(ended, "/var/tmp/")+work)
		}
		return true
	})
}

// has tells whether a directory has a name that holds text.
func (v victim) has(dir, text string) bool {
	v.s.t.Helper()
	names, err := v.ReadDir(dir)
	v.must(err)
	for _, name := range names {
		if strings.Contains(name, text) {
			return true
		}
	}
	return false
}
