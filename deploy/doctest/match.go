package doctest

import (
	"fmt"
	"regexp"
	"strings"
)

// varying is what differs from run to run, and what stands for it.
var varying = []struct {
	form *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`SHA256:[A-Za-z0-9+/]{43}`), "SHA256:X"},
	{regexp.MustCompile(`/[0-9a-df-np-sv-z]{32}-`), "/HASH-"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?(\.\d+)?`), "TIME"},
	{regexp.MustCompile(`\d+(\.\d+){3}(:\d+)?`), "ADDRESS"},
	{regexp.MustCompile(`(\d+h)?(\d+m)?\d+(\.\d+)? ?(ms|µs|s|min|h|d|KiB|MiB|GiB|TiB|B)\b`), "AMOUNT"},
	{regexp.MustCompile(`\d+`), "N"},
	{regexp.MustCompile(`[ \t]+`), " "},
	{regexp.MustCompile(`-{4,}|─+`), "-"},
}

// Plain is a line without what differs from run to run: hashes, times, amounts,
// numbers, the width of columns.
func Plain(line string) string {
	for _, v := range varying {
		line = v.form.ReplaceAllString(line, v.with)
	}
	return strings.TrimSpace(line)
}

// first is a number that a line begins with, as of a build.
var first = regexp.MustCompile(`^[0-9]+(?:\s|$)`)

// Match tells whether a command printed what its page says: the lines of the
// sample are among those that it printed, in this order, apart from what
// Plain takes out. "..." stands for anything within a line. Where lines begin with
// numbers, it returns those that were printed for the sample's.
func Match(sample, printed string) (numbers map[string]string, err error) {
	numbers = make(map[string]string)
	lines := strings.Split(printed, "\n")
	for want := range strings.Lines(sample) {
		want = strings.TrimSpace(want)
		if want == "" || want == "..." {
			continue
		}
		form := likeness(want)
		n := 0
		for n < len(lines) && !form.MatchString(Plain(lines[n])) {
			n++
		}
		if n == len(lines) {
			return nil, fmt.Errorf("it does not print, or not in this order, %q", want)
		}
		if said := strings.TrimSpace(first.FindString(want)); said != "" {
			numbers[said] = strings.TrimSpace(first.FindString(strings.TrimSpace(lines[n])))
		}
		lines = lines[n+1:]
	}
	return numbers, nil
}

func likeness(line string) *regexp.Regexp {
	parts := strings.Split(Plain(line), "...")
	for i, part := range parts {
		parts[i] = regexp.QuoteMeta(part)
	}
	return regexp.MustCompile("^" + strings.Join(parts, ".*") + "$")
}
