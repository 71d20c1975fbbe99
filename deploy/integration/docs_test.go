package integration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/doctest"
	"nixdispatch/deploy/fleet"
)

// docsNotRun are the commands of the pages that are not run as they stand, by how
// they begin, and why.
var docsNotRun = map[string]string{
	"go test ./deploy/integration -run TestEveryPairBuilds": "this very run has that test",
}

// docsFail are commands that fail, as their pages show.
var docsFail = []string{
	"echo \"ssh://mac x86_64-linux - four\" | nix-dispatch machines check -",
	"nix-dispatch ping 'ssh://old",
	"nix-dispatch doctor",
}

// docsBefore is what pages take for granted before the commands that begin so; a page
// goes before its own.
var docsBefore = map[string]func(*docs){
	"README.md: nix-dispatch status":                            (*docs).allUp,
	"docs/commands.md: nix-dispatch status":                     (*docs).holdOne,
	"nix-dispatch history":                                      (*docs).reset,
	"nix-dispatch explain --system x86_64-linux --features kvm": (*docs).allSorts,
	"nix build --builders":                                      (*docs).reset,
	"nix-dispatch doctor":                                       (*docs).switchedOff,
	"apt install":                                               (*docs).bringPackage,
	"docs/install.md: make install":                             (*docs).removePackage,
	"systemctl --user":                                          (*docs).usersOwn,
}

// TestDocs types what the pages say, on hosts as they take them for granted, and
// compares what is printed with what they say is printed. The README comes first,
// and leaves a host with nix-dispatch to the other pages.
func TestDocs(t *testing.T) {
	if os.Getenv("NIX_DISPATCH_DOCS") == "" {
		t.Skip("NIX_DISPATCH_DOCS is not set: see make docs")
	}
	t.Parallel()
	texts, err := doctest.Pages("../..")
	if err != nil {
		t.Fatal(err)
	}
	d := newDocs(t)
	names := slices.SortedFunc(maps.Keys(texts), func(a, b string) int {
		return cmp.Or(strings.Count(a, "/")-strings.Count(b, "/"), strings.Compare(a, b))
	})
	for _, name := range names {
		commands, err := doctest.Commands(name, texts[name])
		if err != nil {
			t.Error(err)
		}
		if len(commands) == 0 {
			continue
		}
		t.Run(filepath.Base(name), func(t *testing.T) {
			d := d.within(t)
			switch name {
			case "README.md":
				defer d.reset()
			case "docs/install.md":
				d.client = d.newClient("fresh")
			default:
				d.run("nix-dispatch", "enable")
				defer d.reset()
			}
			for _, c := range commands {
				d.try(c)
			}
		})
	}
	for begin := range docsNotRun {
		if !d.passed[begin] {
			t.Errorf("%q is in no page", begin)
		}
	}
}

// docs is the host that the pages are tried on, with systemd, Nix, and machines
// named mac and kitty; old has no sshd.
type docs struct {
	*site
	checkout string          // a copy of this repository
	cache    string          // where fleets are that are made in it
	passed   map[string]bool // of docsNotRun
}

const docsMachines = `ssh://mac           x86_64-linux             - 4 1 big-parallel
ssh-ng://root@kitty i686-linux,x86_64-linux  - 8 2
`

func newDocs(t *testing.T) *docs {
	fleet.Require(t)
	f, err := fleet.New(t.Context(), fleet.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("close the fleet: %v", err)
		}
	})
	s := &site{t: t, fleet: f, machines: make(map[string]*fleet.Host)}
	for _, c := range []fleet.HostConfig{
		{Name: "mac", SystemFeatures: []string{"big-parallel", "kvm"}, NixConf: "trusted-users = root alice"}, {Name: "kitty", SystemFeatures: []string{"benchmark"}}, {Name: "old"},
	} {
		s.machines[c.Name] = s.host(c)
	}
	if t.Failed() {
		t.FailNow()
	}
	s.client = s.newClient("client")
	if _, err := s.machines["old"].Run(t.Context(), "sh", "-c", "kill $(cat /run/sshd.pid)"); err != nil {
		t.Fatal(err)
	}
	return &docs{s, checkoutOf(t), ownCache(t), make(map[string]bool)}
}

// ownCache is a place for the fleets of the pages, whose names others may use, too.
func ownCache(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(fleet.CacheDir(), "docs-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Symlink(filepath.Join(fleet.CacheDir(), "roots"), filepath.Join(dir, "roots")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// newClient is a host as one has it before nix-dispatch.
func (s *site) newClient(name string) *fleet.Host {
	s.t.Helper()
	h, err := s.fleet.Host(s.t.Context(), fleet.HostConfig{Name: name, Systemd: true, NixConf: "max-jobs = 0"})
	if err != nil {
		s.t.Fatal(err)
	}
	files := map[string]string{machinesFile: docsMachines}
	for _, home := range []string{"/root", "/home/alice"} {
		files[home+"/hello.nix"] = shell("hello", "echo hello > $out", "")
	}
	for path, text := range files {
		if err := h.WriteFile(path, []byte(text), 0o644); err != nil {
			s.t.Fatal(err)
		}
	}
	// What tests call and the host's user does not.
	if _, err := h.Run(s.t.Context(), "sh", "-c", "mkdir -p "+programs+" && ln -s /usr/bin/nix-dispatch "+programs); err != nil {
		s.t.Fatal(err)
	}
	return h
}

// checkoutOf copies this repository's files.
func checkoutOf(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	copied := exec.Command("sh", "-c", `cd ../.. && tar -c --exclude=./.git --exclude=./bin . | tar -x -C "$0"`, dir)
	if out, err := copied.CombinedOutput(); err != nil {
		t.Fatalf("copy the repository: %v\n%s", err, out)
	}
	return dir
}

func (d *docs) within(t *testing.T) *docs {
	return &docs{d.site.within(t), d.checkout, d.cache, d.passed}
}

// try types a command, unless it is one of docsNotRun.
func (d *docs) try(c doctest.Command) {
	d.t.Helper()
	for begin := range docsNotRun {
		if strings.HasPrefix(c.Text, begin) {
			d.passed[begin] = true
			return
		}
	}
	for begin, before := range docsBefore {
		if strings.HasPrefix(c.Text, begin) || strings.HasPrefix(c.Page+": "+c.Text, begin) {
			before(d)
		}
	}
	printed, err := d.typed(c)
	fails := slices.ContainsFunc(docsFail, func(begin string) bool { return strings.HasPrefix(c.Text, begin) })
	switch {
	case (err != nil) != fails:
		d.t.Errorf("%s: %v, which it should not be. It printed:\n%s", c, err, printed)
	case c.Output != "":
		if err := doctest.Match(c.Output, printed); err != nil {
			d.t.Errorf("%s: %v. It printed:\n%s", c, err, printed)
		}
	}
}

// typed runs a command where its page means it to be: those with make, go and what
// they build in a checkout, all others on the host.
func (d *docs) typed(c doctest.Command) (printed string, err error) {
	ctx, cancel := context.WithTimeout(d.t.Context(), 5*time.Minute)
	defer cancel()
	cmd := d.client.Command(ctx, c.User, "sh", "-e", "-c", c.Text)
	if c.User == "alice" {
		cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+alicesRuntime)
	}
	if program, _, _ := strings.Cut(c.Text, " "); slices.Contains([]string{"make", "go", "promtool"}, program) {
		cmd = exec.CommandContext(ctx, "sh", "-e", "-c", c.Text)
		cmd.Dir = d.checkout
		cmd.Env = append(os.Environ(), "NIX_DISPATCH_FLEET_CACHE="+d.cache, "VERSION=v1.0")
		if strings.HasPrefix(c.Text, "make install") {
			cmd.Env = append(cmd.Env, "DESTDIR="+d.client.Root())
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		defer func() { // what it has left in the background
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		}()
	}
	cmd.WaitDelay = time.Second
	var out syncBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // something in the background has its output
	}
	return out.String(), err
}

// allUp waits for what the daemon needs a moment for: connections, and what the
// machines tell of themselves.
func (d *docs) allUp() {
	d.t.Helper()
	d.eventually(patience, "all machines are up and told how loaded they are", func() bool {
		out, err := d.dispatch("status")
		return err == nil && strings.Count(out.Stdout, " up ") == len(d.status().Machines) && !strings.Contains(out.Stdout, "not known")
	})
}

// reset makes the host again what pages take for granted.
func (d *docs) reset() {
	d.t.Helper()
	d.letGo()
	d.write(machinesFile, docsMachines)
	d.mustDispatch("reload")
	d.allUp()
	d.idle(time.Minute)
}

// hold has alice start builds that do not end.
func (d *docs) hold(ds ...derivation) {
	d.t.Helper()
	d.countBuilds()
	for i := range ds {
		ds[i].script = "echo this is " + ds[i].name + "\n" + awaitGo
	}
	d.start("alice", all(ds), "--keep-going")
	d.eventually(patience, "all are built", func() bool {
		building := 0
		for _, b := range d.status().Builds {
			if b.Phase == "building" {
				building++
			}
		}
		return building == len(ds)
	})
}

func (d *docs) holdOne() {
	d.t.Helper()
	d.allUp()
	d.hold(derivation{name: "part-1", features: []string{"big-parallel"}})
}

// allSorts makes a list of machines of which each takes builds or not for a reason of
// its own.
func (d *docs) allSorts() {
	d.t.Helper()
	d.hold(many(4, derivation{name: "big", features: []string{"big-parallel"}})...)
	d.write(machinesFile, `ssh://mac x86_64-linux - 4 1 kvm
ssh-ng://root@kitty x86_64-linux - 8 2 kvm
ssh://arm aarch64-linux
ssh://old x86_64-linux - 2 1 kvm
ssh://root@kitty x86_64-linux - 8 1 kvm
`)
	d.mustDispatch("reload")
	d.mustDispatch("drain", "ssh://root@kitty")
	d.eventually(patience, "old is down", func() bool { return d.state("ssh://old") == "down" })
}

// switchedOff is a host where somebody has forgotten to switch nix-dispatch on.
func (d *docs) switchedOff() {
	d.t.Helper()
	d.write(machinesFile, "ssh://mac x86_64-linux - 4 1 big-parallel\nssh-ng://root@kitty x86_64-linux - 8 2 kvm\n")
	d.mustDispatch("reload")
	d.run("nix-dispatch", "disable")
}

// bringPackage puts the package that make deb made where the page has it.
func (d *docs) bringPackage() {
	d.t.Helper()
	debs, _ := filepath.Glob(d.checkout + "/bin/nix-dispatch_*.deb")
	if len(debs) != 1 {
		d.t.Fatalf("make deb has made %q", debs)
	}
	deb, err := os.ReadFile(debs[0])
	if err != nil {
		d.t.Fatal(err)
	}
	// Hosts of a fleet leave out what a package brings to read.
	d.run("sh", "-c", "mkdir -p bin && rm -f /etc/dpkg/dpkg.cfg.d/fleet")
	d.write("/root/bin/"+filepath.Base(debs[0]), string(deb))
}

func (d *docs) removePackage() {
	d.t.Helper()
	d.run("apt-get", "purge", "-qq", "-y", "nix-dispatch")
}

// usersOwn gives alice a systemd of her own, and machines.
func (d *docs) usersOwn() {
	d.t.Helper()
	d.write("/home/alice/.config/nix/nix.conf", "build-hook = /usr/bin/nix-dispatch-hook\nbuilders = ssh-ng://alice@mac x86_64-linux - 4\n")
	d.run("install", "-d", "-o", "alice", "-m", "700", alicesRuntime)
	d.run("systemd-run", "--unit=alices", "-p", "User=alice", "-p", "Delegate=yes",
		"-p", "Environment=XDG_RUNTIME_DIR="+alicesRuntime, "/lib/systemd/systemd", "--user")
	d.eventually(patience, "alice's systemd runs", func() bool {
		out, _ := d.client.Run(d.t.Context(), "systemctl", "is-active", "alices")
		return strings.HasPrefix(out.Stdout, "active")
	})
}

// alicesRuntime is her XDG_RUNTIME_DIR.
const alicesRuntime = "/run/user/1001"

var (
	// usage is a call of one of the programs.
	usage  = regexp.MustCompile(`(?m)(?:^|[;&|(/])[ \t]*(nix-dispatch|nix-dispatchd)((?: +[^\s;&|)]+)*)`)
	option = regexp.MustCompile(`^--?[a-z][a-z-]*`)
	word   = regexp.MustCompile(`^[a-z][a-z-]+$`)
)

// TestDocsSpeakOfWhatExists checks that there are the subcommands and options that
// pages speak of, in commands and in passing.
func TestDocsSpeakOfWhatExists(t *testing.T) {
	t.Parallel()
	texts, err := doctest.Pages("../..")
	if err != nil {
		t.Fatal(err)
	}
	calls := 0
	for name, text := range texts {
		said := make(map[string]int)
		for span, line := range doctest.Spans(text) {
			if strings.HasPrefix(span, "nix-dispatch") { // elsewhere it may be a word of a sentence
				said[span] = line
			}
		}
		commands, err := doctest.Commands(name, text)
		if err != nil {
			t.Error(err)
		}
		for _, c := range commands {
			said[c.Text] = c.Line
		}
		for text, line := range said {
			for _, m := range usage.FindAllStringSubmatch(text, -1) {
				calls++
				if err := checkUsage(m[1], strings.Fields(m[2])); err != nil {
					t.Errorf("%s:%d: %q: %v", name, line, m[0], err)
				}
			}
		}
	}
	if calls < 50 {
		t.Errorf("only %d calls of our programs were found: this test sees nothing", calls)
	}
}

// helpOf is what a program says of itself, or of a subcommand; "" if there is none.
func helpOf(program, sub string) (string, error) {
	dir, err := binaries()
	if err != nil {
		return "", err
	}
	args := []string{sub, "--help"}
	if sub == "" {
		args = args[1:]
	}
	out, err := exec.Command(filepath.Join(dir, program), args...).CombinedOutput()
	return string(out), err
}

func checkUsage(program string, args []string) error {
	sub := ""
	if program == "nix-dispatch" && len(args) > 0 && word.MatchString(args[0]) {
		sub = args[0]
	}
	help, err := helpOf(program, sub)
	if err != nil {
		return fmt.Errorf("there is no subcommand %q: %w", sub, err)
	}
	for _, arg := range args {
		name := option.FindString(strings.TrimLeft(arg, "["))
		if name == "" || name == "--help" || name == "--version" {
			continue
		}
		if !regexp.MustCompile(`(?m)^ .*` + name + `(,| |$)`).MatchString(help) {
			return fmt.Errorf("there is no option %s", name)
		}
	}
	return nil
}
