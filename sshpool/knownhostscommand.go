package sshpool

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	// knownHostsCommandTimeout bounds a command that tells host keys.
	knownHostsCommandTimeout = 15 * time.Second
	// knownHostsCommandName stands for the file's name.
	knownHostsCommandName = "KnownHostsCommand"
)

// askCommand adds the lines that KnownHostsCommand prints to what is known of the
// host: before there is a connection, to choose algorithms by (key is nil), and
// once the host has shown its key. See load_hostkeys_command in OpenSSH's
// sshconnect.c. It does nothing where no command is set.
func (k *hostKeys) askCommand(ctx context.Context, key ssh.PublicKey) error {
	t := k.target
	if t.KnownHostsCommand == "" || k.fixed != nil {
		return nil
	}
	words, err := splitArguments(t.KnownHostsCommand)
	if err != nil {
		return fmt.Errorf("KnownHostsCommand %q: %w", t.KnownHostsCommand, err)
	}
	if len(words) == 0 || !filepath.IsAbs(words[0]) {
		return fmt.Errorf("KnownHostsCommand %q: it does not begin with a full path", t.KnownHostsCommand)
	}
	tok := tokens{'H': k.name, 'I': "ORDER", 't': "NONE", 'f': "NONE", 'K': "NONE"}
	if key != nil {
		tok['I'], tok['t'], tok['f'] = "HOSTNAME", key.Type(), ssh.FingerprintSHA256(key)
		tok['K'] = base64.StdEncoding.EncodeToString(key.Marshal())
	}
	for letter, value := range t.tokens {
		tok[letter] = value
	}
	for i := range words[1:] {
		if words[i+1], err = tok.expand(words[i+1], os.Getenv); err != nil {
			return fmt.Errorf("KnownHostsCommand: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, knownHostsCommandTimeout)
	defer cancel()
	stdout, stderr := &headBuffer{limit: maxConfigOutput}, &headBuffer{limit: 2 << 10}
	cmd := childCommand(ctx, words)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	switch err := cmd.Run(); {
	case ctx.Err() != nil:
		return fmt.Errorf("KnownHostsCommand %q: %w", t.KnownHostsCommand, ctx.Err())
	case err != nil:
		return fmt.Errorf("KnownHostsCommand %q: %w: %s", t.KnownHostsCommand, err, oneLine(stderr.Bytes()))
	}
	r := &knownHostsReader{names: []string{k.name}, found: make([][]knownKey, 1)}
	if err := r.read(knownHostsCommandName, bytes.NewReader(stdout.Bytes())); err != nil {
		return err
	}
	k.known = slices.DeleteFunc(k.known, func(e knownKey) bool { return e.file == knownHostsCommandName })
	k.known = append(k.known, r.found[0]...)
	k.warnings = append(k.warnings, r.odd...)
	return nil
}

// childCommand is a command without a terminal that ends whole with ctx.
func childCommand(ctx context.Context, words []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, words[0], words[1:]...)
	cmd.Env = childEnv()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	return cmd
}

// splitArguments splits an option's value as argv_split in OpenSSH's misc.c does:
// at blanks but for quotes of both kinds; a backslash counts only before quotes,
// backslashes and, outside of quotes, blanks.
func splitArguments(text string) ([]string, error) {
	var words []string
	var word strings.Builder
	started := false
	quote := byte(0)
	for i := 0; i < len(text); i++ {
		c := text[i]
		next := byte(0)
		if i+1 < len(text) {
			next = text[i+1]
		}
		switch {
		case c == '\\' && (next == '\'' || next == '"' || next == '\\' || quote == 0 && next == ' '):
			i++
			word.WriteByte(next)
			started = true
		case quote != 0 && c == quote:
			quote = 0
		case quote != 0:
			word.WriteByte(c)
		case c == '"' || c == '\'':
			quote, started = c, true
		case c == ' ' || c == '\t':
			if started {
				words = append(words, word.String())
			}
			word.Reset()
			started = false
		default:
			word.WriteByte(c)
			started = true
		}
	}
	if quote != 0 {
		return nil, errors.New("unterminated quote")
	}
	if started {
		words = append(words, word.String())
	}
	return words, nil
}
