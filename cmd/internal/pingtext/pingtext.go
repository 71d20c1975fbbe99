// Package pingtext shows the steps of a way to a machine, as nix-dispatch ping and
// nix-dispatchd probe print them: in lines for a person, or in JSON.
package pingtext

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"nixdispatch/proto/nix"
)

// The verdicts on a step.
const (
	OK      = "ok"
	Warning = "warning" // builds can run, but not all that one would think
	Failed  = "failed"  // the way ends here
)

// A Step is a step on the way to a machine's Nix, in its JSON form.
type Step struct {
	// Name is what is done, in a word or two that do not change.
	Name    string `json:"step"`
	Verdict string `json:"verdict"`
	// Milliseconds is how long it took.
	Milliseconds float64 `json:"ms"`
	// Detail is what was found, or what is wrong. It may quote the machine.
	Detail string `json:"detail"`
	// Cause is what kind of thing is wrong, and Fix what to do about it.
	Cause string `json:"cause,omitempty"`
	Fix   string `json:"fix,omitempty"`
}

// Millis is a duration in the unit of [Step].
func Millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Problem is what is wrong in one line: step, cause, detail and fix; "" if nothing
// is.
func (s Step) Problem() string {
	if s.Verdict == OK {
		return ""
	}
	text := s.Name + ": " + s.Cause + ": " + s.Detail
	if s.Fix != "" {
		text += "; " + s.Fix
	}
	return OneLine(text)
}

// OneLine makes text fit for one line of a terminal.
func OneLine(text string) string {
	return strings.Join(strings.Fields(nix.PlainText(text)), " ")
}

// Write prints the step as one line.
func (s Step) Write(w io.Writer) {
	text := OneLine(s.Detail)
	if s.Verdict != OK {
		text = strings.ToUpper(s.Verdict) + ": " + strings.TrimPrefix(s.Problem(), s.Name+": ")
	}
	fmt.Fprintf(w, "  %-12s  %8s  %s\n", OneLine(s.Name), duration(s.Milliseconds), text)
}

func duration(ms float64) string {
	if ms >= 10_000 {
		return fmt.Sprintf("%.1f s", ms/1000)
	}
	return fmt.Sprintf("%.1f ms", ms)
}

// A Report is all steps to one machine.
type Report struct {
	Machine string `json:"machine"`
	// By is who went there: "daemon", or "caller" for a process of the caller's own.
	By    string `json:"by"`
	OK    bool   `json:"ok"`
	Steps []Step `json:"steps"`
	// Error is why there are no steps, or no more.
	Error string `json:"error,omitempty"`
}

// Add adds a step. The report stays OK unless the step has failed.
func (r *Report) Add(s Step) {
	r.Steps = append(r.Steps, s)
	r.OK = r.OK && s.Verdict != Failed
}

// WriteEnd prints the line below the steps: how it ended.
func (r *Report) WriteEnd(w io.Writer) {
	total, warnings := 0.0, 0
	for _, s := range r.Steps {
		total += s.Milliseconds
		switch s.Verdict {
		case Failed:
			fmt.Fprintf(w, "%s: failed at %q: %s\n", OneLine(r.Machine), OneLine(s.Name), OneLine(s.Cause))
			return
		case Warning:
			warnings++
		}
	}
	switch {
	case !r.OK:
		fmt.Fprintf(w, "%s: %s\n", OneLine(r.Machine), OneLine(cmp.Or(r.Error, "failed")))
	case warnings > 0:
		fmt.Fprintf(w, "%s: ok in %s, warnings: %d\n", OneLine(r.Machine), duration(total), warnings)
	default:
		fmt.Fprintf(w, "%s: ok in %s\n", OneLine(r.Machine), duration(total))
	}
}

// maxSteps bounds what [ReadSteps] takes, in bytes.
const maxSteps = 1 << 20

// WriteStep writes a step for [ReadSteps].
func WriteStep(w io.Writer, s Step) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	return enc.Encode(s)
}

// ReadSteps reads the steps that another process writes, and gives each to report
// as it comes.
func ReadSteps(r io.Reader, report func(Step)) error {
	dec := json.NewDecoder(io.LimitReader(r, maxSteps))
	for {
		var s Step
		switch err := dec.Decode(&s); {
		case err == io.EOF:
			return nil
		case err != nil:
			return fmt.Errorf("read the steps: %w", err)
		}
		report(s)
	}
}
