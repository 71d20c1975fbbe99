package worker

import "encoding/json"

// AppendBuildLog appends to dst what a result adds to a build's log, in bytes as
// the builder would have written them: a line of the log, or the line by which a
// builder announces a phase,
//
//	@nix {"action":"setPhase","phase":"buildPhase"}
//
// Other results add nothing.
//
// See src/libstore/build-log.cc and src/libutil/logging.cc of Nix 2.34.8, which
// read such lines.
func AppendBuildLog(dst []byte, r Result) []byte {
	if len(r.Fields) == 0 || !r.Fields[0].IsText {
		return dst
	}
	text := r.Fields[0].Text
	switch r.Type {
	case ResBuildLogLine:
		dst = append(dst, text...)
	case ResSetPhase:
		phase, err := json.Marshal(text)
		if err != nil { // no string fails to marshal
			return dst
		}
		dst = append(dst, `@nix {"action":"setPhase","phase":`...)
		dst = append(dst, phase...)
		dst = append(dst, '}')
	default:
		return dst
	}
	return append(dst, '\n')
}
