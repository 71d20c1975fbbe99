package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// rootTimeout bounds making one link; it waits while a garbage collector runs.
const rootTimeout = 10 * time.Minute

// An outLink is a link to an output.
type outLink struct {
	path   string
	output nix.StorePath
}

// outLinks names the links as nix-build does: PATH and PATH-doc for the outputs
// of the first derivation, PATH-2 and PATH-2-doc for those of the second.
func outLinks(prefix string, outputs []*dispatchv1.Output) ([]outLink, error) {
	abs, err := filepath.Abs(prefix)
	if err != nil {
		return nil, err
	}
	numbers := make(map[string]int)
	var links []outLink
	for _, out := range outputs {
		path, err := nix.ParseStorePath(out.GetPath())
		if err != nil {
			return nil, err
		}
		n, ok := numbers[out.GetDrvPath()]
		if !ok {
			n = len(numbers) + 1
			numbers[out.GetDrvPath()] = n
		}
		link := abs
		if n > 1 {
			link += fmt.Sprintf("-%d", n)
		}
		if name := out.GetName(); name != "out" {
			if strings.ContainsAny(name, "/\x00") {
				return nil, fmt.Errorf("output name %q cannot be part of a file name", name)
			}
			link += "-" + name
		}
		links = append(links, outLink{link, path})
	}
	return links, nil
}

// makeOutLinks makes the links into a store, "" is the usual one, and has Nix register them as roots of the garbage
// collector. Nix's own program does it, for it knows whether there is a Nix
// daemon and refuses to replace what is no link into the store.
func makeOutLinks(ctx context.Context, store, prefix string, outputs []*dispatchv1.Output) error {
	links, err := outLinks(prefix, outputs)
	if err != nil {
		return fmt.Errorf("make links to the outputs: %w", err)
	}
	for _, link := range links {
		if err := addRoot(ctx, store, link); err != nil {
			return fmt.Errorf("make link %q to %s: %w", link.path, link.output, err)
		}
	}
	return nil
}

func addRoot(ctx context.Context, store string, link outLink) error {
	ctx, cancel := context.WithTimeout(ctx, rootTimeout)
	defer cancel()
	args := []string{"--add-root", link.path, "--realise", string(link.output)}
	if store != "" {
		args = append(args, "--store", store)
	}
	cmd := exec.CommandContext(ctx, "nix-store", args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); ok && stderr.Len() > 0 {
		return errors.New(strings.TrimSpace(nix.PlainText(stderr.String())))
	}
	return err
}
