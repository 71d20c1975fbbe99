package nix

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// structuredAttrsVar is the variable that carries structured attributes. Where
// it is set, Nix reads a derivation's options from it and from nothing else.
const structuredAttrsVar = "__json"

// RequiredSystemFeatures are the features that a machine must have to build
// the derivation, sorted, as its author lists them. Nix itself further demands
// "ca-derivations" of derivations whose output paths are not known
// ([BasicDerivation.AllOutputsKnown]).
//
// See DerivationOptions in src/libstore/derivation-options.cc.
func (d *BasicDerivation) RequiredSystemFeatures() []string {
	var features []string
	if text, structured := d.Env[structuredAttrsVar]; !structured {
		features = strings.FieldsFunc(d.Env["requiredSystemFeatures"], isBlank)
	} else if err := structuredAttr(text, "requiredSystemFeatures", &features); err != nil {
		return nil
	}
	return sortedSet(features)
}

// PreferLocalBuild tells whether the derivation's author thinks that moving its
// inputs costs more than the build.
func (d *BasicDerivation) PreferLocalBuild() bool {
	text, structured := d.Env[structuredAttrsVar]
	if !structured {
		return d.Env["preferLocalBuild"] == "1"
	}
	var prefer bool
	err := structuredAttr(text, "preferLocalBuild", &prefer)
	return err == nil && prefer
}

// structuredAttr reads one attribute of the JSON object in text into value,
// which stays as it is if there is no such attribute.
func structuredAttr(text, name string, value any) error {
	var attrs map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &attrs); err != nil {
		return fmt.Errorf("structured attributes: %w", err)
	}
	if attrs == nil {
		return fmt.Errorf("structured attributes: null is not an object")
	}
	raw, ok := attrs[name]
	if !ok {
		return nil
	}
	if string(raw) == "null" {
		return fmt.Errorf("structured attribute %q: unexpected null", name)
	}
	if err := json.Unmarshal(raw, value); err != nil {
		return fmt.Errorf("structured attribute %q: %w", name, err)
	}
	return nil
}

// checkStructuredAttrs refuses what Nix would refuse to build.
func (d *BasicDerivation) checkStructuredAttrs() error {
	text, structured := d.Env[structuredAttrsVar]
	if !structured {
		return nil
	}
	var features []string
	if err := structuredAttr(text, "requiredSystemFeatures", &features); err != nil {
		return err
	}
	var prefer bool
	return structuredAttr(text, "preferLocalBuild", &prefer)
}

// OutputPaths are the paths of the outputs, as far as they are known before the
// build.
func (d *BasicDerivation) OutputPaths() map[string]StorePath {
	paths := make(map[string]StorePath, len(d.Outputs))
	for name, o := range d.Outputs {
		if o.Path != "" {
			paths[name] = o.Path
		}
	}
	return paths
}

// OutputNames are the names of the outputs, sorted.
func (d *BasicDerivation) OutputNames() []string {
	return slices.Sorted(maps.Keys(d.Outputs))
}

// AllOutputsKnown tells whether there are outputs and all their paths are known
// before the build: each is input-addressed or fixed.
func (d *BasicDerivation) AllOutputsKnown() bool {
	return d.everyOutput(InputAddressed, Fixed)
}

// ContentAddressed tells whether there are outputs and all get their paths from
// their contents: each is fixed, floating or impure.
//
// See DerivationType::isCA in src/libstore/derivations.cc.
func (d *BasicDerivation) ContentAddressed() bool {
	return d.everyOutput(Fixed, Floating, Impure)
}

func (d *BasicDerivation) everyOutput(kinds ...OutputKind) bool {
	for _, o := range d.Outputs {
		if !slices.Contains(kinds, o.Kind()) {
			return false
		}
	}
	return len(d.Outputs) > 0
}

// Basic is the derivation as it is sent to a machine that has these inputs. They
// take the place of InputSrcs, unless the derivation has no input derivations:
// then InputSrcs are all its inputs, and other ones would change the paths of
// content-addressed outputs. The result shares memory with d.
//
// See main_build_remote in src/nix/build-remote/build-remote.cc.
func (d *Derivation) Basic(inputs []StorePath) BasicDerivation {
	b := d.BasicDerivation
	if len(d.InputDrvs) > 0 {
		b.InputSrcs = slices.Clone(inputs)
		slices.Sort(b.InputSrcs)
		b.InputSrcs = slices.Compact(b.InputSrcs)
	}
	return b
}
