package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"nixdispatch/proto/nix/wire"
	"nixdispatch/proto/nix/worker"
	"nixdispatch/sshpool"
)

// This file makes the words for what keeps a machine's Nix from being used, once
// ssh has run a command there: for the state of machines, for builds that fail
// and for ping.

// The causes of that, beside those of sshpool. The words are fixed.
const (
	causeNotFound  sshpool.Cause = "command not found"
	causeNoLogin   sshpool.Cause = "no login"
	causeNoise     sshpool.Cause = "shell noise"
	causeEnded     sshpool.Cause = "command ended"
	causeVersion   sshpool.Cause = "protocol version"
	causeDiskFull  sshpool.Cause = "disk full"
	causeNoDaemon  sshpool.Cause = "no nix-daemon"
	causeDenied    sshpool.Cause = "user not allowed"
	causeOwnStore  sshpool.Cause = "own store"
	causeUntrusted sshpool.Cause = "user not trusted"
	causeClaims    sshpool.Cause = "claims"
)

// A nixFault is why a machine's Nix cannot be used.
type nixFault struct {
	cause sshpool.Cause
	err   error
	fix   string // what to do about it
	// greeted tells that the machine's Nix was found, and spoke.
	greeted bool
}

// Error says what is wrong and what to do.
func (e *nixFault) Error() string { return fmt.Sprintf("%v; %s", e.err, e.fix) }
func (e *nixFault) Unwrap() error { return e.err }

// errOwnStore says that a machine's store is this host's own. A build sent there
// would wait for the locks that its caller holds on the outputs, for ever, and
// be offered to this daemon again.
var errOwnStore error = &nixFault{
	cause: causeOwnStore,
	err:   errors.New("the store there is this host's own, and builds sent to it would wait for themselves"),
	fix:   "take the machine out of the list, or give it a store of its own with ?remote-store=",
}

// knownWords are what Nix, or the system, prints when it cannot work, with what
// that means: src/libstore/sqlite.cc, uds-remote-store.cc and src/nix/unix/daemon.cc
// of Nix 2.34.8, and nologin of util-linux, shadow and the BSDs.
var knownWords = []struct {
	words    []string // any of them
	cause    sshpool.Cause
	err, fix string
}{
	{
		[]string{"No space left on device", "database or disk is full", "Disk quota exceeded"}, causeDiskFull,
		"the disk there is full", "make room on it, for example with nix-collect-garbage",
	},
	{
		[]string{"cannot connect to socket at", "cannot connect to daemon at"}, causeNoDaemon,
		"its nix-daemon does not answer", "start nix-daemon there, or log in as the user that owns the store",
	},
	{
		[]string{
			"is not allowed to connect to the Nix daemon", // it tells its own log only, and closes
			"cannot open connection to remote store 'daemon'", "splicing data from daemon socket", "unexpected EOF from daemon socket",
		}, causeDenied,
		"its nix-daemon does not let the user in", "add the user to allowed-users in nix.conf there, and restart nix-daemon",
	},
	{
		[]string{"account is currently not available"}, causeNoLogin,
		"the user's login shell there lets nobody in", "give the user a shell there that runs commands: chsh -s /bin/sh USER",
	},
}

// explainWords says what the words of a machine's Nix mean; nil if they are not
// known.
func explainWords(words string) *nixFault {
	for _, k := range knownWords {
		for _, w := range k.words {
			if strings.Contains(words, w) {
				return &nixFault{cause: k.cause, err: fmt.Errorf("%s: it said %q", k.err, words), fix: k.fix}
			}
		}
	}
	return nil
}

// explain says why something failed that the machine's Nix was asked for.
func explain(stderr *stderrReader, err error) error {
	words := stderr.lastAfter(err)
	if remote, ok := errors.AsType[*worker.RemoteError](err); ok {
		words = remote.Message
	}
	if known := explainWords(words); known != nil {
		return known
	}
	return withStderr(err, stderr)
}

// withStderr adds the remote process's last words to an error.
func withStderr(err error, stderr *stderrReader) error {
	if words := stderr.lastAfter(err); words != "" {
		return fmt.Errorf("%w; the remote side said: %q", err, words)
	}
	return err
}

// explainHandshake says what a failed start of the remote program means and what
// to do about it. ctx is the one that bounded the start.
func (m *machine) explainHandshake(ctx context.Context, s *sshpool.Session, r *remote, err error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		waited := time.Since(r.started).Round(100 * time.Millisecond)
		return &nixFault{
			cause: sshpool.CauseTimeout,
			err:   withStderr(fmt.Errorf("%q was started, and no greeting came within %v", m.command, waited), r.stderr),
			fix:   "look what it, or a start-up file of the shell there, waits for",
		}
	}
	h, ok := errors.AsType[*wire.HandshakeError](err)
	if !ok {
		return explain(r.stderr, err)
	}
	switch h.Fault {
	case wire.Noise:
		return m.explainNoise(s, r.stderr, h)
	case wire.UnsupportedVersion:
		fix := "install Nix 2.8 or later there"
		if h.Version > h.Oldest {
			fix = "look for a newer nix-dispatch, or install an older Nix there"
		}
		return &nixFault{cause: causeVersion, err: h, fix: fix, greeted: true}
	default:
		return m.explainSilence(s, r.stderr, h)
	}
}

// explainNoise is for what is not the protocol: printed before it, or in place of
// it.
func (m *machine) explainNoise(s *sshpool.Session, stderr *stderrReader, h *wire.HandshakeError) error {
	exit := ending(s, stderr)
	if known := explainWords(string(h.Got)); known != nil {
		return known
	}
	greeting := serveGreeting
	if m.ng {
		greeting = workerGreeting
	}
	noise, _, greeted := bytes.Cut(h.Got, []byte(greeting))
	switch {
	case m.notFound(exit, stderr.last()):
		return m.noProgram(stderr)
	case !greeted && exit != nil && !strings.Contains(stderr.last(), "error:"):
		// A Nix that finds its input closed ends in order, or complains.
		return &nixFault{
			cause: causeEnded,
			err:   withStderr(fmt.Errorf("the remote side printed %q and ended (%w) in place of %q", h.Got, exit, m.command), stderr),
			fix:   "look at the user's login shell there, and at what its start-up files and command= in authorized_keys run",
		}
	}
	return &nixFault{
		cause: causeNoise,
		err:   fmt.Errorf("the remote side printed %q before the protocol began", noise),
		fix:   "most likely a start-up file of its shell (such as ~/.bashrc) prints something: make it silent for non-interactive shells",
	}
}

// What the programs say first, in little-endian words of 64 bits
// (serve-protocol.hh and worker-protocol.hh of Nix 2.34.8).
const (
	serveGreeting  = "\xcb\xee\x52\x54\x00\x00\x00\x00"
	workerGreeting = "oixd\x00\x00\x00\x00"
)

// explainSilence is for a program that ended without a word on stdout, or after
// its greeting. Its exit status and stderr tell why.
func (m *machine) explainSilence(s *sshpool.Session, stderr *stderrReader, h *wire.HandshakeError) error {
	exit := ending(s, stderr)
	words := stderr.last()
	switch known := explainWords(words); {
	case m.notFound(exit, words):
		return m.noProgram(stderr)
	case known != nil:
		known.greeted = h.Greeted
		return known
	case exit == nil:
		return withStderr(h, stderr)
	case h.Greeted && words == "":
		// Since 2.26, and silently (runDaemon in src/nix/unix/daemon.cc).
		return &nixFault{
			cause:   causeNoDaemon,
			err:     fmt.Errorf("%q greeted and ended (%w): the nix-daemon behind it does not answer, or does not let the user in", m.command, exit),
			fix:     "start nix-daemon there, or add the user to allowed-users in its nix.conf",
			greeted: true,
		}
	}
	fix := "run it there by hand, as the same user, and see"
	if words == "" {
		fix = "look whether the user's login shell there runs commands: /bin/false and nologin do not"
	}
	return &nixFault{
		cause:   causeEnded,
		err:     withStderr(fmt.Errorf("%q ended before the protocol began (%w)", m.command, exit), stderr),
		fix:     fix,
		greeted: h.Greeted,
	}
}

// endWait bounds the wait for a command that has been hung up on.
const endWait = 3 * time.Second

// ending ends a command whose start has failed, and says how it ended; nil if in
// order, or not known. Then all is read that it printed.
func ending(s *sshpool.Session, stderr *stderrReader) *sshpool.ExitError {
	_ = s.Stdin.Close()
	timer := time.NewTimer(endWait)
	defer timer.Stop()
	for _, end := range []<-chan struct{}{s.Done(), stderr.ended} {
		select {
		case <-end:
		case <-timer.C:
			return nil
		}
	}
	exit, _ := errors.AsType[*sshpool.ExitError](s.Wait())
	return exit
}

// program is the first word of the remote command.
func (m *machine) program() string {
	program, _, _ := strings.Cut(m.command, " ")
	return program
}

// notFound tells whether a shell did not find the program. Not all of them have
// the status 127 for that.
func (m *machine) notFound(exit *sshpool.ExitError, words string) bool {
	return exit != nil && (exit.Status == 127 ||
		strings.Contains(words, "ommand not found") || strings.Contains(words, m.program()+": not found"))
}

func (m *machine) noProgram(stderr *stderrReader) error {
	return &nixFault{
		cause: causeNotFound,
		err:   withStderr(fmt.Errorf("%q was not found there", m.program()), stderr),
		fix:   fmt.Sprintf("make sure that PATH has Nix in non-interactive shells, or name the program with ?remote-program=/path/to/%s", path.Base(m.program())),
	}
}
