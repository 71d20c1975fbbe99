package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/worker"
)

// A fakeHost is a host made of maps.
type fakeHost struct {
	version string
	trust   worker.Trust
	uid     int
	files   map[string]string
	// args and env are nix-daemon's; nil args for no such process.
	args, env []string
	// sealed hides the environment.
	sealed bool
}

func (f fakeHost) host(t *testing.T) *host {
	t.Helper()
	proc := t.TempDir()
	write := func(pid, name, text string, mode os.FileMode) {
		dir := filepath.Join(proc, pid)
		if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, name), []byte(text), mode)); err != nil {
			t.Fatal(err)
		}
	}
	write("1", "comm", "init\n", 0o644)
	if f.args != nil {
		for pid, args := range map[string][]string{"70": {"nix-daemon", "--stdio"}, "80": f.args} {
			write(pid, "comm", "nix-daemon\n", 0o644)
			write(pid, "cmdline", strings.Join(args, "\x00")+"\x00", 0o644)
			write(pid, "environ", strings.Join(f.env, "\x00")+"\x00", 0o644)
		}
		if f.sealed {
			os.Remove(filepath.Join(proc, "80", "environ"))
		}
	}
	return &host{
		uid: f.uid, proc: proc, rootHome: "/root", rootUID: os.Getuid(),
		getenv: func(string) string { return "" },
		readFile: func(name string) ([]byte, error) {
			if text, ok := f.files[name]; ok {
				return []byte(text), nil
			}
			return nil, fs.ErrNotExist
		},
		askNix:    func() (localNix, error) { return localNix{f.version, f.trust, func() {}}, nil },
		findStock: func(func(string) string, string) (string, error) { return "/usr/libexec/nix/build-remote", nil },
		group:     func(string) (*user.Group, error) { return nil, user.UnknownGroupError("nix-dispatch") },
	}
}

// about returns the findings about a subject, each as "level: text; fix".
func about(found []finding, subject string) string {
	var lines []string
	for _, f := range found {
		if f.Subject == subject {
			lines = append(lines, f.Level+": "+f.Text+"; "+f.Fix)
		}
	}
	return strings.Join(lines, "\n")
}

func TestDoctorOnBuildHook(t *testing.T) {
	dir := t.TempDir()
	hook := filepath.Join(dir, "nix-dispatch-hook")
	both := filepath.Join(dir, "nix-dispatch")
	for _, name := range []string{hook, both} {
		if err := os.WriteFile(name, nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const conf, rootConf = "/etc/nix/nix.conf", "/root/.config/nix/nix.conf"
	line := "build-hook = " + hook + "\n"
	daemon := []string{"nix-daemon"}
	tests := []struct {
		name string
		host fakeHost
		want string // about build-hook, the beginning, with the fix
		root string // about root's own builds
	}{
		{"in nix.conf", fakeHost{version: "2.34.8", args: daemon, files: map[string]string{conf: line}},
			"ok: nix-daemon runs " + hook + " (set by /etc/nix/nix.conf)", "ok: they run " + hook},
		{"in a file that nix.conf includes", fakeHost{version: "2.8.0", args: daemon, files: map[string]string{conf: "!include hook.conf\n", "/etc/nix/hook.conf": line}},
			"ok: ", "ok: "},
		{"in a nix.conf elsewhere", fakeHost{version: "2.34.8", args: daemon, env: []string{"NIX_CONF_DIR=/conf"}, files: map[string]string{"/conf/nix.conf": line}},
			"ok: nix-daemon runs " + hook + " (set by /conf/nix.conf)", "warning: they do not pass nix-daemon"},
		{"in a nix.conf that does not count", fakeHost{version: "2.26.3", args: daemon, files: map[string]string{conf: line}},
			"problem: /etc/nix/nix.conf sets it, and Nix 2.26.3 ignores it there; run 'nix-dispatch enable' as root", "warning: they do not pass nix-daemon"},
		{"in the environment", fakeHost{version: "2.26.3", args: daemon, env: []string{"A=b", "NIX_CONFIG=max-jobs = 1\n" + line}},
			"ok: nix-daemon runs " + hook + " (set by NIX_CONFIG in nix-daemon's environment)",
			"warning: they do not pass nix-daemon, and do not use nix-dispatch; run 'nix-dispatch enable' as root"},
		{"in both", fakeHost{version: "2.26.3", args: daemon, env: []string{"NIX_CONFIG=" + line}, files: map[string]string{rootConf: line}},
			"ok: ", "ok: they run " + hook + " (set by /root/.config/nix/nix.conf)"},
		{"on the command line", fakeHost{version: "2.26.3", args: []string{"nix-daemon", "--option", "build-hook", both + " hook"}, env: []string{"NIX_CONFIG=build-hook = /other"}},
			"ok: nix-daemon runs " + both + " hook (set by nix-daemon's command line)", "warning: "},
		{"nowhere", fakeHost{version: "2.34.8", args: daemon}, "next: Nix does not use nix-dispatch yet; run 'nix-dispatch enable' as root", ""},
		{"empty", fakeHost{version: "2.34.8", args: daemon, files: map[string]string{conf: "build-hook =\n"}},
			`problem: /etc/nix/nix.conf sets it to "", which is not nix-dispatch; take it out there`, "warning: "},
		{"another", fakeHost{version: "2.34.8", args: daemon, files: map[string]string{conf: "build-hook = /bin/hook\n"}},
			`problem: /etc/nix/nix.conf sets it to "/bin/hook", which is not nix-dispatch`, "warning: "},
		{"another in the environment", fakeHost{version: "2.34.8", args: daemon, env: []string{"NIX_CONFIG=build-hook = /bin/hook"}, files: map[string]string{conf: line}},
			`problem: NIX_CONFIG in nix-daemon's environment sets it to "/bin/hook"`, "ok: "},
		{"nix-dispatch without hook", fakeHost{version: "2.34.8", args: daemon, files: map[string]string{conf: "build-hook = " + both}}, "problem: ", "warning: "},
		{"no such program", fakeHost{version: "2.34.8", args: daemon, files: map[string]string{conf: "build-hook = /no/nix-dispatch-hook"}},
			`problem: /etc/nix/nix.conf names "/no/nix-dispatch-hook", which cannot be run`, "ok: "},
		{"arguments for an old Nix", fakeHost{version: "2.8.0", args: daemon, files: map[string]string{conf: "build-hook = " + both + " hook"}},
			"problem: /etc/nix/nix.conf sets it to \"" + both + " hook\", but Nix 2.8.0 takes a path without arguments", "ok: "},
		{"a bad line", fakeHost{version: "2.34.8", args: daemon, files: map[string]string{conf: "build-hook\n"}}, "problem: /etc/nix/nix.conf:1: ", ""},
		{"nothing to be seen", fakeHost{version: "2.26.3", uid: 1000, args: daemon, sealed: true},
			"warning: not known whether Nix runs nix-dispatch: nix-daemon's environment cannot be seen; run this as root", ""},
		{"no process", fakeHost{version: "2.34.8"}, "warning: not known whether Nix runs nix-dispatch: no process nix-daemon", ""},
		{"nix.conf is enough", fakeHost{version: "2.34.8", uid: 1000, args: daemon, sealed: true, files: map[string]string{conf: line}}, "ok: ", ""},
		{"as another user", fakeHost{version: "2.26.3", uid: 1000, args: daemon, env: []string{"NIX_CONFIG=" + line}},
			"ok: ", "warning: not known whether they use nix-dispatch"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var found []finding
			lookAtSetting(tt.host.host(t), tt.host.version, func(f finding) { found = append(found, f) })
			if got := about(found, hookSubject); !strings.HasPrefix(got, tt.want) {
				t.Errorf("said %q, want %q", got, tt.want)
			}
			if got := about(found, rootSubject); !strings.HasPrefix(got, tt.root) || tt.root == "" && got != "" {
				t.Errorf("of root's builds it said %q, want %q", got, tt.root)
			}
		})
	}
}

// lookAtSetting is what look does about nix-daemon's process.
func lookAtSetting(h *host, version string, tell func(finding)) {
	d, err := h.findNixDaemon()
	if err != nil {
		h.lookAtFilesAlone(hookRules(version), err, tell)
		return
	}
	h.lookAtHook(d, hookRules(version), tell)
}

func TestDoctorOnBuilders(t *testing.T) {
	system := nix.SystemName(runtime.GOOS, runtime.GOARCH)
	served := &servedList{
		lines: []*dispatchv1.Machine{
			{StoreUri: "ssh://mac", Systems: []string{system}, MaxJobs: 4, SpeedFactor: 1},
			{StoreUri: "ssh://kitty", Systems: []string{"riscv64-linux"}, MaxJobs: 1, SpeedFactor: 2, SupportedFeatures: []string{"kvm"}},
		},
		others: []string{"unix:///elsewhere"},
	}
	const conf, machines = "/etc/nix/nix.conf", "/etc/nix/machines"
	const both = "ssh://mac - - 4\nssh://kitty riscv64-linux - 1 2 kvm\n"
	for _, tt := range []struct {
		name  string
		files map[string]string
		args  []string
		want  string
	}{
		{"the default", map[string]string{machines: both}, nil, "ok: nix-daemon and nix-dispatchd have the same list (which is the default, @/etc/nix/machines)"},
		{"with what is left to others", map[string]string{machines: both + "unix:///elsewhere"}, nil, "ok: "},
		{"in nix.conf", map[string]string{conf: "builders = ssh://mac - - 4 ; ssh://kitty riscv64-linux - 1 2 kvm\n"}, nil, "ok: nix-daemon and nix-dispatchd have the same list (set by /etc/nix/nix.conf)"},
		{"on the command line", map[string]string{machines: both}, []string{"--option", "builders", "ssh://old ; ssh://mac - - 5"},
			"warning: nix-daemon's setting (set by nix-daemon's command line) is not the list that nix-dispatchd serves: " +
				"only Nix has ssh://old; only nix-dispatchd has ssh://kitty; not the same in both: ssh://mac; builds go by Nix's; give both the same list"},
		{"empty", map[string]string{machines: both, conf: "builders =\n"}, nil, "problem: nix-daemon's setting is empty (set by /etc/nix/nix.conf): its builds ask for no machine; take that out"},
		{"another file that is not there", map[string]string{conf: "builders = @/no/such/file\n"}, nil, "warning: nix-daemon's setting (set by /etc/nix/nix.conf) is not the list"},
		{"bad", map[string]string{conf: "builders = ssh://mac - - many\n"}, nil, "problem: nix-daemon's setting (set by /etc/nix/nix.conf): builders:1: "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := fakeHost{version: "2.34.8", args: append([]string{"nix-daemon"}, tt.args...), files: tt.files}.host(t)
			d, err := h.findNixDaemon()
			if err != nil {
				t.Fatal(err)
			}
			var found []finding
			h.lookAtBuilders(d, served, func(f finding) { found = append(found, f) })
			if got := about(found, buildersSubject); !strings.HasPrefix(got, tt.want) || len(found) != 1 {
				t.Errorf("said %q, want %q", got, tt.want)
			}
		})
	}
}

func TestDoctorOnSocketAndTrust(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	me := os.Getuid()
	for _, tt := range []struct {
		name  string
		mode  os.FileMode
		trust worker.Trust
		uid   int
		gid   string // of the group nix-dispatch; "" for no group
		owner int    // whom the socket should be seen to belong to
		want  map[string]string
	}{
		{"open to all", 0o666, worker.Trusted, me, "", me, map[string]string{"socket": "warning: " + socket + " has mode 0666"}},
		{"no group", 0o660, worker.Trusted, me, "", 0, map[string]string{"socket": "ok: only root may use"}},
		{"the group's", 0o660, worker.Trusted, me, strconv.Itoa(os.Getgid()), 0, map[string]string{"socket": "ok: root and the group"}},
		{"another group's", 0o660, worker.Trusted, me, "54321", 0, map[string]string{"socket": "warning: " + socket + " does not belong to the group"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.owner == 0 && me != 0 {
				t.Skip("the socket would have to be root's")
			}
			if err := os.Chmod(socket, tt.mode); err != nil {
				t.Fatal(err)
			}
			h := fakeHost{version: "2.34.8", trust: tt.trust, uid: tt.uid}.host(t)
			if tt.gid != "" {
				h.group = func(string) (*user.Group, error) { return &user.Group{Gid: tt.gid}, nil }
			}
			var found []finding
			h.look(socket, nil, func(f finding) { found = append(found, f) })
			for subject, want := range tt.want {
				if got := about(found, subject); !strings.HasPrefix(got, want) {
					t.Errorf("%s: %q, want %q", subject, got, want)
				}
			}
		})
	}
	for _, tt := range []struct {
		owner, uid int
		trust      worker.Trust
		want       string
	}{
		{0, 1000, worker.NotTrusted, "ok: nix-dispatchd runs as root"},
		{1000, 1000, worker.Trusted, "ok: the local nix-daemon trusts user 1000"},
		{1000, 1000, worker.NotTrusted, "problem: nix-dispatchd runs as user 1000, whom the local nix-daemon does not trust"},
		{1000, 1000, worker.TrustUnknown, "warning: not known"},
		{1000, 0, worker.Trusted, "warning: not known"},
		{-1, 0, worker.Trusted, ""},
	} {
		var found []finding
		(&host{uid: tt.uid}).lookAtTrust(tt.owner, tt.trust, func(f finding) { found = append(found, f) })
		if got := about(found, "trusted-users"); !strings.HasPrefix(got, tt.want) || tt.want == "" && got != "" {
			t.Errorf("daemon of %d, asked by %d: %q, want %q", tt.owner, tt.uid, got, tt.want)
		}
	}
}

func TestDoctorOnDaemonAndMachines(t *testing.T) {
	step := func(name, detail string, v dispatchv1.PingVerdict, cause, fix string) *dispatchv1.PingResponse {
		return &dispatchv1.PingResponse{Step: name, Verdict: v, Took: durationpb.New(time.Millisecond), Detail: detail, Cause: cause, Fix: fix}
	}
	d := (&fakeDaemon{
		status: &dispatchv1.StatusResponse{
			Version: "other", Unplaceable: 2,
			Errors: []*dispatchv1.MachineError{{Message: "m:3: bad"}},
			Reload: &dispatchv1.ReloadStatus{Errors: []*dispatchv1.MachineError{{Message: "m:4: worse"}}},
			Machines: []*dispatchv1.MachineStatus{
				{Uri: "ssh://mac", State: dispatchv1.MachineState_MACHINE_STATE_UP},
				{Uri: "ssh://down", State: dispatchv1.MachineState_MACHINE_STATE_DOWN},
				{Uri: "ssh://claims", Drained: true, Reason: "since yesterday"},
				{Uri: "unix:///x", State: dispatchv1.MachineState_MACHINE_STATE_UNSUPPORTED, Reason: "left to the stock hook"},
				{Uri: "ssh://gone", Removed: true},
			},
		},
		ping: func(req *dispatchv1.PingRequest, s grpc.ServerStreamingServer[dispatchv1.PingResponse]) error {
			if !req.GetClaims() {
				t.Errorf("%s: not asked for claims", req.GetMachine())
			}
			s.Send(step("protocol", "worker protocol 1.38, Nix 2.26.3", dispatchv1.PingVerdict_PING_VERDICT_OK, "", ""))
			switch req.GetMachine() {
			case "ssh://down":
				return s.Send(step("store", "the disk\nthere is full", dispatchv1.PingVerdict_PING_VERDICT_FAILED, "disk full", "make room"))
			case "ssh://claims":
				s.Send(step("trust", "not trusted", dispatchv1.PingVerdict_PING_VERDICT_WARNING, "user not trusted", "trust"))
				return s.Send(step("claims", "no feature kvm", dispatchv1.PingVerdict_PING_VERDICT_WARNING, "claims", "take it out"))
			}
			return s.Send(step("trust", "trusted", dispatchv1.PingVerdict_PING_VERDICT_OK, "", ""))
		},
	}).start(t)
	code, stdout, _ := runCommand(t.Context(), d.socket, "doctor", "--json")
	var got struct {
		OK       bool
		Findings []finding
	}
	if err := json.Unmarshal([]byte(stdout), &got); err != nil || code != exitFailed || got.OK {
		t.Fatalf("status %d, printed %q: %v", code, stdout, err)
	}
	for subject, want := range map[string]string{
		"nix-dispatchd":    `warning: version "other" answers at `,
		"list of machines": "problem: m:3: bad; mend it; 'nix-dispatch machines check' shows how the list is read\nproblem: it was not read anew: m:4: worse",
		"builds":           "warning: 2 wait though no machine can ever take them",
		"ssh://mac":        "ok: its Nix was reached in 2 ms: worker protocol 1.38, Nix 2.26.3; trusted; ",
		"ssh://down":       "problem: store: disk full: the disk\nthere is full; make room",
		"ssh://claims":     "warning: it is drained, since yesterday; 'nix-dispatch undrain' gives it builds again\nok: its Nix was reached in 3 ms: ",
		"unix:///x":        "warning: left to the stock hook",
		"ssh://gone":       "",
	} {
		if got := about(got.Findings, subject); !strings.HasPrefix(got, want) || want == "" && got != "" {
			t.Errorf("%s: %q, want %q", subject, got, want)
		}
	}
	if got := about(got.Findings, "ssh://claims"); !strings.Contains(got, "\nproblem: claims: no feature kvm; take it out") || !strings.Contains(got, "\nwarning: trust: user not trusted: ") {
		t.Errorf("claims: %q", got)
	}
	code, stdout, _ = runCommand(t.Context(), d.socket, "doctor")
	if code != exitFailed || !strings.Contains(stdout, "problem  ssh://down: store: disk full: the disk there is full; make room\n") || !strings.Contains(stdout, "\nproblems: ") {
		t.Errorf("status %d, printed:\n%s", code, stdout)
	}
	if code, stdout, _ := runCommand(t.Context(), filepath.Join(t.TempDir(), "no"), "doctor"); code != exitFailed || !strings.HasPrefix(stdout, "problem  nix-dispatchd: it cannot be asked: dial unix ") {
		t.Errorf("without a daemon: status %d, printed:\n%s", code, stdout)
	}
	if code, _, _ := runCommand(t.Context(), d.socket, "doctor", "mac"); code != exitUsage {
		t.Errorf("with an operand: status %d", code)
	}
}

// Before 'nix-dispatch enable' nothing is wrong, and the last line says what is next.
func TestDoctorEndsWithWhatIsNext(t *testing.T) {
	ready := []finding{fine("nix-daemon", "it answers"), next(hookSubject, howTo, "Nix does not use nix-dispatch yet")}
	for name, test := range map[string]struct {
		found []finding
		want  string // the last lines
		code  int
	}{
		"ready":     {ready, "\nproblems: 0, warnings: 0\nnext: run 'nix-dispatch enable' as root\n", exitOK},
		"a problem": {append(ready, problem("ssh://mac", "start sshd", "it is down")), "problems: 1, warnings: 0\n", exitFailed},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			out.WriteString("\n")
			if code := endDoctor(stdio{out: &out}, test.found, false); code != test.code || !strings.HasSuffix(out.String(), test.want) {
				t.Errorf("status %d, printed %q, want %d and %q", code, out.String(), test.code, test.want)
			}
		})
	}
}
