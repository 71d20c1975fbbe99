package integration

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"nixdispatch/deploy/fleet"
)

// TestFailingBuild has builders fail: the user is told by whom, sees the end of
// the log, finds the whole of it afterwards, and nobody tries again.
func TestFailingBuild(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: protocolMachines(2, 2)})
		for _, protocol := range protocols {
			for _, user := range []string{"alice", "root"} {
				s.failOnce(protocol, user)
			}
		}
		s.idle(time.Minute)
	})
}

func (s *site) failOnce(protocol, user string) {
	t := s.t
	t.Helper()
	r := recipe{name: "fails-" + protocol + "-" + user, feature: protocol, script: "seq -f 'line %g' 1 40; exit 3"}
	drvPath := s.drvOf(r.expr())
	run := s.launch(user, r.expr())
	want := 1
	if user == "root" && s.client.Suite() != fleet.Sid {
		want = 100 // as for a local build, where nix-daemon does not hide it
	}
	if code := run.wait(time.Minute); code != want {
		t.Errorf("%s: nix-build exits with %d, want %d", r.name, code, want)
	}
	printed := run.out().Stderr
	told := fmt.Sprintf("build of '%s' on '%s://root@%s-1' failed: ", drvPath, protocol, protocol)
	if n := strings.Count(printed, told); n != 1 {
		t.Errorf("%s: the user is told %d times, want once: %q\n%s", r.name, n, told, printed)
	}
	if !strings.Contains(printed, "exit code 3") {
		t.Errorf("%s: the user does not see the builder's exit code:\n%s", r.name, printed)
	}
	if !strings.Contains(printed, "line 40\n") {
		t.Errorf("%s: the user does not see the end of the log:\n%s", r.name, printed)
	}
	// Nix repeats the end of the log ("last 10 log lines:", "Last 25 log lines:")
	// where it does not know that it was shown as it came.
	_, tail, ok := strings.Cut(printed, "og lines:\n")
	if user != "root" && (!ok || !strings.Contains(tail, "line 40\n")) {
		t.Errorf("%s: the end of the log is not told with the failure:\n%s", r.name, printed)
	}
	if n := s.runs(r, s.allMachines()...); n != 1 {
		t.Errorf("%s: the build ran %d times, want once", r.name, n)
	}
	log := s.readLog(drvPath)
	for n := 1; n <= 40; n++ {
		if line := fmt.Sprintf("line %d\n", n); strings.Count("\n"+log, "\n"+line) != 1 {
			t.Errorf("%s: the log does not hold %q once:\n%s", r.name, line, log)
		}
	}
}

// TestLog follows the log of a build that takes its time and then says a
// megabyte at once: the user reads along, and afterwards it is there to the
// byte.
func TestLog(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		s := newSite(t, siteConfig{client: suite, machines: protocolMachines(1, 2)})
		const phase = `@nix {"action":"setPhase","phase":"burstPhase"}` + "\n"
		var burst strings.Builder
		for n := 1; n <= 170_000; n++ {
			fmt.Fprintln(&burst, n)
		}
		if burst.Len() < 1<<20 {
			t.Fatalf("the burst is only %d bytes", burst.Len())
		}
		for _, protocol := range protocols {
			r := recipe{name: "talks-" + protocol, feature: protocol}
			r.script = "echo early; " + r.awaitGate() + "echo '" + strings.TrimSpace(phase) +
				"'; seq 1 170000; printf 'no newline' ; echo > $out"
			drvPath := s.drvOf(r.expr())
			run := s.launch("alice", r.expr())
			s.eventually(patience, "the user sees the first line while the build runs", func() bool {
				return strings.Contains(run.out().Stderr, "\nearly\n")
			})
			if log, _ := s.client.Run(t.Context(), "find", "/nix/var/log/nix/drvs", "-name", "*talks-"+protocol+"*"); log.Stdout == "" {
				t.Errorf("%s: there is no log file while the build runs", protocol)
			}
			s.openGate(r)
			run.succeed(time.Minute)
			printed := run.out().Stderr
			// Nix's own messages come in between.
			_, shown, _ := strings.Cut(printed, "early\n")
			shown = ownMessage.ReplaceAllString(shown, "")
			if !strings.Contains(shown, burst.String()) {
				t.Errorf("%s: the burst was not shown in whole: %s", protocol, firstDifference(shown, burst.String()))
			}
			if strings.Contains(printed, "setPhase") {
				t.Errorf("%s: the user is shown a message that is meant for Nix", protocol)
			}
			want := "early\n" + phase + burst.String() + "no newline\n"
			if protocol == "ssh" {
				// nix-store --serve keeps phases to itself.
				want = strings.Replace(want, phase, "", 1)
			}
			if log := s.readLog(drvPath); log != want {
				t.Errorf("%s: the log of %d bytes is not what the builder printed, %d bytes: %s",
					protocol, len(log), len(want), firstDifference(log, want))
			}
		}
	})
}

// ownMessage is a line by which Nix tells of a copy.
var ownMessage = regexp.MustCompile("(?m)^copying .*\n")

func firstDifference(got, want string) string {
	n := 0
	for n < len(got) && n < len(want) && got[n] == want[n] {
		n++
	}
	return fmt.Sprintf("from byte %d on %q, want %q", n, got[n:min(len(got), n+60)], want[n:min(len(want), n+60)])
}

// A nixMessage is one line of --log-format internal-json.
type nixMessage struct {
	Action string
	ID     uint64
	Type   int
	Text   string
	Fields []any
}

// nixMessages are the messages that a Nix with --log-format internal-json
// printed, of actions start, stop and result.
func nixMessages(t *testing.T, printed string) []nixMessage {
	t.Helper()
	var messages []nixMessage
	for line := range strings.Lines(printed) {
		text, ok := strings.CutPrefix(line, "@nix ")
		if !ok {
			continue
		}
		var m nixMessage
		if err := json.Unmarshal([]byte(text), &m); err != nil {
			t.Errorf("nix printed %q: %v", line, err)
			continue
		}
		if m.Action != "msg" {
			messages = append(messages, m)
		}
	}
	return messages
}

// The numbers of Nix's activities and results.
const (
	actCopyPath  = 100
	actCopyPaths = 103
	actBuild     = 105
	resProgress  = 105
)

// TestActivities reads what nix-build tells programs such as nom: the copies to
// and from the machine, with their bytes, each under an id of its own.
func TestActivities(t *testing.T) {
	eachClient(t, func(t *testing.T, suite string) {
		const size = 8 << 20
		s := newSite(t, siteConfig{client: suite, machines: protocolMachines(1, 2)})
		var all, sources []string
		for _, protocol := range protocols {
			source := "/home/alice/source-" + protocol
			if err := s.client.WriteFile(source, slices.Repeat([]byte(protocol), size/len(protocol)), 0o644); err != nil {
				t.Fatal(err)
			}
			sources = append(sources, "-source-"+protocol)
			all = append(all, recipe{name: "copied-" + protocol, feature: protocol,
				attrs: "src = " + source + ";", script: "cat $src $src > $out"}.expr())
		}
		out, err := s.nixBuild("alice", "[ ("+strings.Join(all, ") (")+") ]", "--log-format", "internal-json")
		if err != nil {
			t.Fatalf("nix-build: %v\n%s", err, clip(out.Stderr))
		}
		outputs := strings.Fields(out.Stdout)
		a := readActivities(t, out.Stderr)
		for n, protocol := range protocols {
			machine := fmt.Sprintf("%s://root@%s-1", protocol, protocol)
			up := a.copied(t, sources[n], "local", machine)
			if up < size {
				t.Errorf("%s: %d bytes of the input were seen going up, want at least %d", protocol, up, size)
			}
			down := a.copied(t, strings.TrimPrefix(outputs[n], "/nix/store/"), machine, "local")
			if down < 2*size {
				t.Errorf("%s: %d bytes of the output were seen coming down, want at least %d", protocol, down, 2*size)
			}
			for _, text := range []string{"to", "from"} {
				if !a.said(actCopyPaths, fmt.Sprintf("%s '%s'", text, machine)) {
					t.Errorf("%s: no copyPaths %s the machine", protocol, text)
				}
			}
			if !a.said(actBuild, "on '"+machine+"'") {
				t.Errorf("%s: no build on the machine", protocol)
			}
		}
	})
}

// activities is what was made known of each activity.
type activities map[uint64]*activity

type activity struct {
	start          nixMessage
	done, expected float64 // the last progress
	stopped        bool
}

// readActivities checks that the messages make sense and sums them up.
func readActivities(t *testing.T, printed string) activities {
	t.Helper()
	all := make(activities)
	for _, m := range nixMessages(t, printed) {
		a := all[m.ID]
		switch {
		case m.Action == "start" && a != nil:
			t.Errorf("two activities have the id %d: %q and %q", m.ID, a.start.Text, m.Text)
		case m.Action == "start":
			all[m.ID] = &activity{start: m}
		case a == nil || a.stopped:
			t.Errorf("%s of an activity that does not run, %d", m.Action, m.ID)
		case m.Action == "stop":
			a.stopped = true
		case m.Type == resProgress && a.start.Type == actCopyPath:
			done, expected := m.Fields[0].(float64), m.Fields[1].(float64)
			if done < a.done || done > expected {
				t.Errorf("%q: progress from %.0f to %.0f of %.0f", a.start.Text, a.done, done, expected)
			}
			a.done, a.expected = done, expected
		}
	}
	for _, a := range all {
		if !a.stopped {
			t.Errorf("%q was never stopped", a.start.Text)
		}
	}
	return all
}

// copied is how many bytes of a path were seen copied.
func (all activities) copied(t *testing.T, path, from, to string) int {
	t.Helper()
	bytes := 0
	for _, a := range all {
		f := a.start.Fields
		if a.start.Type != actCopyPath || len(f) != 3 || !strings.Contains(fmt.Sprint(f[0]), path) || f[1] != from || f[2] != to {
			continue
		}
		if a.done != a.expected {
			t.Errorf("%q ended at %.0f of %.0f bytes", a.start.Text, a.done, a.expected)
		}
		bytes += int(a.done)
	}
	return bytes
}

func (all activities) said(kind int, text string) bool {
	for _, a := range all {
		if a.start.Type == kind && strings.Contains(a.start.Text, text) {
			return true
		}
	}
	return false
}
