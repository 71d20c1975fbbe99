package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// A fileSite is a site whose machines stand in a file.
type fileSite struct {
	*site
	file  string
	lines map[string]string // by machine name
}

// newFileSite starts with the lines of machines in the file. It looks at the
// file only when it is told to, unless poll is set.
func newFileSite(t *testing.T, poll time.Duration, machines ...*fakeMachine) *fileSite {
	t.Helper()
	f := &fileSite{file: filepath.Join(t.TempDir(), "machines"), lines: make(map[string]string)}
	if poll == 0 {
		poll = time.Hour
	}
	f.site = newSiteWith(t, siteConfig{machines: machines, options: func(o *Options) {
		for i, line := range strings.Split(o.Builders, "\n")[:len(machines)] {
			f.lines[machines[i].name] = line
		}
		write(t, f.file, o.Builders)
		o.Builders, o.ReloadPoll = "@"+f.file, poll
	}})
	return f
}

// write replaces a file at once: half of it would be read with a poll as short as
// that of a test.
func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		t.Fatal(err)
	}
}

// reload writes lines into the file and has it read.
func (f *fileSite) reload(lines ...string) *dispatchv1.ReloadResponse {
	f.t.Helper()
	write(f.t, f.file, strings.Join(lines, "\n"))
	r, err := f.client.Reload(f.t.Context(), &dispatchv1.ReloadRequest{})
	if err != nil {
		f.t.Fatal(err)
	}
	return r
}

// mustReload is reload for lines that are good.
func (f *fileSite) mustReload(lines ...string) {
	f.t.Helper()
	if r := f.reload(lines...); len(r.GetErrors()) > 0 || int(r.GetMachines()) != len(lines) {
		f.t.Fatalf("Reload = %v, want %d machines", r, len(lines))
	}
}

func (f *fileSite) upAgain(m *fakeMachine) {
	f.t.Helper()
	f.eventually(m.name+" is up", func() bool {
		return f.machineStatus(m).GetState() == dispatchv1.MachineState_MACHINE_STATE_UP
	})
}

// forgotten waits until the daemon has nothing of a machine any more.
func (f *fileSite) forgotten(m *fakeMachine) {
	f.t.Helper()
	f.eventually(m.name+" is forgotten", func() bool {
		f.d.retire()
		return f.machineStatus(m) == nil && m.ssh.Sessions() == 0
	})
}

func TestReloadMachinesComeAndGo(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m1, m2 := oneMachine(scheme), namedMachine(scheme, "m2")
		open := make(chan struct{})
		m1.build = m1.gated(open)
		s := newFileSite(t, 0, m1, m2)
		s.mustReload(s.lines["m1"])
		s.forgotten(m2)
		running := s.hook()
		running.accepted(s.drv("running", drvConfig{}))
		s.eventually("it runs on m1", func() bool { return m1.building() == 1 })
		waiting := s.hook()
		waiting.accepted(s.drv("waiting", drvConfig{}))

		s.mustReload(s.lines["m2"])
		s.upAgain(m2)
		st := waiting.finish()
		st.mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if len(m2.built()) != 1 {
			t.Errorf("the new machine built %v, want the build that waited", m2.built())
		}
		if got := s.machineStatus(m1); !got.GetRemoved() || got.GetRunning() != 1 || got.GetState() != dispatchv1.MachineState_MACHINE_STATE_DRAINING {
			t.Errorf("machine that is listed no more = %v, want it there with its build", got)
		}
		close(open)
		running.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if len(m1.built()) != 1 {
			t.Errorf("the old machine built %v, want its build once", m1.built())
		}
		s.forgotten(m1)
		if n := s.metric("nix_dispatch_builds_total", map[string]string{"machine": m1.uri()}); n != 0 {
			t.Errorf("metrics still have %v builds of a machine that is gone", n)
		}
	})
}

func TestReloadOfABrokenFileChangesNothing(t *testing.T) {
	t.Parallel()
	m1, m2 := oneMachine("ssh"), namedMachine("ssh", "m2")
	s := newFileSite(t, 0, m1, m2)
	if s.status().GetReload() != nil || s.metric("nix_dispatch_machines_last_reload_successful", nil) != 1 {
		t.Errorf("before any reload the status says %v", s.status().GetReload())
	}
	r := s.reload(s.lines["m1"], "ssh://m3 x86_64-linux - four")
	if len(r.GetErrors()) != 1 || r.GetErrors()[0].GetLine() != 2 || r.GetErrors()[0].GetFile() != s.file || r.GetMachines() != 2 {
		t.Errorf("Reload = %v, want the bad entry in line 2 of %s, and 2 machines", r, s.file)
	}
	got := s.status()
	if got.GetReload().GetSuccess() || len(got.GetReload().GetErrors()) != 1 || len(got.GetMachines()) != 2 {
		t.Errorf("status = %v, want the failed reload and both machines", got)
	}
	if ok := s.metric("nix_dispatch_machines_last_reload_successful", nil); ok != 0 {
		t.Errorf("machines_last_reload_successful = %v after a failed one", ok)
	}
	s.mustBuild(s.drv("meanwhile", drvConfig{}))
	s.mustReload(s.lines["m1"], s.lines["m2"])
	if !s.status().GetReload().GetSuccess() {
		t.Errorf("status after the file was mended = %v", s.status().GetReload())
	}
	for result, want := range map[string]float64{"ok": 1, "failed": 1} {
		if n := s.metric("nix_dispatch_machines_reloads_total", map[string]string{"result": result}); n != want {
			t.Errorf("machines_reloads_total{%s} = %v, want %v", result, n, want)
		}
	}
	if n := m1.ssh.Handshakes() + m2.ssh.Handshakes(); n != 2 {
		t.Errorf("%d handshakes with machines that stayed, want 2", n)
	}
}

// TestReloadOfAnotherWayToAMachine changes the key that a machine is entered with
// while builds are on it.
func TestReloadOfAnotherWayToAMachine(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		m.slots = 2
		open := make(chan struct{})
		m.build = m.gated(open)
		s := newFileSite(t, 0, m)
		var hooks []*hookClient
		for _, name := range []string{"a", "b", "c"} {
			h := s.hook()
			h.accepted(s.drv(name, drvConfig{}))
			hooks = append(hooks, h)
		}
		s.eventually("both slots are used, and one waits there", func() bool {
			st := s.machineStatus(m)
			return m.building() == 2 && st.GetStaging() == 1
		})
		fields := strings.Fields(s.lines["m1"])
		key, err := os.ReadFile(fields[2])
		if err != nil {
			t.Fatal(err)
		}
		fields[2] += "-2"
		write(t, fields[2], string(key))
		s.mustReload(strings.Join(fields, " "))
		s.eventually("there is another connection", func() bool { return m.ssh.Handshakes() == 2 })
		close(open)
		for _, h := range hooks {
			h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		}
		if n := len(m.built()); n != 3 {
			t.Errorf("%d builds were started, want 3: none was lost", n)
		}
		if m.mostBusy > 2 {
			t.Errorf("%d builds at once over old and new connections, want 2", m.mostBusy)
		}
		s.mustBuild(s.drv("d", drvConfig{}))
		s.eventually("the old connection is closed", func() bool {
			s.d.retire()
			return s.machineStatus(m).GetConnections() == 1
		})
		if n := s.metric("nix_dispatch_ssh_connects_total", map[string]string{"machine": m.uri(), "result": "ok"}); n != 2 {
			t.Errorf("ssh_connects_total = %v, want both connections to count", n)
		}
	})
}

// TestReloadOfWhatAMachineBuilds changes what needs no other connection.
func TestReloadOfWhatAMachineBuilds(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	open := make(chan struct{})
	m.build = m.gated(open)
	s := newFileSite(t, 0, m)
	first, second := s.hook(), s.hook()
	first.accepted(s.drv("first", drvConfig{}))
	s.eventually("it runs", func() bool { return m.building() == 1 })
	second.accepted(s.drv("second", drvConfig{}))
	fields := strings.Fields(s.lines["m1"])
	fields[3] = "2"
	s.mustReload(strings.Join(fields, " "))
	s.eventually("the second runs, too", func() bool { return m.building() == 2 })

	// The build that waits can never be built by what the machine is now.
	third := s.hook()
	third.accepted(s.drv("third", drvConfig{}))
	fields[1] = "riscv64-linux"
	s.mustReload(strings.Join(fields, " "))
	s.eventually("it counts apart", func() bool { return s.status().GetUnplaceable() == 1 })
	if n := s.metric("nix_dispatch_builds_unplaceable", nil); n != 1 {
		t.Errorf("builds_unplaceable = %v, want 1", n)
	}
	if n := s.metric("nix_dispatch_builds_queued", nil); n != 0 {
		t.Errorf("builds_queued = %v, want 0", n)
	}
	for _, b := range s.status().GetBuilds() {
		waits := b.GetPhase() == dispatchv1.Phase_PHASE_QUEUED
		if b.GetUnplaceable() != waits || waits && b.GetReason() != "no machine can build it" {
			t.Errorf("build = %v", b)
		}
	}
	fields[1] = nixSystem()
	s.mustReload(strings.Join(fields, " "))
	close(open)
	for _, h := range []*hookClient{first, second, third} {
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	}
	if n := m.ssh.Handshakes(); n != 1 {
		t.Errorf("%d handshakes, want 1: nothing changed in how the machine is reached", n)
	}
}

// TestFilesAreWatched changes what a link leads to, which is an event on nothing
// that is named.
func TestFilesAreWatched(t *testing.T) {
	t.Parallel()
	m1, m2 := oneMachine("ssh"), namedMachine("ssh", "m2")
	s := newFileSite(t, 5*time.Millisecond, m1, m2)
	dir := filepath.Dir(s.file)
	for i, name := range []string{"m1", "m2"} {
		generation := filepath.Join(dir, name)
		if err := os.Mkdir(generation, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(generation, "included"), s.lines[name])
		link := filepath.Join(dir, "static")
		if err := os.Symlink(generation, link+"-new"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(link+"-new", link); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			write(t, s.file, "@"+filepath.Join(link, "included"))
		}
		here, gone := m1, m2
		if i == 1 {
			here, gone = m2, m1
		}
		s.eventually("only "+name+" is there", func() bool {
			return s.machineStatus(here).GetState() == dispatchv1.MachineState_MACHINE_STATE_UP && s.machineStatus(gone) == nil
		})
	}
	write(t, s.file, "ssh://m1 - - nonsense")
	s.eventually("the broken file is reported", func() bool { return len(s.status().GetReload().GetErrors()) == 1 })
	s.mustBuild(s.drv("thing", drvConfig{}))
	n := s.metric("nix_dispatch_machines_reloads_total", map[string]string{"result": "failed"})
	time.Sleep(50 * time.Millisecond)
	if again := s.metric("nix_dispatch_machines_reloads_total", map[string]string{"result": "failed"}); again != n {
		t.Errorf("the same broken file was tried %v times more", again-n)
	}
}

func TestHangupReloads(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	hangup := make(chan os.Signal)
	file := filepath.Join(t.TempDir(), "machines")
	var lines string
	s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, options: func(o *Options) {
		lines = o.Builders
		write(t, file, lines)
		o.Builders, o.ReloadPoll, o.Hangup = "@"+file, time.Hour, hangup
	}})
	write(t, file, lines+"\nssh://m2 x86_64-linux")
	hangup <- syscall.SIGHUP
	s.eventually("there are two machines", func() bool { return len(s.status().GetMachines()) == 2 })
	s.eventually("it is reported", func() bool { return s.status().GetReload().GetSuccess() })
}

// TestLinesWithOneURIShareSlots has two lines for one machine: one connection,
// one number of slots.
func TestLinesWithOneURIShareSlots(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	m.slots = 2
	open := make(chan struct{})
	m.build = m.gated(open)
	s := newFileSite(t, 0, m)
	fields := strings.Fields(s.lines["m1"])
	fields[5] = "kvm"
	s.mustReload(s.lines["m1"], strings.Join(fields, " "))
	var hooks []*hookClient
	for i, features := range []string{"", "kvm", "", "kvm"} {
		h := s.hook()
		h.accepted(s.drv("thing"+string(rune('0'+i)), drvConfig{env: map[string]string{"requiredSystemFeatures": features}}))
		hooks = append(hooks, h)
	}
	s.eventually("two run, one of each line", func() bool { return m.building() == 2 })
	if got := s.status().GetMachines(); len(got) != 1 || got[0].GetSlots() != 2 || got[0].GetRunning() != 2 {
		t.Errorf("machines = %v, want one with both slots used", got)
	}
	close(open)
	for _, h := range hooks {
		h.finish().mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
	}
	if m.mostBusy != 2 || m.ssh.Handshakes() != 1 {
		t.Errorf("%d builds at once over %d connections, want 2 over 1", m.mostBusy, m.ssh.Handshakes())
	}
}

// TestHalfWrittenFileIsLeftAlone looks at a file that is being written.
func TestHalfWrittenFileIsLeftAlone(t *testing.T) {
	t.Parallel()
	m1, m2 := oneMachine("ssh"), namedMachine("ssh", "m2")
	s := newFileSite(t, 0, m1, m2)
	machines := func() int { return len(s.status().GetMachines()) }
	for _, text := range []string{"", s.lines["m1"], s.lines["m1"] + "\n" + s.lines["m2"]} {
		write(t, s.file, text)
		s.d.look()
		if machines() != 2 {
			t.Fatalf("%d machines after one look at %q, want 2 as before", machines(), text)
		}
	}
	write(t, s.file, s.lines["m1"])
	s.d.look()
	s.d.look()
	if machines() != 1 || s.metric("nix_dispatch_machines_reloads_total", map[string]string{"result": "ok"}) != 1 {
		t.Errorf("%d machines after two looks at the same, want 1", machines())
	}
}

// TestOutputsAreFetchedFromAMachineThatIsGone takes a machine out of the list
// while nothing of it is used but its connection.
func TestOutputsAreFetchedFromAMachineThatIsGone(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m1, m2 := oneMachine(scheme), namedMachine(scheme, "m2")
		s := newFileSite(t, 0, m1, m2)
		s.mustReload(s.lines["m1"])
		importing, goOn := make(chan struct{}), make(chan struct{})
		s.local.onImport(func(nix.PathInfo) error {
			close(importing)
			<-goOn
			return nil
		})
		h := s.hook()
		thing := s.drv("thing", drvConfig{})
		thing.size = 8 << 20 // more than is on its way
		h.accepted(thing)
		ended := make(chan *story, 1)
		go func() { ended <- h.finish() }()
		if !closed(importing) {
			t.Fatal("the output is not imported")
		}
		s.mustReload(s.lines["m2"])
		s.d.retire()
		close(goOn)
		(<-ended).mustBe(t, dispatchv1.BuildStatus_BUILD_STATUS_BUILT)
		if len(m1.built())+len(m2.built()) != 1 {
			t.Errorf("built %d times, want once", len(m1.built())+len(m2.built()))
		}
		s.forgotten(m1)
	})
}
