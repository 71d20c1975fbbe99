package daemon

import (
	"bytes"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// shells are those on this host that a machine's /bin/sh may be.
func shells(t *testing.T) [][]string {
	t.Helper()
	var found [][]string
	for _, argv := range [][]string{{"dash"}, {"bash", "--posix"}, {"busybox", "sh"}, {"mksh"}} {
		if path, err := exec.LookPath(argv[0]); err == nil {
			found = append(found, append([]string{path}, argv[1:]...))
		}
	}
	if len(found) == 0 {
		t.Skip("no shell is known here")
	}
	return found
}

// runScript gives a shell a script, and returns what that prints.
func runScript(t *testing.T, shell []string, script string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), shell[0], shell[1:]...)
	cmd.Stdin = strings.NewReader(script)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Errorf("%v: %v", shell, err)
	}
	if stderr.Len() > 0 {
		t.Errorf("%v: the script complains: %s", shell, stderr.Bytes())
	}
	return stdout.String()
}

// TestLookScriptTellsOfThisHost runs the script as a machine would.
func TestLookScriptTellsOfThisHost(t *testing.T) {
	t.Parallel()
	for _, shell := range shells(t) {
		text := runScript(t, shell, lookInput("/"))
		l, ok := parseLook([]byte("motd\n"+text), time.Now())
		if !ok {
			t.Errorf("%v: not understood:\n%s", shell, text)
			continue
		}
		m := l.load
		if m.StoreFreeBytes == nil || m.StoreSizeBytes == nil || m.BuildDirFreeBytes == nil || m.Load1 == nil || m.Load15 == nil ||
			m.GetCores() == 0 || m.GetMemorySizeBytes() < 1<<20 || m.MemoryAvailableBytes == nil {
			t.Errorf("%v: something is missing: %v, of\n%s", shell, m, text)
		}
		if l.sshd != (process{}) {
			t.Errorf("%v: the parent %v is taken for sshd", shell, l.sshd)
		}
	}
}

// TestLookScriptRunsAnywhere has a host with nothing that the script would use.
func TestLookScriptRunsAnywhere(t *testing.T) {
	t.Parallel()
	for _, shell := range shells(t) {
		script := strings.ReplaceAll(lookInput("/nowhere"), "/proc/", "/nowhere/")
		script = strings.Replace(script, scriptPath, "PATH=/nowhere\n", 1)
		l, ok := parseLook([]byte(runScript(t, shell, script)), time.Unix(0, 0))
		if diff := cmp.Diff(&dispatchv1.MachineLoad{Time: timestamppb.New(time.Unix(0, 0))}, l.load, protocmp.Transform()); !ok || diff != "" {
			t.Errorf("%v: %v, (-want +got):\n%s", shell, ok, diff)
		}
	}
}

func TestParseLook(t *testing.T) {
	t.Parallel()
	at := time.Unix(1_800_000_000, 0)
	linux := `Welcome!
nix-dispatch-look 1
boot 2a9a5b7c-5b0f-4a39-8d4c-6a1f4f6ff0a6
parent 4711 (sshd-session) S 4700 4711 4711 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456 17 18
loadavg 1.50 0.75 0.25 2/345 6789
cores 16
memory MemTotal: 65536
memory MemAvailable: 1024
pressure cpu some avg10=12.50 avg60=0.10 avg300=0.00 total=12345
pressure io some avg10=0.00 avg60=0.10 avg300=0.00 total=12345
pressure memory full avg10=1.00 avg60=0.10 avg300=0.00 total=12345
build Filesystem 1024-blocks Used Available Capacity Mounted on
build tmpfs 1000 0 1000 0% /tmp
store Filesystem 1024-blocks Used Available Capacity Mounted on
store a pool/with 5% blanks 2000 500 1500 25% /nix/a store
end
`
	want := look{
		sshd: process{boot: "2a9a5b7c-5b0f-4a39-8d4c-6a1f4f6ff0a6", pid: "4711", start: "123456"},
		load: &dispatchv1.MachineLoad{
			Time: timestamppb.New(at), Load1: proto.Float64(1.5), Load5: proto.Float64(0.75), Load15: proto.Float64(0.25),
			Cores: proto.Uint32(16), MemorySizeBytes: proto.Uint64(64 << 20), MemoryAvailableBytes: proto.Uint64(1 << 20),
			CpuPressure: proto.Float64(0.125), IoPressure: proto.Float64(0),
			BuildDirSizeBytes: proto.Uint64(1000 << 10), BuildDirFreeBytes: proto.Uint64(1000 << 10),
			StoreSizeBytes: proto.Uint64(2000 << 10), StoreFreeBytes: proto.Uint64(1500 << 10),
		},
	}
	got, ok := parseLook([]byte(linux), at)
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(look{}, process{}), protocmp.Transform()); !ok || diff != "" {
		t.Errorf("%v, (-want +got):\n%s", ok, diff)
	}
	const head = lookGreeting + "\n"
	for name, text := range map[string]string{
		"nothing": "", "another program": "\xcb\xee\x52\x54", "no end": head + "cores 4\n",
		"too long a line": head + strings.Repeat("x", maxLookLine+1) + "\nend\n", "too much": head + strings.Repeat("x\n", maxLook) + "end\n",
	} {
		if _, ok := parseLook([]byte(text), at); ok {
			t.Errorf("%s: understood", name)
		}
	}
	for name, c := range map[string]struct {
		line string
		has  func(look) bool
		want bool
	}{
		"macOS's load":    {"loadavg { 1.20 1.30 1.40 }", func(l look) bool { return l.load.GetLoad15() == 1.4 }, true},
		"macOS's uptime":  {"loadavg 10:01  up 3 days, 2 users, load averages: 1.20 1.30 1.40", func(l look) bool { return l.load.GetLoad1() == 1.2 }, true},
		"Linux's uptime":  {"loadavg 10:01:02 up 3 days, 2 users,  load average: 1.20, 1.30, 1.40", func(l look) bool { return l.load.GetLoad5() == 1.3 }, true},
		"no number":       {"loadavg NaN Inf -1", func(l look) bool { return l.load.Load1 != nil }, false},
		"no cores":        {"cores 0", func(l look) bool { return l.load.Cores != nil }, false},
		"macOS's memory":  {"memory bytes 17179869184", func(l look) bool { return l.load.GetMemorySizeBytes() == 16<<30 }, true},
		"too much memory": {"memory MemTotal: 99999999999999999", func(l look) bool { return l.load.MemorySizeBytes != nil }, false},
		"much pressure":   {"pressure cpu some avg10=100.01", func(l look) bool { return l.load.CpuPressure != nil }, false},
		"more than all":   {"store x 10 0 11 0% /", func(l look) bool { return l.load.StoreFreeBytes != nil }, false},
		"no parent":       {"boot a\nparent 1 (sshd) S 0", func(l look) bool { return l.sshd != process{} }, false},
		"another parent": {"boot a\nparent 1 (sudo) S 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22",
			func(l look) bool { return l.sshd != process{} }, false},
		"a parent of no boot": {"boot it's\nparent 1 (sshd) S 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22",
			func(l look) bool { return l.sshd != process{} }, false},
		"a parent with a bad name": {"boot a\nparent 12 (sshd: x) S 1 () R) S 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22",
			func(l look) bool { return l.sshd == process{"a", "12", "20"} }, true},
	} {
		l, ok := parseLook([]byte(head+c.line+"\nend\n"), at)
		if !ok || c.has(l) != c.want {
			t.Errorf("%s: %v, %v", name, ok, l)
		}
	}
}

func FuzzParseLook(f *testing.F) {
	f.Add([]byte(lookGreeting + "\nboot a\nparent 1 (sshd) S 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22\nend\n"))
	f.Add([]byte(lookGreeting + "\nstore x 10 0 10 0% /\nbuild x 10 0 10 0% /\npressure io some avg10=1\nmemory bytes 7\ncores 3\nloadavg 1 2 3\nend\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, ok := parseLook(text, time.Now())
		if !ok {
			return
		}
		m := l.load
		if m.GetStoreFreeBytes() > m.GetStoreSizeBytes() || m.GetBuildDirFreeBytes() > m.GetBuildDirSizeBytes() {
			t.Errorf("more free than there is: %v", m)
		}
		for _, share := range []float64{m.GetCpuPressure(), m.GetMemoryPressure(), m.GetIoPressure()} {
			if !(share >= 0 && share <= 1) {
				t.Errorf("a share of %v", share)
			}
		}
		if p := l.sshd; p != (process{}) && (p.boot == "" || !isNumber(p.pid) || !isNumber(p.start) || strings.ContainsAny(p.boot, "' \n")) {
			t.Errorf("a process %q", p)
		}
		if word, reason := (&condition{gates: everyGate, load: m}).parked(time.Now()); (word == "") != (reason == "") {
			t.Errorf("parked for %q: %q", word, reason)
		}
	})
}

// everyGate is closed to all but idle machines.
var everyGate = Gates{MinFree: 1 << 40, MaxLoad: 0.1, MinMemory: 1 << 40, MaxPressure: map[string]float64{"cpu": 0.1, "memory": 0.1, "io": 0.1}}

func TestStoreDirOf(t *testing.T) {
	t.Parallel()
	for uri, want := range map[string]string{
		"ssh://mac": "/nix/store", "ssh-ng://mac?remote-store=/srv/x": "/srv/x", "ssh://mac?remote-store=auto": "/nix/store",
		"ssh://mac?remote-store=local?root=/x": "", "/srv/store": "/srv/store",
	} {
		lines, errs := nix.ParseMachines(uri, nix.MachinesOptions{DefaultSystems: []string{"x86_64-linux"}})
		if len(errs) > 0 {
			t.Fatal(errs)
		}
		if got := storeDirOf(lines[0]); got != want {
			t.Errorf("%s: %q, want %q", uri, got, want)
		}
	}
}

// processOf is what a look would tell of a process of this host.
func processOf(t *testing.T, pid int) process {
	t.Helper()
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Skip(err)
	}
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	return process{boot: strings.TrimSpace(string(boot)), pid: strconv.Itoa(pid), start: fields[19]}
}
