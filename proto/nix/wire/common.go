package wire

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"nixdispatch/proto/nix"
)

// BasicDerivation writes a derivation without its input derivations.
//
// See src/libstore/derivations.cc, writeDerivation.
func (w *Writer) BasicDerivation(drv *nix.BasicDerivation) {
	w.Uint64(uint64(len(drv.Outputs)))
	for _, name := range slices.Sorted(maps.Keys(drv.Outputs)) {
		out := drv.Outputs[name]
		w.String(name)
		w.StorePath(out.Path)
		w.String(out.HashAlgo)
		w.String(out.Hash)
	}
	w.StorePathSet(drv.InputSrcs)
	w.String(drv.Platform)
	w.String(drv.Builder)
	w.Strings(drv.Args)
	w.StringMap(drv.Env)
}

// BasicDerivation reads a derivation without its input derivations.
func (r *Reader) BasicDerivation() *nix.BasicDerivation {
	drv := &nix.BasicDerivation{Outputs: make(map[string]nix.DerivationOutput)}
	for n := r.Count(MaxTokens); n > 0 && r.err == nil; n-- {
		name := r.String(MaxToken)
		drv.Outputs[name] = nix.DerivationOutput{
			Path:     r.OptStorePath(),
			HashAlgo: r.String(MaxToken),
			Hash:     r.String(MaxToken),
		}
	}
	drv.InputSrcs = r.StorePaths(MaxPaths)
	drv.Platform = r.String(MaxToken)
	drv.Builder = r.String(MaxToken)
	drv.Args = r.Strings(MaxVariables, MaxEnvironment)
	drv.Env = r.StringMap(MaxVariables, MaxEnvironment)
	return drv
}

// PathInfo writes a path and what is known of it, in the form of the worker
// protocol from 1.16 on, which the serve protocol's AddToStoreNar shares.
//
// See src/libstore/worker-protocol.cc, ValidPathInfo.
func (w *Writer) PathInfo(info *nix.PathInfo) {
	w.StorePath(info.Path)
	w.UnkeyedPathInfo(info)
}

// UnkeyedPathInfo is [Writer.PathInfo] without the path.
func (w *Writer) UnkeyedPathInfo(info *nix.PathInfo) {
	w.StorePath(info.Deriver)
	w.String(info.NarHash.Hex())
	w.StorePathSet(info.References)
	w.Time(info.RegistrationTime)
	w.Uint64(info.NarSize)
	w.Bool(info.Ultimate)
	w.StringSet(info.Sigs)
	w.String(info.CA)
}

// PathInfo reads what [Writer.PathInfo] writes.
func (r *Reader) PathInfo() nix.PathInfo { return r.UnkeyedPathInfo(r.StorePath()) }

// UnkeyedPathInfo reads what is known of path.
func (r *Reader) UnkeyedPathInfo(path nix.StorePath) nix.PathInfo {
	return nix.PathInfo{
		Path:             path,
		Deriver:          r.OptStorePath(),
		NarHash:          r.NarHash(),
		References:       r.StorePaths(MaxReferences),
		RegistrationTime: r.Time(),
		NarSize:          r.Uint64(),
		Ultimate:         r.Bool(),
		Sigs:             r.Strings(MaxTokens, MaxToken),
		CA:               r.String(MaxToken),
	}
}

// NarHash reads a SHA-256 in any of Nix's spellings.
func (r *Reader) NarHash() nix.NarHash {
	s := r.String(MaxToken)
	if r.err != nil {
		return nix.NarHash{}
	}
	h, err := nix.ParseNarHash(s)
	if err != nil {
		r.Fail(err)
	}
	return h
}

// An OutputsForm is the form in which a build result names the outputs.
type OutputsForm int

// The forms, oldest first.
const (
	// NoOutputs: the result does not name them.
	NoOutputs OutputsForm = iota
	// RealisationOutputs: a map from "sha256:…!name" to a realisation in JSON.
	RealisationOutputs
	// PathOutputs: a map from name to store path and signatures (Nix 2.35).
	PathOutputs
)

// A ResultForm tells which fields a build result has on the wire; it follows
// from the protocol and its version.
type ResultForm struct {
	Times   bool
	CPU     bool
	Outputs OutputsForm
}

// BuildResult reads a build result. dir is the peer's store directory, which
// realisations leave out.
//
// See BuildResult in src/libstore/worker-protocol.cc and serve-protocol.cc of
// Nix 2.34.8, and of 2.35.2 for [PathOutputs].
func (r *Reader) BuildResult(form ResultForm, dir string) nix.BuildResult {
	res := nix.BuildResult{
		Status:   nix.BuildStatus(r.Uint64()),
		ErrorMsg: r.Text(MaxText),
	}
	if form.Times {
		res.TimesBuilt = r.Uint64()
		res.NonDeterministic = r.Bool()
		res.StartTime = r.Time()
		res.StopTime = r.Time()
	}
	if form.CPU { // user and system time, which nobody asks for
		r.optUint64()
		r.optUint64()
	}
	switch form.Outputs {
	case NoOutputs:
	case RealisationOutputs:
		res.BuiltOutputs = r.realisations(dir)
	case PathOutputs:
		res.BuiltOutputs = r.outputPaths()
	}
	return res
}

func (r *Reader) optUint64() {
	if r.Int(1) == 1 {
		r.Uint64()
	}
}

func (r *Reader) realisations(dir string) map[string]nix.StorePath {
	outputs := make(map[string]nix.StorePath)
	for n := r.Count(MaxTokens); n > 0 && r.err == nil; n-- {
		id := r.String(MaxToken)
		text := r.String(MaxRealisation)
		if r.err != nil {
			break
		}
		_, name, ok := strings.Cut(id, "!")
		if !ok {
			r.Fail(fmt.Errorf("derivation output %q has no output name", id))
			break
		}
		path, err := realisationPath(text, dir)
		if err != nil {
			r.Fail(fmt.Errorf("realisation of output %q: %w", name, err))
			break
		}
		outputs[name] = path
	}
	return outputs
}

func realisationPath(text, dir string) (nix.StorePath, error) {
	var fields struct {
		OutPath string `json:"outPath"`
	}
	if err := json.Unmarshal([]byte(text), &fields); err != nil {
		return "", err
	}
	return nix.ParseStorePath(dir + "/" + fields.OutPath)
}

func (r *Reader) outputPaths() map[string]nix.StorePath {
	outputs := make(map[string]nix.StorePath)
	for n := r.Count(MaxTokens); n > 0 && r.err == nil; n-- {
		name := r.String(MaxToken)
		outputs[name] = r.StorePath()
		r.Strings(MaxTokens, MaxToken) // signatures of the realisation
	}
	return outputs
}

// unknownDrvHash stands where a realisation's derivation hash is not known, as
// Nix 2.35 writes it for older peers.
const unknownDrvHash = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

// BuildResult writes a build result; servers need it.
func (w *Writer) BuildResult(form ResultForm, res *nix.BuildResult) {
	w.Uint64(uint64(res.Status))
	w.String(res.ErrorMsg)
	if form.Times {
		w.Uint64(res.TimesBuilt)
		w.Bool(res.NonDeterministic)
		w.Time(res.StartTime)
		w.Time(res.StopTime)
	}
	if form.CPU {
		w.Uint64(0)
		w.Uint64(0)
	}
	if form.Outputs == NoOutputs {
		return
	}
	w.Uint64(uint64(len(res.BuiltOutputs)))
	for _, name := range slices.Sorted(maps.Keys(res.BuiltOutputs)) {
		path := res.BuiltOutputs[name]
		if form.Outputs == PathOutputs {
			w.String(name)
			w.StorePath(path)
			w.Strings(nil)
			continue
		}
		id := unknownDrvHash + "!" + name
		w.String(id)
		w.String(fmt.Sprintf(`{"dependentRealisations":{},"id":%q,"outPath":%q,"signatures":[]}`, id, path.Base()))
	}
}
