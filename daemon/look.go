package daemon

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// This file asks a machine how it is: a script for its shell, and a parser for what
// that prints. Where the account runs other commands than those it is asked for, the
// script never runs, and nothing is known.

// lookCommand is what the machine's login shell is asked to run, whichever shell it
// is. The script goes to its standard input, so that it needs no quoting.
const lookCommand = "exec /bin/sh"

// The first lines of what the scripts print, by which it is known that they run.
const (
	lookGreeting = "nix-dispatch-look 1"
	endGreeting  = "nix-dispatch-end 1"
)

// scriptPath is where programs may be whose directories are in no login shell's PATH.
const scriptPath = "PATH=$PATH:/run/current-system/sw/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin LC_ALL=C; export PATH LC_ALL\n"

// lookScript prints what is to be known of a machine, one thing a line. It runs
// anywhere: what is Linux's comes from /proc, and what is not there is left out.
// $store is the directory of the store, "" where it is not known.
const lookScript = `echo ` + lookGreeting + `
{ read -r x </proc/sys/kernel/random/boot_id && echo "boot $x"; } 2>/dev/null
{ read -r x </proc/$PPID/stat && echo "parent $x"; } 2>/dev/null
if [ -r /proc/loadavg ]; then read -r x </proc/loadavg; echo "loadavg $x"
else echo "loadavg $(sysctl -n vm.loadavg 2>/dev/null || uptime 2>/dev/null)"; fi
echo "cores $(getconf _NPROCESSORS_ONLN 2>/dev/null || nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null)"
if [ -r /proc/meminfo ]; then while read -r k v x; do case $k in MemTotal:|MemAvailable:) echo "memory $k $v";; esac; done </proc/meminfo
else echo "memory bytes $(sysctl -n hw.memsize 2>/dev/null || sysctl -n hw.physmem 2>/dev/null)"; fi
for r in cpu memory io; do { read -r x </proc/pressure/$r && echo "pressure $r $x"; } 2>/dev/null; done
build=${TMPDIR:-/tmp}
[ -d /nix/var/nix/builds ] && build=/nix/var/nix/builds
if [ -r /etc/nix/nix.conf ]; then while read -r k e v x; do [ "$k$e" = build-dir= ] && build=$v; done </etc/nix/nix.conf; fi
room() { df -Pk "$2" 2>/dev/null | while read -r x; do echo "$1 $x"; done; }
room build "$build"
[ -n "$store" ] && room store "$store"
echo end
`

// lookInput is the script for a machine whose store is in a directory there.
func lookInput(storeDir string) string {
	return "store=" + shellQuote(storeDir) + "\n" + scriptPath + lookScript
}

// storeDirOf is the directory that a machine's store is in, as its line tells; "" if
// it does not.
func storeDirOf(line nix.Machine) string {
	if isChroot(line.Ref) {
		return line.Ref.Path
	}
	remote := line.Ref.Params["remote-store"]
	switch {
	case remote == "", remote == "auto", remote == "daemon", remote == "local":
		return nix.DefaultStoreDir
	case strings.HasPrefix(remote, "/"):
		return remote
	default:
		return ""
	}
}

// Bounds on what a machine tells of itself.
const (
	maxLook     = 64 << 10
	maxLookLine = 4 << 10
)

// A process is a process of some machine, told apart from all others that ever had,
// or will have, its number.
type process struct {
	boot  string // the machine's, since which it has been up
	pid   string
	start string // in the kernel's clock ticks since then
}

// A look is what a machine told.
type look struct {
	load *dispatchv1.MachineLoad
	// sshd is the process that serves the connection the machine was asked over, and
	// whose children are the remote processes of its sessions; the zero value where
	// that is not certain.
	sshd process
}

// parseLook reads what lookScript prints. It is foreign text: what is not as expected
// is left out. ok tells that the script has run, to its end.
func parseLook(text []byte, at time.Time) (l look, ok bool) {
	if len(text) > maxLook {
		return look{}, false
	}
	l.load = &dispatchv1.MachineLoad{Time: timestamppb.New(at)}
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, maxLookLine)
	greeted, boot := false, ""
	for lines.Scan() {
		line := lines.Text()
		if !greeted { // a start-up file of the shell may be noisy
			greeted = line == lookGreeting
			continue
		}
		what, rest, _ := strings.Cut(line, " ")
		switch what {
		case "end":
			return l, true
		case "boot":
			boot = oneWord(rest)
		case "parent":
			l.sshd = sshdOf(rest, boot)
		case "loadavg":
			l.loadAverage(rest)
		case "cores":
			if n, err := strconv.ParseUint(rest, 10, 16); err == nil && n > 0 {
				cores := uint32(n)
				l.load.Cores = &cores
			}
		case "memory":
			l.memory(rest)
		case "pressure":
			l.pressure(rest)
		case "build", "store":
			l.disk(what, rest)
		}
	}
	return look{}, false
}

// oneWord is s if it is a word without anything odd, else "".
func oneWord(s string) string {
	odd := func(r rune) bool { return r <= ' ' || r > '~' || r == '\'' }
	if len(s) > 100 || strings.ContainsFunc(s, odd) {
		return ""
	}
	return s
}

// sshdOf reads a line of /proc/PID/stat (proc_pid_stat(5)), for a process of sshd's.
func sshdOf(stat, boot string) process {
	pid, rest, _ := strings.Cut(stat, " (")
	end := strings.LastIndex(rest, ") ")
	if end < 0 || !strings.HasPrefix(rest, "sshd") || boot == "" || !isNumber(pid) {
		return process{} // the parent is no process of OpenSSH's, or not on Linux
	}
	fields := strings.Fields(rest[end+2:])
	if len(fields) < 20 || !isNumber(fields[19]) {
		return process{}
	}
	return process{boot: boot, pid: pid, start: fields[19]}
}

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 63)
	return err == nil
}

// loadAverage reads /proc/loadavg, "{ 0.1 0.2 0.3 }" of the BSDs' sysctl, or the end
// of uptime's line.
func (l look) loadAverage(text string) {
	if _, after, ok := strings.Cut(text, "load average"); ok {
		text = strings.TrimLeft(after, "s:")
	}
	var loads []float64
	for word := range strings.FieldsSeq(strings.Trim(text, "{} ")) {
		if n, ok := fraction(strings.TrimSuffix(word, ","), 1e6); ok && len(loads) < 3 {
			loads = append(loads, n)
		}
	}
	if len(loads) == 3 {
		l.load.Load1, l.load.Load5, l.load.Load15 = &loads[0], &loads[1], &loads[2]
	}
}

// fraction reads a number from 0 to most.
func fraction(s string, most float64) (float64, bool) {
	n, err := strconv.ParseFloat(s, 64)
	return n, err == nil && n >= 0 && n <= most // which NaN is not
}

// kibibytes reads a number of KiB, as bytes.
func kibibytes(s string) (*uint64, bool) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n > math.MaxInt64/1024 {
		return nil, false
	}
	n *= 1024
	return &n, true
}

// memory reads a line of /proc/meminfo, or the bytes of the BSDs' sysctl.
func (l look) memory(text string) {
	what, n, _ := strings.Cut(text, " ")
	switch what {
	case "MemTotal:":
		l.load.MemorySizeBytes, _ = kibibytes(n)
	case "MemAvailable:":
		l.load.MemoryAvailableBytes, _ = kibibytes(n)
	case "bytes":
		if n, err := strconv.ParseUint(n, 10, 63); err == nil {
			l.load.MemorySizeBytes = &n
		}
	}
}

// pressure reads the first line of a file in /proc/pressure, such as "some
// avg10=1.50 avg60=0.10 avg300=0.00 total=12345", after its name.
func (l look) pressure(text string) {
	words := strings.Fields(text)
	if len(words) < 3 || words[1] != "some" {
		return
	}
	percent, ok := fraction(strings.TrimPrefix(words[2], "avg10="), 100)
	if !ok {
		return
	}
	share := percent / 100
	switch words[0] {
	case "cpu":
		l.load.CpuPressure = &share
	case "memory":
		l.load.MemoryPressure = &share
	case "io":
		l.load.IoPressure = &share
	}
}

// disk reads a line of "df -Pk": name, KiB in all, used, available, percent, mount
// point. The header is none, and both names may have blanks.
func (l look) disk(of, line string) {
	words := strings.Fields(line)
	for n := 4; n < len(words); n++ {
		percent, isPercent := strings.CutSuffix(words[n], "%")
		size, okSize := kibibytes(words[n-3])
		free, okFree := kibibytes(words[n-1])
		if !isPercent || !isNumber(percent) || !okSize || !okFree || *free > *size {
			continue
		}
		switch of {
		case "store":
			l.load.StoreSizeBytes, l.load.StoreFreeBytes = size, free
		case "build":
			l.load.BuildDirSizeBytes, l.load.BuildDirFreeBytes = size, free
		}
		return
	}
}

// notOurs says that something else ran than the script.
func notOurs(printed []byte) error {
	text := strings.TrimSpace(nix.PlainText(string(printed)))
	if len(text) > 200 {
		text = text[:200] + "..."
	}
	if text == "" {
		return errors.New("the account there runs no other commands than its own")
	}
	return fmt.Errorf("the account there runs no other commands than its own: it printed %q", text)
}
