package daemon

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strings"

	"nixdispatch/proto/nix"
)

// outputInfos asks the machine about outputs it claims to have built and brings
// them into an order in which they can be registered.
//
// A machine can say what it likes, and what nix-daemon refuses to register would look
// like a fault of this host. So what the derivation says is not taken from the machine,
// and the rest is checked here. conn is to the local store.
func (a *attempt) outputInfos(conn *localConn, paths []nix.StorePath) ([]nix.PathInfo, error) {
	infos, err := a.r.pathInfos(paths)
	if err != nil {
		return nil, a.fault(doingOutputQuery, err)
	}
	for _, p := range paths {
		if !slices.ContainsFunc(infos, func(i nix.PathInfo) bool { return i.Path == p }) {
			return nil, a.fault(doingOutputQuery, fmt.Errorf("the build succeeded but its output %s is not valid there", p))
		}
	}
	for n, i := range infos {
		if !slices.Contains(paths, i.Path) {
			return nil, a.fault(doingOutputQuery, fmt.Errorf("it answered with %s, which it was not asked for", i.Path))
		}
		infos[n] = a.trueInfo(i)
	}
	if err := a.checkReferences(conn, infos); err != nil {
		return nil, err
	}
	sorted, err := nix.TopoSort(infos)
	if err != nil {
		return nil, a.fault(doingOutputQuery, err)
	}
	return sorted, nil
}

// trueInfo replaces what the derivation says of an output, and leaves out what is no
// signature.
func (a *attempt) trueInfo(i nix.PathInfo) nix.PathInfo {
	i.Ultimate = false // this store did not build it
	i.Deriver = a.b.drvPath
	i.CA = ""
	for _, o := range a.b.drv.Outputs {
		if o.Path == i.Path {
			i.CA = o.ContentAddress() // which the local Nix compares with the contents
		}
	}
	i.Sigs = slices.DeleteFunc(slices.Clone(i.Sigs), func(sig string) bool {
		key, signature, _ := strings.Cut(sig, ":")
		_, err := base64.StdEncoding.DecodeString(signature)
		return key == "" || signature == "" || err != nil
	})
	return i
}

// checkReferences blames the machine for references that no output of this derivation can
// have: to what is neither an input or an output of it nor valid here.
func (a *attempt) checkReferences(conn *localConn, infos []nix.PathInfo) error {
	known := make(map[nix.StorePath]bool, len(a.given))
	for _, p := range a.given {
		known[p] = true
	}
	for _, p := range a.b.drv.OutputPaths() {
		known[p] = true
	}
	var strange []nix.StorePath
	for _, i := range infos {
		for _, r := range i.References {
			if !known[r] {
				known[r] = true
				strange = append(strange, r)
			}
		}
	}
	if len(strange) == 0 {
		return nil
	}
	invalid, err := conn.invalid(strange)
	if err != nil {
		return err
	}
	if len(invalid) > 0 {
		return a.fault(doingOutputQuery, fmt.Errorf("it says that an output refers to %s, which is not an input", invalid[0]))
	}
	return nil
}
