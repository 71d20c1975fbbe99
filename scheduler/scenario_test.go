package scheduler_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	. "nixdispatch/scheduler"
)

var update = flag.Bool("update", false, "write what the scenarios in testdata print into them")

// TestScenarios runs testdata/*.txt. A scenario is blocks with a blank line
// between them: events, one a line, then "----", then what they are answered
// with. testdata/README.md lists the events.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := runScenario(t, string(text))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(string(text), got); diff != "" {
				t.Errorf("%s (-file +got):\n%s", file, diff)
			}
		})
	}
}

// runScenario returns the scenario with the answers it gave in place of those expected.
func runScenario(t *testing.T, text string) string {
	s := &scenario{t: t, q: New()}
	var out strings.Builder
	for i, block := range strings.Split(strings.TrimRight(text, "\n"), "\n\n") {
		if i > 0 {
			out.WriteString("\n")
		}
		events, _, _ := strings.Cut(block, "\n----")
		comment := true
		var answer strings.Builder
		for line := range strings.SplitSeq(events, "\n") {
			out.WriteString(line + "\n")
			if !strings.HasPrefix(line, "#") {
				comment = false
				answer.WriteString(s.event(line))
			}
		}
		if !comment {
			out.WriteString("----\n" + answer.String())
		}
	}
	return out.String()
}

type scenario struct {
	t        *testing.T
	q        *Queue
	machines []Machine
}

// event carries out one line and returns what it prints; a panic of the Queue
// is printed too.
func (s *scenario) event(line string) (answer string) {
	defer func() {
		if p := recover(); p != nil {
			answer = fmt.Sprintf("panic: %v\n", p)
		}
	}()
	words := strings.Fields(line)
	arg := func(i int) string {
		if i >= len(words) {
			s.t.Fatalf("%q: word %d is missing", line, i)
		}
		return words[i]
	}
	switch arg(0) {
	case "machine":
		s.machines = append(s.machines, s.machine(words[1:]))
		return ""
	case "reload":
		ms := s.machines
		s.machines = nil
		return orders(s.q.SetMachines(ms))
	case "up", "down", "draining", "parked", "suspect", "connecting":
		return s.state(arg(0), arg(1), strings.Join(words[2:], " "))
	case "enqueue":
		return orders(s.q.Enqueue(s.request(s.id(arg(1)), words[2:])))
	case "staged":
		return orders(s.q.Staged(s.id(arg(1)), uri(arg(2))))
	case "built":
		return orders(s.q.Built(s.id(arg(1))))
	case "lost":
		return orders(s.q.Lost(s.id(arg(1))))
	case "release":
		return orders(s.q.Release(uri(arg(1))))
	case "requeue":
		return orders(s.q.Requeue(s.id(arg(1)), uri(arg(2)), strings.Join(words[3:], " ")))
	case "rested":
		return orders(s.q.EndRest(s.id(arg(1))))
	case "join":
		r := s.request(0, words[3:])
		return orders(s.q.Join(s.id(arg(1)), arg(2), r.Priority))
	case "remove":
		return orders(s.q.Remove(s.id(arg(1))))
	case "offer":
		d := s.q.Offer(s.request(0, words[2:]), arg(1) == "willing")
		return strings.TrimSpace(fmt.Sprintf("%s %s", d.Reply, d.Machine)) + ": " + d.Why + "\n"
	case "explain":
		return s.q.Explain(s.request(0, words[1:])).String() + "\n"
	case "explain-build":
		e, ok := s.q.ExplainBuild(s.id(arg(1)))
		if !ok {
			return "no such build\n"
		}
		return e.String() + "\n"
	case "stranded":
		return fmt.Sprintf("%v, waiting for %v\n", s.q.Stranded(), s.q.Hopes())
	case "status":
		return status(s.q.Snapshot())
	default:
		s.t.Fatalf("unknown event %q", line)
		return ""
	}
}

func (s *scenario) state(state, name, reason string) string {
	states := map[string]MachineState{"up": Up, "down": Down, "draining": Draining, "parked": Parked, "suspect": Suspect, "connecting": Connecting}
	var all []Order
	for n := range strings.SplitSeq(name, ",") {
		all = append(all, s.q.SetState(uri(n), states[state], reason)...)
	}
	return orders(all)
}

// machine reads NAME SYSTEMS MAXJOBS SPEED SUPPORTED MANDATORY, then list=L, then
// staging=N.
func (s *scenario) machine(words []string) Machine {
	var m Machine
	if last := len(words) - 1; strings.HasPrefix(words[last], "staging=") {
		m.Staging = s.number(strings.TrimPrefix(words[last], "staging="))
		words = words[:last]
	}
	if last := len(words) - 1; strings.HasPrefix(words[last], "list=") {
		m.List = strings.TrimPrefix(words[last], "list=")
		words = words[:last]
	}
	for len(words) < 6 {
		words = append(words, "-")
	}
	m.ID = uri(words[0])
	m.Systems = list(words[1])
	m.MaxJobs = s.number(words[2])
	if words[3] != "-" {
		speed, err := strconv.ParseFloat(words[3], 64)
		if err != nil {
			s.t.Fatal(err)
		}
		m.SpeedFactor = speed
	}
	m.SupportedFeatures, m.MandatoryFeatures = list(words[4]), list(words[5])
	return m
}

// request reads SYSTEM and any of list=, features=, caller=, priority=, since=, chain=, local, exclude=.
func (s *scenario) request(id BuildID, words []string) Request {
	r := Request{ID: id, Caller: "alice"}
	for _, w := range words {
		key, value, _ := strings.Cut(w, "=")
		switch key {
		case "features":
			r.Features = list(value)
		case "list":
			r.List = value
		case "caller":
			r.Caller = value
		case "priority":
			r.Priority = s.number(value)
		case "since":
			r.Since = time.Unix(int64(s.number(value)), 0)
		case "chain":
			r.Chain = s.number(value)
		case "local":
			r.CouldBuildLocally = true
		case "exclude":
			r.Exclude = []MachineID{uri(value)}
		default:
			r.System = w
		}
	}
	return r
}

func (s *scenario) id(word string) BuildID { return BuildID(s.number(word)) }

func (s *scenario) number(word string) int {
	n, err := strconv.Atoi(word)
	if err != nil {
		s.t.Fatal(err)
	}
	return n
}

func uri(name string) MachineID { return MachineID("ssh://" + name) }

func list(word string) []string {
	if word == "-" {
		return nil
	}
	return strings.Split(word, ",")
}

func orders(list []Order) string {
	var b strings.Builder
	for _, o := range list {
		fmt.Fprintf(&b, "%s %d", o.Kind, o.Build)
		if o.From != "" {
			fmt.Fprintf(&b, " from %s", o.From)
		}
		if o.Machine != "" {
			fmt.Fprintf(&b, " on %s", o.Machine)
		}
		fmt.Fprintf(&b, ": %s\n", o.Why)
	}
	return b.String()
}

func status(snap Snapshot) string {
	var b strings.Builder
	for _, m := range snap.Machines {
		fmt.Fprintf(&b, "%s %s %q slots=%d+%d running=%d placed=%d held=%d",
			m.ID, m.State, m.Reason, m.Slots, m.Staging, m.Running, m.Placed, m.Held)
		if m.Removed {
			b.WriteString(" removed")
		}
		b.WriteString("\n")
	}
	for _, build := range snap.Builds {
		fmt.Fprintln(&b, strings.TrimSpace(fmt.Sprintf("%d %s %s", build.ID, build.Phase, build.Machine)))
	}
	for _, s := range snap.Queued {
		fmt.Fprintf(&b, "%s queued=%d unplaceable=%d\n", s.System, s.Queued, s.Unplaceable)
	}
	return b.String()
}
