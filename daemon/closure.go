package daemon

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"nixdispatch/proto/nix"
)

// closure returns what is known of roots and of all they refer to, directly or
// not. known, which may be nil, holds what has been asked before and is added to.
func (c *localConn) closure(known map[nix.StorePath]nix.PathInfo, roots []nix.StorePath) ([]nix.PathInfo, error) {
	if known == nil {
		known = make(map[nix.StorePath]nix.PathInfo)
	}
	var out []nix.PathInfo
	seen := make(map[nix.StorePath]bool)
	level := roots
	for len(level) > 0 {
		if err := c.learn(known, level); err != nil {
			return nil, err
		}
		var next []nix.StorePath
		for _, p := range level {
			if seen[p] {
				continue
			}
			seen[p] = true
			out = append(out, known[p])
			next = append(next, known[p].References...)
		}
		level = next
	}
	return out, nil
}

// inputRoots are the paths that a derivation names as its inputs. outputsOf tells
// the outputs of a derivation.
func inputRoots(drv *nix.Derivation, outputsOf func(nix.StorePath) (map[string]nix.StorePath, error)) ([]nix.StorePath, error) {
	roots := slices.Clone(drv.InputSrcs)
	for input, names := range drv.InputDrvs {
		outputs, err := outputsOf(input)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			p := outputs[name]
			if p == "" {
				return nil, fmt.Errorf("output %q of %s, which is an input, is not known", name, input)
			}
			roots = append(roots, p)
		}
	}
	return roots, nil
}

// inputClosure is the closure of a derivation's inputs by the local store's own
// knowledge.
func (s *localStore) inputClosure(ctx context.Context, drv *nix.Derivation) ([]nix.StorePath, error) {
	conn, err := s.open(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.checkValid(slices.Collect(maps.Keys(drv.InputDrvs))...); err != nil {
		return nil, err
	}
	roots, err := inputRoots(drv, func(p nix.StorePath) (map[string]nix.StorePath, error) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		input, err := s.derivation(p)
		if err != nil {
			return nil, err
		}
		return input.OutputPaths(), nil
	})
	if err != nil {
		return nil, err
	}
	infos, err := conn.closure(nil, roots)
	if err != nil {
		return nil, err
	}
	conn.clean = true
	return pathsOf(infos), nil
}

// learn asks for the infos of those of paths that are not known, all at once.
func (c *localConn) learn(known map[nix.StorePath]nix.PathInfo, paths []nix.StorePath) error {
	var ask []nix.StorePath
	asked := make(map[nix.StorePath]bool)
	for _, p := range paths {
		if _, ok := known[p]; !ok && !asked[p] {
			asked[p] = true
			ask = append(ask, p)
		}
	}
	if len(ask) == 0 {
		return nil
	}
	infos, err := c.QueryPathInfos(ask)
	if err != nil {
		return &localError{doing: "query path infos", err: err}
	}
	for _, i := range infos {
		known[i.Path] = i
	}
	for _, p := range ask {
		if _, ok := known[p]; !ok {
			return &localError{doing: "query path infos", err: fmt.Errorf("%s is not valid", p)}
		}
	}
	return nil
}

// invalid returns those of paths that are not valid.
func (c *localConn) invalid(paths []nix.StorePath) ([]nix.StorePath, error) {
	valid, err := c.QueryValidPaths(paths, false)
	if err != nil {
		return nil, &localError{doing: "query valid paths", err: err}
	}
	return without(paths, valid), nil
}
