package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// writeTable writes entries as Markdown: the figures, the notes, the conditions.
func writeTable(w io.Writer, entries []entry) {
	fmt.Fprint(w, "| row | measured | goal | reached | |\n| --- | --- | --- | --- | --- |\n")
	for _, e := range entries {
		for _, f := range e.Figures {
			writeFigure(w, e.Row, &f)
		}
	}
	fmt.Fprintln(w)
	for _, e := range entries {
		fmt.Fprintf(w, "* **%s**: %s.", e.Row, strings.TrimRight(e.Work, "."))
		for _, f := range e.Figures {
			if f.Note != "" {
				fmt.Fprintf(w, " %s.", strings.TrimRight(join(f.Case, f.Note), "."))
			}
		}
		c := e.Conditions
		fmt.Fprintf(w, " %s, %d cores, Linux %s, %s, load %s, %s.\n", c.CPU, c.Cores, c.Kernel, c.Go, c.Load, c.Time.Format("2006-01-02 15:04 MST"))
	}
}

func writeFigure(w io.Writer, name string, f *figure) {
	var measured []string
	for _, s := range f.Sides {
		measured = append(measured, s.Name+" "+s.text(f.Unit))
	}
	cells := [3][]string{}
	for _, g := range f.Goals {
		value, met, ok := f.reached(g)
		cells[0] = append(cells[0], g.text(f.Unit))
		switch {
		case !ok:
			cells[1], cells[2] = append(cells[1], "?"), append(cells[2], "not measured")
		case met:
			cells[1], cells[2] = append(cells[1], g.value(value, f.Unit)), append(cells[2], "met")
		default:
			cells[1] = append(cells[1], g.value(value, f.Unit))
			cells[2] = append(cells[2], fmt.Sprintf("missed by %.0f %%", 100*(value/g.AtMost-1)))
		}
	}
	fmt.Fprintf(w, "| %s | %s", join(name, f.Case), strings.Join(measured, "<br>"))
	for _, c := range cells {
		fmt.Fprintf(w, " | %s", strings.Join(c, "<br>"))
	}
	fmt.Fprintln(w, " |")
}

// join puts a case after what it is a case of.
func join(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + ", " + b
}

// text is the median, and the least and the most of several rounds.
func (s *side) text(unit string) string {
	if len(s.Values) == 0 {
		return "-"
	}
	text := quantity(median(s.Values), unit)
	if len(s.Values) > 1 {
		text += fmt.Sprintf(" (%s-%s)", number(slices.Min(s.Values)), number(slices.Max(s.Values)))
	}
	return text
}

func (g goal) text(unit string) string {
	if g.Of == "" {
		return fmt.Sprintf("%s at most %s", g.Side, quantity(g.AtMost, unit))
	}
	return fmt.Sprintf("%s at most %s x %s", g.Side, number(g.AtMost), g.Of)
}

// value is what was reached, in the words of the goal.
func (g goal) value(v float64, unit string) string {
	if g.Of == "" {
		return quantity(v, unit)
	}
	return number(v) + " x"
}

func quantity(v float64, unit string) string { return strings.TrimSpace(number(v) + " " + unit) }

// number has three significant digits.
func number(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case v >= 1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	default:
		return strconv.FormatFloat(v, 'g', 3, 64)
	}
}
