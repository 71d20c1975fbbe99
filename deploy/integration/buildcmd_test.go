package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"nixdispatch/deploy/fleet"
)

// derivations evaluates an expression on the client and returns the derivations.
func (s *site) derivations(expr string) []string {
	s.t.Helper()
	out, err := s.client.Run(s.t.Context(), "nix-instantiate", "--expr", expr)
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.Fields(out.Stdout)
}

// dispatchBuild builds with nix-dispatch and fails the test unless its exit
// status is this.
func (s *site) dispatchBuild(exit int, args ...string) fleet.Output {
	s.t.Helper()
	out, err := s.dispatch(append([]string{"build"}, args...)...)
	if code := exitCode(err); code != exit {
		s.t.Fatalf("nix-dispatch build: exit %d (%v), want %d\n%s", code, err, exit, out.Stderr)
	}
	return out
}

// valid tells whether a path is valid on a host.
func (s *site) valid(h *fleet.Host, path string) bool {
	_, err := h.Run(s.t.Context(), "nix-store", "--check-validity", path)
	return err == nil
}

// collectGarbage collects all garbage on a host.
func (s *site) collectGarbage(h *fleet.Host) {
	s.t.Helper()
	if out, err := h.Run(s.t.Context(), "nix-store", "--gc"); err != nil {
		s.t.Fatalf("nix-store --gc: %v\n%s", err, out.Stderr)
	}
}

const cache = "/srv/cache"

func TestBuildCommand(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{
		nixConf: "substituters = file://" + cache + "?trusted=1\nnarinfo-cache-negative-ttl = 0\n" +
			"system-features = big-parallel local\nkeep-outputs = false\nkeep-derivations = false\n",
		jobs:     1,
		machines: []machineConfig{{name: "mac", columns: "x86_64-linux - 2"}},
	})
	steps := []struct {
		name string
		run  func(*site)
	}{
		{"outputs, JSON and links", (*site).buildsOutputs},
		{"what can be substituted is", (*site).substitutes},
		{"what is for the local Nix", (*site).buildsLocally},
		{"exit statuses", (*site).exits},
		{"failing dependency", (*site).failsOnADependency},
		{"keep going", (*site).keepsGoing},
		{"no terminal", (*site).showsLines},
		{"terminal", (*site).showsAScreen},
		{"garbage collectors all the while", (*site).outlivesCollectors},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) { step.run(s.within(t)) })
	}
	s.idle(time.Minute)
}

func (s *site) buildsOutputs() {
	t := s.t
	lib := shell("lib", `echo lib > $out; echo of $out > $doc`, `outputs = [ "out" "doc" ];`)
	drvs := s.derivations("let lib = " + lib + "; in [ lib " +
		shell("app", "echo uses $lib > $out", "lib = lib.doc;") + shell("alone", "echo alone > $out", "") + " ]")
	libDrv, app, alone := drvs[0], drvs[1], drvs[2]
	out := s.dispatchBuild(0, "--json", "--out-link", "links/res", app, alone+"!out", libDrv+"^doc")
	type result struct {
		DrvPath string
		Outputs map[string]string
	}
	var got []result
	if err := json.Unmarshal([]byte(out.Stdout), &got); err != nil || len(got) != 3 {
		t.Fatalf("printed %s (%v), want three results", out.Stdout, err)
	}
	want := []result{
		{app, map[string]string{"out": s.output(app, "out")}},
		{alone, map[string]string{"out": s.output(alone, "out")}},
		{libDrv, map[string]string{"doc": s.output(libDrv, "doc")}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("results (-want +got)\n%s", d)
	}
	for _, name := range []string{"lib", "app", "alone"} {
		s.ranOn(name, "mac")
	}
	all := []string{want[0].Outputs["out"], want[1].Outputs["out"], want[2].Outputs["doc"], s.output(libDrv, "out")}
	s.verify(all...)
	s.references(want[0].Outputs["out"], "-lib-doc")
	s.references(want[2].Outputs["doc"], "-lib")
	for link, path := range map[string]string{"res": all[0], "res-2": all[1], "res-3-doc": all[2]} {
		target, err := s.client.Run(t.Context(), "readlink", "/root/links/"+link)
		if err != nil || strings.TrimSpace(target.Stdout) != path {
			t.Errorf("link %s leads to %q (%v), want %s", link, target.Stdout, err, path)
		}
	}
	s.collectGarbage(s.client)
	for _, p := range all {
		if !s.valid(s.client, p) {
			t.Errorf("%s was garbage though a link leads to it", p)
		}
	}
	if _, err := s.client.Run(t.Context(), "rm", "-r", "/root/links"); err != nil {
		t.Fatal(err)
	}
	// A connection to nix-daemon that is kept for the next build has temporary roots.
	s.eventually(2*time.Minute, "nothing but the links keeps the outputs", func() bool {
		s.collectGarbage(s.client)
		return !slices.ContainsFunc(all, func(p string) bool { return s.valid(s.client, p) })
	})
}

// output is the path of a derivation's output.
func (s *site) output(drv, name string) string {
	s.t.Helper()
	out, err := s.client.Run(s.t.Context(), "nix-store", "--query", "--binding", name, drv)
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.TrimSpace(out.Stdout)
}

func (s *site) substitutes() {
	t := s.t
	lib := shell("cached", `echo cached > $out`, "")
	drvs := s.derivations("let lib = " + lib + "; in [ lib " + shell("uses-cached", "cat $lib > $out; echo $lib >> $out", "lib = lib;") + " ]")
	path := strings.TrimSpace(s.dispatchBuild(0, drvs[0]).Stdout)
	s.ranOn("cached", "mac")
	if out, err := s.client.Run(t.Context(), "nix", "copy", "--to", "file://"+cache, path); err != nil {
		t.Fatalf("fill the cache: %v\n%s", err, out.Stderr)
	}
	s.idle(time.Minute)
	s.eventually(2*time.Minute, "nothing keeps the path", func() bool {
		_, err := s.machines["mac"].Run(t.Context(), "nix-store", "--delete", path)
		return err == nil
	})
	if out, err := s.client.Run(t.Context(), "nix-store", "--delete", path); err != nil {
		t.Fatalf("delete %s: %v\n%s", path, err, out.Stderr)
	}
	out := s.dispatchBuild(0, drvs[1])
	s.contents(strings.TrimSpace(out.Stdout), "cached\n"+path+"\n")
	s.ranOn("cached", "mac") // still once
	s.ranOn("uses-cached", "mac")
	if !strings.Contains(out.Stderr, "1 path to fetch from substituters") || !strings.Contains(out.Stderr, "1 derivation to build") {
		t.Errorf("the plan is not told:\n%s", out.Stderr)
	}
}

func (s *site) buildsLocally() {
	t := s.t
	s.write("/srv/fetched", "hello\n")
	if _, err := s.client.Run(t.Context(), "chmod", "a+rX", "/srv", "/srv/fetched"); err != nil {
		t.Fatal(err)
	}
	drvs := s.derivations("[" + shell("preferred-local", "echo here > $out", "preferLocalBuild = true;") +
		shell("only-local", "echo here > $out", features("local")) + `
		(derivation {
			name = "fetched"; system = "builtin"; builder = "builtin:fetchurl"; url = "file:///srv/fetched";
			outputHashMode = "flat"; outputHashAlgo = "sha256";
			outputHash = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
		}) ]`)
	paths := strings.Fields(s.dispatchBuild(0, drvs...).Stdout)
	if len(paths) != 3 {
		t.Fatalf("outputs %q", paths)
	}
	s.ranOn("preferred-local", "client")
	s.ranOn("only-local", "client")
	s.contents(paths[2], "hello\n")
	s.verify(paths...)

	nowhere := s.derivations(shell("nowhere", "echo > $out", features("nobody-has-this")))
	out := s.dispatchBuild(1, nowhere[0])
	if !strings.Contains(out.Stderr, "nobody-has-this") || !strings.Contains(out.Stderr, "nowhere.drv") {
		t.Errorf("what no machine and not the local Nix can build fails with:\n%s", out.Stderr)
	}
}

func (s *site) exits() {
	ok := s.derivations(shell("fine", "echo fine > $out", ""))[0]
	failing := s.derivations(shell("broken", "echo last words; exit 1", ""))[0]
	for _, tt := range []struct {
		exit int
		args []string
	}{
		{0, []string{ok}},
		{0, []string{ok}}, // nothing to do
		{1, []string{failing}},
		{2, nil},
		{2, []string{"--no-such-option", ok}},
		{2, []string{"/nix/store"}},
		{3, []string{"--socket", "/srv/no-socket", ok}},
	} {
		out := s.dispatchBuild(tt.exit, tt.args...)
		if (out.Stdout != "") != (tt.exit == 0) {
			s.t.Errorf("build %q: exit %d with stdout %q", tt.args, tt.exit, out.Stdout)
		}
		if tt.exit != 0 && !strings.Contains(out.Stderr, "nix-dispatch") && !strings.Contains(out.Stderr, "last words") {
			s.t.Errorf("build %q: exit %d with stderr %q", tt.args, tt.exit, out.Stderr)
		}
	}
}

func (s *site) failsOnADependency() {
	t := s.t
	drv := s.derivations(shell("needs-failing", "echo > $out", "dep = "+shell("failing-dep", "echo it broke here; exit 7", "")+";"))[0]
	out := s.dispatchBuild(1, drv)
	for _, want := range []string{"failing-dep.drv' on 'ssh://root@mac' failed", "> it broke here"} {
		if !strings.Contains(out.Stderr, want) {
			t.Errorf("stderr lacks %q:\n%s", want, out.Stderr)
		}
	}
	s.ranOn("failing-dep", "mac")
	s.ranOn("needs-failing", "")
}

func (s *site) keepsGoing() {
	drvs := s.derivations("let slow = n: derivation { name = \"slow-${n}\"; system = \"x86_64-linux\"; builder = \"/bin/sh\"; PATH = \"/usr/bin:/bin\"; in_ = " +
		shell("first", "echo > $out", "") + `; args = [ "-c" "echo $in_ > $out" ]; }; in [ ` +
		shell("fails-at-once", "exit 1", "") + ` (slow "1") (slow "2") ]`)
	out := s.dispatchBuild(1, append([]string{"--keep-going"}, drvs...)...)
	for _, drv := range drvs[1:] {
		if path := s.output(drv, "out"); !s.valid(s.client, path) {
			s.t.Errorf("%s was not built though it needs nothing that failed\n%s", drv, out.Stderr)
		}
	}
	s.ranOn("fails-at-once", "mac")
}

// evil is what a builder may print and a terminal must not see. What is shown of
// it is "aftere red": a carriage return overwrites, as it would there.
const evil = `printf 'before \033]0;title\007\033[2J\033[31mred\033[0m\rafter\n'`

func (s *site) showsLines() {
	t := s.t
	drv := s.derivations(shell("plain", evil+"; sleep 1; echo plain > $out", ""))[0]
	out := s.dispatchBuild(0, "-L", drv)
	if i := strings.IndexFunc(out.Stderr, func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' }); i >= 0 {
		t.Errorf("stderr has control characters: %q", out.Stderr)
	}
	for _, want := range []string{"building '" + drv + "' on 'ssh://root@mac'\n", "plain> aftere red\n"} {
		if !strings.Contains(out.Stderr, want) {
			t.Errorf("stderr lacks %q: %q", want, out.Stderr)
		}
	}
}

func (s *site) showsAScreen() {
	t := s.t
	drvs := s.derivations("[" + shell("seen-1", evil+"; sleep 2; echo > $out", "") + shell("seen-2", "sleep 2; echo > $out", "") + "]")
	command := fmt.Sprintf("exec %s/nix-dispatch build -L %s", programs, strings.Join(drvs, " "))
	out, err := s.client.Run(t.Context(), "env", "TERM=xterm", "script", "-qec", command, "/dev/null")
	if err != nil {
		t.Fatalf("%v\n%q", err, out.Stdout)
	}
	if !strings.Contains(out.Stdout, " of 2 built, ") {
		t.Errorf("nothing was painted: %q", out.Stdout)
	}
	lines := rendered(t, out.Stdout)
	want := []string{s.output(drvs[0], "out"), s.output(drvs[1], "out")}
	if n := len(lines); n < 2 || !slices.Equal(lines[n-2:], want) {
		t.Errorf("the last lines are %q, want %q", lines[max(0, len(lines)-2):], want)
	}
	for _, line := range lines {
		if strings.Contains(line, " of 2 built, ") || strings.HasPrefix(line, "  seen-") {
			t.Errorf("what was painted stays: %q", line)
		}
	}
	if !slices.Contains(lines, "seen-1> aftere red") {
		t.Errorf("the log is not shown: %q", lines)
	}
}

// rendered is what a terminal shows in the end that knows "n lines up" and "erase
// below"; everything else that moves the cursor fails the test.
func rendered(t *testing.T, text string) (lines []string) {
	t.Helper()
	row := []string{}
	at := 0
	line := ""
	end := func() {
		row = append(row[:at], line)
		at, line = at+1, ""
	}
	for text = strings.ReplaceAll(text, "\r\n", "\n"); text != ""; {
		var n int
		switch {
		case text[0] == '\n':
			end()
			text = text[1:]
		case strings.HasPrefix(text, "\x1b[J"):
			row = row[:at]
			text = text[len("\x1b[J"):]
		case text[0] == '\x1b':
			if _, err := fmt.Sscanf(text, "\x1b[%dA", &n); err != nil || n > at {
				t.Fatalf("unexpected escape sequence %q at line %d", text[:min(20, len(text))], at)
			}
			at -= n
			text = text[strings.IndexByte(text, 'A')+1:]
		case text[0] < ' ' && text[0] != '\t':
			t.Fatalf("unexpected control character in %q", text[:min(20, len(text))])
		default:
			line += text[:1]
			text = text[1:]
		}
	}
	if line != "" {
		end()
	}
	return row[:at]
}

// outlivesCollectors builds a chain while garbage collectors run without a pause
// at both ends.
func (s *site) outlivesCollectors() {
	t := s.t
	const on = "/srv/collect"
	expr := shell("link-0", "echo 0 > $out", "")
	for n := 1; n <= 5; n++ {
		expr = shell(fmt.Sprintf("link-%d", n), fmt.Sprintf("sleep 0.5; echo %d $dep > $out", n), "dep = "+expr+";")
	}
	// Nothing but the evaluator's root keeps the derivations until the call begins. It
	// is made before there are collectors: one that begins while Nix makes a root may
	// look for roots before and for temporary ones after that.
	drv := s.instantiateRooted(expr, "/root/link.drv")
	hosts := []*fleet.Host{s.client, s.machines["mac"]}
	var collectors []*exec.Cmd
	for _, h := range hosts {
		if err := h.WriteFile(on, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := h.Command(t.Context(), "root", "sh", "-c", "n=0; while test -e "+on+"; do nix-store --gc >/dev/null 2>&1; n=$((n + 1)); done; echo $n >"+on+".count")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		collectors = append(collectors, cmd)
	}
	out := s.dispatchBuild(0, "--out-link", "/root/link", drv)
	for _, h := range hosts {
		if _, err := h.Run(t.Context(), "rm", on); err != nil {
			t.Error(err)
		}
	}
	for n, c := range collectors {
		if err := c.Wait(); err != nil {
			t.Errorf("collector on %s: %v", hosts[n].Name(), err)
		}
		count, err := hosts[n].ReadFile(on + ".count")
		if err != nil || strings.TrimSpace(string(count)) == "0" {
			t.Errorf("collections on %s: %s (%v), want some", hosts[n].Name(), count, err)
		}
		t.Logf("%s collected garbage %s times", hosts[n].Name(), strings.TrimSpace(string(count)))
	}
	path := strings.TrimSpace(out.Stdout)
	s.verify(path)
	s.references(path, "-link-4")
	for n := range 6 {
		s.ranOn(fmt.Sprintf("link-%d", n), "mac") // none was lost and built again
	}
}

// instantiateRooted is nix-instantiate with a root of the garbage collector.
func (s *site) instantiateRooted(expr, root string) string {
	s.t.Helper()
	out, err := s.client.Run(s.t.Context(), "nix-instantiate", "--add-root", root, "--expr", expr)
	if err != nil {
		s.t.Fatal(err)
	}
	target, err := os.Readlink(s.client.Root() + strings.TrimSpace(out.Stdout))
	if err != nil {
		s.t.Fatal(err)
	}
	return target
}
