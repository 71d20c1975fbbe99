package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"time"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/worker"
)

// This file looks at a host from the side of a user's own nix-dispatchd, which
// nix-daemon and root have nothing to do with.

// askOwn asks the Nix that opens the user's usual store.
func askOwn() (localNix, error) {
	store, err := nix.FindLocalStore(os.Getenv("NIX_REMOTE"), nix.ThisStoreHost(os.Getenv))
	if err != nil {
		return localNix{}, err
	}
	if store.Socket != "" {
		return askSocket(store.Socket)
	}
	ctx, cancel := context.WithTimeout(context.Background(), askTimeout)
	cmd := exec.CommandContext(ctx, "nix-daemon", "--stdio")
	cmd.WaitDelay = time.Second
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdin, inErr := cmd.StdinPipe()
	stdout, outErr := cmd.StdoutPipe()
	if err := errors.Join(inErr, outErr, cmd.Start()); err != nil {
		cancel()
		return localNix{}, err
	}
	end := func() {
		_ = stdin.Close()
		cancel()
		_ = cmd.Wait() // killed
	}
	c, err := worker.NewClient(stdout, stdin, nil)
	if err != nil {
		end()
		if said := strings.TrimSpace(nix.PlainText(stderr.String())); said != "" {
			err = errors.New(said)
		}
		return localNix{}, err
	}
	return localNix{version: c.NixVersion(), trust: c.Trust(), close: end}, nil
}

// lookAtOwn tells whether this user's Nix asks this user's daemon.
func (h *host) lookAtOwn(tell func(finding)) {
	local, err := h.askOwn()
	if err != nil {
		tell(problem("store", "look what 'nix-daemon --stdio' says; NIX_REMOTE and NIX_STATE_DIR name other stores",
			"this user's usual store cannot be opened: %v (others, named by --store, may be)", err))
		return
	}
	defer local.close()
	if local.trust == worker.NotTrusted {
		tell(warning("store", "name a store with --store, or add the user to trusted-users in nix.conf",
			"this user's usual store is the system's, whose nix-daemon does not trust the user: what no trusted key has signed cannot be imported"))
	} else {
		tell(fine("store", "Nix %s opens this user's usual store", local.version))
	}
	v := hookRules(local.version)
	set, err := h.confSetting(hookSubject, h.confEnvironment(), "your", h.home, v.ignoresFile)
	program, ours, arguments := hookProgram(set.value)
	const subject, file = hookSubject, "~/.config/nix/nix.conf"
	switch {
	case err != nil:
		tell(problem(subject, "correct that line: Nix rejects it, too", "%v", err))
	case !set.found:
		tell(next(subject, "put build-hook = "+hookBeside()+" into "+file, "this user's builds do not use nix-dispatch yet"))
	case !ours:
		tell(problem(subject, "put build-hook = "+hookBeside()+" into "+file, "this user's builds do not use nix-dispatch"))
	case v.onePath && arguments:
		tell(problem(subject, "put build-hook = "+hookBeside()+" into "+file,
			"%s sets it to %q, but Nix %s takes a path without arguments", set.where, set.value, v.version))
	case !runnable(program):
		tell(problem(subject, "put build-hook = "+hookBeside()+" into "+file, "%s names %q, which cannot be run", set.where, program))
	default:
		tell(fine(subject, "this user's builds run %s (set by %s)", set.value, set.where))
	}
	h.lookAtStock(func(name string) string { return h.getenv(name) }, "", tell)
}
