package daemon

import (
	"errors"
	"fmt"
	"strings"

	"nixdispatch/proto/nix/wire"
	"nixdispatch/sshpool"
)

// explainHandshake says what a failed start of the remote program means and what
// to do about it.
func (m *machine) explainHandshake(s *sshpool.Session, stderr *stderrReader, err error) error {
	h, ok := errors.AsType[*wire.HandshakeError](err)
	if !ok {
		return withStderr(err, stderr)
	}
	program, _, _ := strings.Cut(m.command, " ")
	switch h.Fault {
	case wire.Noise:
		return fmt.Errorf("the remote side printed %q before the protocol began; "+
			"most likely a start-up file of its shell (such as ~/.bashrc) prints something: make it silent for non-interactive shells", h.Got)
	case wire.UnsupportedVersion:
		return fmt.Errorf("%w; install Nix 2.8 or later there", h)
	}
	// The program ended without a word on stdout. Its exit status and stderr
	// tell why, once the session is over.
	_ = s.Stdin.Close()
	waitErr := s.Wait()
	exit, ok := errors.AsType[*sshpool.ExitError](waitErr)
	if ok && (exit.Status == 127 || strings.Contains(stderr.last(), "not found")) {
		return withStderr(fmt.Errorf("%q was not found there: make sure that PATH has Nix in non-interactive shells, "+
			"or name the program with ?remote-program=/path/to/%s", program, program), stderr)
	}
	if ok {
		return withStderr(fmt.Errorf("%q ended before the protocol began (%w)", m.command, exit), stderr)
	}
	return withStderr(err, stderr)
}

// withStderr adds the remote process's last words to an error.
func withStderr(err error, stderr *stderrReader) error {
	if words := stderr.last(); words != "" {
		return fmt.Errorf("%w; the remote side said: %q", err, words)
	}
	return err
}
