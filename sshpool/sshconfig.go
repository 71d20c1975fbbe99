package sshpool

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// This file asks OpenSSH what its configuration means for a host: "ssh -G" with
// the arguments of the command that would connect to it. So aliases, Include,
// Match and whatever a later version brings come with no code here.
//
// What ssh would do without any configuration is asked as well: what differs was
// set by somebody, and if it cannot be followed they are told.

const (
	// maxConfigOutput is more than ssh prints with the longest lists.
	maxConfigOutput = 1 << 20
	// configTimeout bounds ssh -G, which can run commands (Match exec) and ask
	// the name service (CanonicalizeHostname).
	configTimeout = 15 * time.Second
)

// Resolve finds out how a host is reached. With [Config.SSHConfig] it runs ssh,
// for up to 15 s, and whatever the user's configuration makes that run. Where
// there is no ssh program, the target is that of a Config without it. The error is a [*ConnectError] of [StepConfig].
func Resolve(ctx context.Context, cfg Config) (*Target, error) {
	t, err := newResolver().resolve(ctx, cfg)
	if err != nil {
		return nil, configError(cfg, err)
	}
	return t, nil
}

func configError(cfg Config, err error) *ConnectError {
	fix := ""
	if cfg.SSHConfig {
		words := slices.DeleteFunc(sshArguments(cfg), func(w string) bool { return w == "-T" || w == "-x" })
		fix = fmt.Sprintf("try as this user: ssh %s", strings.Join(words, " "))
	}
	return &ConnectError{Host: cfg.Name, Step: StepConfig, Cause: CauseConfig, Err: err, Fix: fix}
}

// maxAsking bounds how many ssh -G of a pool run at once.
const maxAsking = 8

// A resolver runs ssh -G. It is safe for concurrent use.
type resolver struct {
	places chan struct{} // one taken for each ssh that runs

	mu       sync.Mutex // protects following fields
	defaults sshOptions // ssh's own; nil: not known
}

func newResolver() *resolver { return &resolver{places: make(chan struct{}, maxAsking)} }

func (r *resolver) resolve(ctx context.Context, cfg Config) (*Target, error) {
	me, err := currentUser()
	if err != nil {
		return nil, err
	}
	if !cfg.SSHConfig {
		return plainTarget(cfg, me), nil
	}
	if strings.HasPrefix(cfg.Host, "-") || strings.HasPrefix(cfg.User, "-") {
		return nil, fmt.Errorf("host %q, user %q: neither may begin with a dash", cfg.Host, cfg.User)
	}
	program, err := exec.LookPath("ssh")
	if err != nil {
		t := plainTarget(cfg, me)
		t.noProgram = err
		return t, nil
	}
	defaults := r.askDefaults(ctx, program)
	opts, err := r.ask(ctx, program, sshArguments(cfg))
	if err != nil {
		return nil, err
	}
	t, err := targetOf(opts, defaults, cfg, me)
	if err != nil {
		return nil, err
	}
	t.sshProgram = program
	for _, file := range cfg.IdentityFiles {
		// ssh leaves out a file of -i that it cannot find.
		if _, err := os.Stat(file); err != nil {
			t.lost = append(t.lost, err.Error())
			t.Warnings = append(t.Warnings, "the key named for the machine is left out: "+err.Error())
		}
	}
	t.SSHConfigFile = configFileOf(cfg.SSHOptions)
	return t, nil
}

// askDefaults returns what ssh does without any configuration, nil if that cannot
// be found out: then nothing is known to have been set by somebody.
func (r *resolver) askDefaults(ctx context.Context, program string) sshOptions {
	r.mu.Lock()
	defaults := r.defaults
	r.mu.Unlock()
	if defaults != nil {
		return defaults
	}
	defaults, err := r.ask(ctx, program, []string{"-G", "-T", "-F", "/dev/null", "none"})
	if err != nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.defaults = defaults
	return defaults
}

// ask runs ssh -G when it is its turn.
func (r *resolver) ask(ctx context.Context, program string, args []string) (sshOptions, error) {
	select {
	case r.places <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-r.places }()
	ctx, cancel := context.WithTimeout(ctx, configTimeout)
	defer cancel()
	return askSSH(ctx, program, args)
}

// sshArguments are those that Nix would give to ssh, in its order, in which the
// first of several values counts: SSHMaster::addCommonSSHOpts in Nix's ssh.cc.
func sshArguments(cfg Config) []string {
	host := cfg.Host
	if cfg.User != "" {
		host = cfg.User + "@" + host
	}
	args := []string{"-G", "-T", host, "-x"}
	args = append(args, cfg.SSHOptions...)
	for _, file := range cfg.IdentityFiles {
		args = append(args, "-i", file)
	}
	if cfg.Port != 0 {
		args = append(args, "-p"+strconv.Itoa(cfg.Port))
	}
	return args
}

// askSSH runs ssh -G.
func askSSH(ctx context.Context, program string, args []string) (sshOptions, error) {
	// A session of its own has no terminal to ask somebody at, and ends whole.
	cmd := childCommand(ctx, append([]string{program}, args...))
	stdout, stderr := &headBuffer{limit: maxConfigOutput}, &headBuffer{limit: 4 << 10}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	err := cmd.Run()
	switch {
	case ctx.Err() == context.DeadlineExceeded:
		return nil, fmt.Errorf("ssh -G has not ended after %v (a slow Match exec?)", configTimeout)
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("ssh -G: %w: %s", err, oneLine(stderr.Bytes()))
	case stdout.full:
		return nil, fmt.Errorf("ssh -G printed more than %d bytes", maxConfigOutput)
	}
	return parseSSHOptions(stdout.Bytes())
}

// childEnv is the environment of what ssh_config makes us run. As in Nix
// (createSSHEnv in ssh.cc) commands are for /bin/sh, and there is nobody to ask.
func childEnv() []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == "DISPLAY" || name == "SSH_ASKPASS" || name == "SSH_ASKPASS_REQUIRE" || name == "SHELL"
	})
	return append(env, "SHELL=/bin/sh")
}

// configFileOf finds the argument of the last -F among options of ssh, which ssh
// passes on to the ssh of a ProxyJump.
func configFileOf(words []string) string {
	// The options of ssh that take an argument, of ssh.c's getopt.
	const withArgument = "bceimopBDEFIJLOPQRSWwl"
	file := ""
	for i := 0; i < len(words); i++ {
		letters, ok := strings.CutPrefix(words[i], "-")
		if !ok {
			continue
		}
		if letters == "-" {
			break
		}
		at := strings.IndexAny(letters, withArgument)
		if at < 0 {
			continue
		}
		argument := letters[at+1:]
		if argument == "" && i+1 < len(words) {
			i++
			argument = words[i]
		}
		if letters[at] == 'F' {
			file = argument
		}
	}
	return file
}

// A headBuffer keeps the first bytes written to it, and notes if there are more.
type headBuffer struct {
	bytes.Buffer
	limit int
	full  bool
}

// Write never fails.
func (b *headBuffer) Write(p []byte) (int, error) {
	n := min(len(p), b.limit-b.Len())
	b.full = b.full || n < len(p)
	b.Buffer.Write(p[:n])
	return len(p), nil
}

// oneLine makes what a program printed fit for a message.
func oneLine(text []byte) string {
	lines := strings.FieldsFunc(string(text), func(r rune) bool { return r == '\n' || r == '\r' })
	for i, l := range lines {
		lines[i] = strings.TrimSpace(strings.Map(func(r rune) rune {
			if r < ' ' || r == 0x7f || r == '\uFFFD' {
				return '?'
			}
			return r
		}, l))
	}
	return strings.Join(lines, ": ")
}
