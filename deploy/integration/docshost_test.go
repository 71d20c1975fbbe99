package integration

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"nixdispatch/deploy/doctest"
	"nixdispatch/deploy/fleet"
)

// docs is what a page is tried on: a host with systemd and Nix, and machines named
// mac, kitty and old, of which old has no sshd. All pages share the machines.
type docs struct {
	*site
	deb      string            // the package, with the programs beside it
	checkout string            // a copy of this repository, the page's own
	cache    string            // where fleets are that are made in it
	numbers  map[string]string // of builds: what the page says -> what they are here
	held     []string          // derivations whose builds do not end
}

const docsMachines = `ssh://mac           x86_64-linux             - 4 1 big-parallel
ssh-ng://root@kitty i686-linux,x86_64-linux  - 8 2
`

// newDocs makes what all pages share.
func newDocs(t *testing.T) *docs {
	t.Helper()
	s := &site{t: t, fleet: newFleet(t), machines: make(map[string]*fleet.Host)}
	for _, c := range []fleet.HostConfig{
		{Name: "mac", SystemFeatures: []string{"big-parallel", "kvm"}, NixConf: "trusted-users = root alice"},
		{Name: "kitty", SystemFeatures: []string{"benchmark"}},
		{Name: "old"},
	} {
		s.machines[c.Name] = s.host(c)
	}
	if t.Failed() {
		t.FailNow()
	}
	if _, err := s.machines["old"].Run(t.Context(), "sh", "-c", "kill $(cat /run/sshd.pid)"); err != nil {
		t.Fatal(err)
	}
	return &docs{site: s, deb: makeDeb(t, "v1.0")}
}

// forPage makes what the commands of a page need. Only on the hosts of the README and of
// install.md nix-dispatch is not there yet.
func (d *docs) forPage(t *testing.T, page string, commands []doctest.Command) *docs {
	t.Helper()
	p := &docs{site: d.site.within(t), deb: d.deb, numbers: make(map[string]string)}
	if slices.ContainsFunc(commands, inCheckout) {
		p.checkout, p.cache = checkoutOf(t, filepath.Dir(d.deb)), ownCache(t)
		t.Cleanup(func() { // what a script that failed has left
			down := exec.Command(filepath.Join(p.checkout, "bin/tools/fleet"), "down")
			down.Env = append(os.Environ(), "NIX_DISPATCH_FLEET_CACHE="+p.cache)
			_ = down.Run()
		})
	}
	if slices.IndexFunc(commands, func(c doctest.Command) bool { return !inCheckout(c) }) < 0 {
		return p
	}
	p.client = p.newClient("on-" + strings.ToLower(strings.TrimSuffix(filepath.Base(page), ".md")))
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := p.client.Run(context.Background(), "journalctl", "--no-pager", "-n", "100", "-u", "nix-dispatchd", "-u", "alices")
			t.Logf("journal:\n%s", out.Stdout)
		}
	})
	if page != "README.md" && page != "docs/install.md" {
		install := exec.Command("../install.sh", "install", filepath.Dir(p.deb), "/usr", p.client.Root())
		if out, err := install.CombinedOutput(); err != nil {
			t.Fatalf("install.sh: %v\n%s", err, out)
		}
		p.run("sh", "-ec", "systemd-sysusers && systemctl daemon-reload && nix-dispatch enable")
	}
	return p
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

// ownCache is a place for the fleets of a page, whose names others may use, too. It
// removes those that killed tests have left: their lock, docs-ID.lock, is held by nobody.
func ownCache(t *testing.T) string {
	t.Helper()
	lock, err := os.CreateTemp(fleet.CacheDir(), "docs-*.lock")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	dir := strings.TrimSuffix(lock.Name(), ".lock")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.RemoveAll(dir)
		os.Remove(lock.Name())
		lock.Close()
	})
	old, _ := filepath.Glob(filepath.Join(fleet.CacheDir(), "docs-*.lock"))
	for _, name := range old {
		removeOldCache(name)
	}
	if err := os.Symlink(filepath.Join(fleet.CacheDir(), "roots"), filepath.Join(dir, "roots")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func removeOldCache(lockName string) {
	lock, err := os.Open(lockName)
	if err != nil {
		return // removed meanwhile
	}
	defer lock.Close()
	if info, err := lock.Stat(); err != nil || time.Since(info.ModTime()) < time.Minute {
		return // its owner may not have locked it yet
	}
	if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
		os.RemoveAll(strings.TrimSuffix(lockName, ".lock"))
		os.Remove(lockName)
	}
}

// checkoutOf copies this repository's files. In "make test" what was built is there
// already, the programs in the directory given, so that go links it only if it is stale.
func checkoutOf(t *testing.T, programs string) string {
	t.Helper()
	dir := t.TempDir()
	copied := exec.Command("sh", "-c", `cd ../.. && tar -c --exclude=./.git --exclude=./bin . | tar -x -C "$0"`, dir)
	if out, err := copied.CombinedOutput(); err != nil {
		t.Fatalf("copy the repository: %v\n%s", err, out)
	}
	if nightly {
		return dir
	}
	copied = exec.Command("sh", "-ec", `mkdir -p "$0"/bin/tools; cp -p "$1"/nix-dispatch* "$0"/bin; rm -f "$0"/bin/*.deb
		if test -d ../../bin/tools; then cp -p ../../bin/tools/* "$0"/bin/tools; fi`, dir, programs)
	if out, err := copied.CombinedOutput(); err != nil {
		t.Fatalf("copy what was built: %v\n%s", err, out)
	}
	return dir
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
	if len(d.held) > 0 {
		d.letGo(d.held...)
	}
	d.write(machinesFile, docsMachines)
	d.mustDispatch("reload")
	d.allUp()
	d.idle(time.Minute)
}

// hold has alice start builds with these names that do not end.
func (d *docs) hold(names ...string) {
	d.t.Helper()
	var expr strings.Builder
	for _, name := range names {
		expr.WriteString(shell(name, "echo this is "+name+"\n"+awaitGo, features("big-parallel")) + "\n")
	}
	d.held = append(d.held, names...)
	d.start("alice", "["+expr.String()+"]", "--keep-going")
	d.eventually(patience, "all are built", func() bool { return d.status().phases("building") == len(names) })
}

func (d *docs) holdOne() {
	d.t.Helper()
	d.allUp()
	d.hold("part-1")
}

// allSorts makes a list of machines of which each takes builds or not for a reason of
// its own.
func (d *docs) allSorts() {
	d.t.Helper()
	d.hold("big-1", "big-2", "big-3", "big-4")
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

// bringPackage puts the package where the page has it: what make deb made, if it was
// typed.
func (d *docs) bringPackage() {
	d.t.Helper()
	from := d.deb
	if made, _ := filepath.Glob(d.checkout + "/bin/nix-dispatch_*.deb"); len(made) > 0 {
		from = made[0]
	}
	deb, err := os.ReadFile(from)
	if err != nil {
		d.t.Fatal(err)
	}
	// Hosts of a fleet leave out what a package brings to read.
	d.run("sh", "-c", "mkdir -p bin && rm -f /etc/dpkg/dpkg.cfg.d/fleet")
	d.write("/root/bin/"+filepath.Base(from), string(deb))
}

func (d *docs) removePackage() {
	d.t.Helper()
	d.run("apt-get", "purge", "-qq", "-y", "nix-dispatch")
}

// usersOwn gives alice a systemd of her own, and machines.
func (d *docs) usersOwn() {
	d.t.Helper()
	d.write("/home/alice/.config/nix/nix.conf", "build-hook = /usr/bin/nix-dispatch-hook\nbuilders = ssh-ng://alice@mac x86_64-linux - 4\n")
	d.run("chown", "-R", "alice:", "/home/alice/.config")
	d.run("install", "-d", "-o", "alice", "-m", "700", alicesRuntime)
	d.run("systemd-run", "--unit=alices", "-p", "User=alice", "-p", "Delegate=yes",
		"-p", "Environment=XDG_RUNTIME_DIR="+alicesRuntime, "/lib/systemd/systemd", "--user")
	d.eventually(patience, "alice's systemd answers", func() bool {
		_, err := d.client.Run(d.t.Context(), "test", "-S", alicesRuntime+"/systemd/private")
		return err == nil
	})
}

// alicesRuntime is her XDG_RUNTIME_DIR.
const alicesRuntime = "/run/user/1001"
