package main

import (
	"math"

	"nixdispatch/proto/nix"
)

// A stockHook is Nix's own hook: it holds one of the machine's slots from before
// its answer until the outputs are with the client, connects before it answers,
// and copies inputs to a machine while no other does
// (src/nix/build-remote/build-remote.cc).
type stockHook struct {
	*world
	system string
	load   map[*machine]int
	// uploads has, for each machine, what waits for the upload lock, the holder first.
	uploads map[*machine][]func()
}

func newStockHook(w *world, system string) *stockHook {
	return &stockHook{world: w, system: system, load: make(map[*machine]int), uploads: make(map[*machine][]func())}
}

// choose returns the best machine with a free slot, nil if none has.
func (s *stockHook) choose() *machine {
	var best *machine
	bestLoad := math.Inf(1)
	for _, m := range s.machines {
		if !eligible(m.line, s.system) || s.load[m] >= m.line.MaxJobs {
			continue
		}
		load := float64(s.load[m]) / m.line.SpeedFactor
		better := load < bestLoad
		if best != nil && load == bestLoad {
			better = m.line.SpeedFactor > best.line.SpeedFactor ||
				m.line.SpeedFactor == best.line.SpeedFactor && s.load[m] < s.load[best]
		}
		if better {
			best, bestLoad = m, load
		}
	}
	return best
}

// eligible tells whether m takes builds for system that require no features.
func eligible(m nix.Machine, system string) bool {
	return m.MaxJobs > 0 && m.SystemSupported(system) && m.MandatoryMet(nil)
}

func (s *stockHook) ask(j *job, amWilling bool, answer func(reply), built func()) {
	m := s.choose()
	if m == nil {
		r := postpone
		if amWilling {
			r = decline
		}
		s.after(s.Answer, func() { answer(r) })
		return
	}
	s.load[m]++
	j.record.Machine, j.record.Taken = m.line.StoreURI, s.now
	s.after(s.Connect+connectTrips*s.RoundTrip, func() {
		answer(accept)
		s.lock(m, func() { s.copyInputs(j, m, built) })
	})
}

// lock has do called when nobody else holds the machine's upload lock.
func (s *stockHook) lock(m *machine, do func()) {
	s.uploads[m] = append(s.uploads[m], do)
	if len(s.uploads[m]) == 1 {
		do()
	}
}

func (s *stockHook) unlock(m *machine) {
	s.uploads[m] = s.uploads[m][1:]
	if len(s.uploads[m]) > 0 {
		s.uploads[m][0]()
	}
}

func (s *stockHook) copyInputs(j *job, m *machine, built func()) {
	var size int64
	lacking := j.lacking(m)
	for _, p := range lacking {
		size += s.size(p)
	}
	s.after(s.RoundTrip, func() {
		m.up.send(size, func() {
			for _, p := range lacking {
				m.paths[p] = true
			}
			s.unlock(m)
			s.build(j, m, func() {
				s.fetch(j, m, func() {
					s.load[m]--
					built()
				})
			})
		})
	})
}
