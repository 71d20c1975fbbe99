package main

import (
	"context"
	"fmt"
	"slices"
)

// A row is one piece of work that is measured. To add one: a value of this type,
// and a line in rows.
type row struct {
	name string
	work string // what is done, in a line
	// needsFleet says that run makes hosts.
	needsFleet bool
	run        func(ctx context.Context, b *bench) ([]figure, error)
}

// A figure is one quantity of a row, measured on one or more sides: ours, the
// stock hook's, the least that is possible.
type figure struct {
	// Case tells figures of a row apart, such as "Nix 2.26.3"; "" if there is one.
	Case  string `json:"case,omitempty"`
	Unit  string `json:"unit"`
	Sides []side `json:"sides"`
	Goals []goal `json:"goals,omitempty"`
	// Note says what the numbers do not, such as what stands in a goal's way.
	Note string `json:"note,omitempty"`
}

// A side is who or what was measured, with the value of each round.
type side struct {
	Name   string    `json:"name"`
	Values []float64 `json:"values"`
}

// The names of the usual sides.
const (
	ours  = "ours"
	stock = "stock"
	limit = "limit"
)

// A goal is a bound on a side's median: on its ratio to another side, round by
// round, or if Of is "", on the value itself.
type goal struct {
	Side   string  `json:"side"`
	Of     string  `json:"of,omitempty"`
	AtMost float64 `json:"atMost"`
}

func (f *figure) side(name string) *side {
	n := slices.IndexFunc(f.Sides, func(s side) bool { return s.Name == name })
	if n < 0 {
		return nil
	}
	return &f.Sides[n]
}

// add notes the value of another round.
func (f *figure) add(name string, value float64) {
	if f.side(name) == nil {
		f.Sides = append(f.Sides, side{Name: name})
	}
	s := f.side(name)
	s.Values = append(s.Values, value)
}

// reached is what a goal bounds, and whether it is within. ok is false if there
// is no value.
func (f *figure) reached(g goal) (value float64, met, ok bool) {
	s := f.side(g.Side)
	if s == nil || len(s.Values) == 0 {
		return 0, false, false
	}
	values := s.Values
	if g.Of != "" {
		of := f.side(g.Of)
		if of == nil || len(of.Values) == 0 {
			return 0, false, false
		}
		values = ratios(s.Values, of.Values)
	}
	value = median(values)
	return value, value <= g.AtMost, true
}

// ratios are those of values of the same round.
func ratios(a, b []float64) []float64 {
	out := make([]float64, min(len(a), len(b)))
	for n := range out {
		out[n] = a[n] / b[n]
	}
	return out
}

// median is the middle of values, of which there must be some.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}

// A measure measures a side once; round counts from 0.
type measure struct {
	side string
	run  func(ctx context.Context, round int) (float64, error)
}

// rounds measures all sides once in each of n rounds. The order is turned round
// every time, so that noise that grows or fades hits both ends.
func (b *bench) rounds(ctx context.Context, f *figure, n int, measures ...measure) error {
	for round := range n {
		for _, m := range measures {
			value, err := m.run(ctx, round)
			if err != nil {
				return fmt.Errorf("%s, round %d: %w", m.side, round+1, err)
			}
			f.add(m.side, value)
			b.say("   %s %s: %s", f.Case, m.side, quantity(value, f.Unit))
		}
		slices.Reverse(measures)
	}
	return nil
}
