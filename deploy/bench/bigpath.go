package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"nixdispatch/deploy/fleet"
)

const (
	bigSize    = 512 << 20
	farBigSize = 128 << 20
	bigRounds  = 3
)

var bigPathRow = row{
	name:       "big path",
	work:       "a path of 512 MiB to a machine as an input, and back as an output, each with a build that takes no time",
	needsFleet: true,
	run: func(ctx context.Context, b *bench) ([]figure, error) {
		near, err := b.bigPath(ctx, nil, bigSize, bigRounds)
		if err != nil {
			return nil, err
		}
		far, err := b.bigPath(ctx, farAway(), farBigSize, 1)
		for n := range far {
			far[n].Case += ", 128 MiB at a round trip of 50 ms"
			far[n].Note = "x/crypto/ssh, like OpenSSH, has no more than 2 MiB of a channel on their way"
			far[n].Goals = nil
		}
		return append(near, far...), err
	},
}

// bigPath measures a path's ways to a machine and back.
func (b *bench) bigPath(ctx context.Context, far *fleet.ProxyConfig, size, rounds int) (_ []figure, err error) {
	machines := plainMachines(1)
	machines[0].far = far
	s, err := b.newSite(ctx, siteConfig{machines: machines})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	big, err := s.addRandom(ctx, s.client, "big", size)
	if err != nil {
		return nil, err
	}
	up := figure{Case: "up", Unit: "s", Goals: []goal{{Side: ours, Of: stock, AtMost: 1}}}
	err = b.rounds(ctx, &up, rounds, s.upBy(ours, ourHook, big), s.upBy(stock, stockHook, big), measure{limit, s.pipeUp(big)})
	if err != nil {
		return nil, err
	}
	down := figure{Case: "down", Unit: "s", Goals: []goal{{Side: ours, Of: stock, AtMost: 1 / 1.5}}}
	drvPath, output, err := s.readyOutput(ctx, size)
	if err != nil {
		return nil, err
	}
	err = b.rounds(ctx, &down, rounds, s.downBy(ours, ourHook, drvPath, output), s.downBy(stock, stockHook, drvPath, output), measure{limit, s.pipeDown(output)})
	return []figure{up, down}, err
}

// addRandom puts a file of random bytes into a host's store.
func (s *site) addRandom(ctx context.Context, h *fleet.Host, name string, size int) (string, error) {
	out, err := h.Run(ctx, "sh", "-c", fmt.Sprintf(
		`head -c %d /dev/urandom >/srv/%s && nix-store --add /srv/%[2]s && rm /srv/%[2]s`, size, name))
	return strings.TrimSpace(out.Stdout), err
}

// needing is an expression for a build that needs paths, on a machine with a
// feature ("" for any), and runs a shell command besides making its output.
func needing(name, feature, command string, paths ...string) string {
	var refs strings.Builder
	for _, p := range paths {
		fmt.Fprintf(&refs, ` (builtins.storePath "%s")`, p)
	}
	return fmt.Sprintf(`derivation { name = "%s"; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
		requiredSystemFeatures = [ %s ]; inputs = [%s ]; args = [ "-c" "echo %[1]s > $out; %[4]s" ]; }`,
		name, quoted(feature), refs.String(), command)
}

func quoted(feature string) string {
	if feature == "" {
		return ""
	}
	return `"` + feature + `"`
}

// upBy measures a build on a machine that does not have its input.
func (s *site) upBy(side, hook string, inputs ...string) measure {
	return measure{side, func(ctx context.Context, round int) (float64, error) {
		if err := s.forget(ctx, s.machines[0], inputs); err != nil {
			return 0, err
		}
		took, _, err := s.nixBuild(ctx, needing(fmt.Sprintf("up-%s-%d", side, round), "", ":", inputs...), hookOption(hook)...)
		return took.Seconds(), err
	}}
}

// forgetWait is how long a path may be in use yet, by a remote process that is
// kept for the next build.
const forgetWait = time.Minute

// forget removes those of paths that a host's store has. Nothing may refer to
// them.
func (s *site) forget(ctx context.Context, h *fleet.Host, paths []string) error {
	for end := time.Now().Add(forgetWait); ; {
		cmd := h.Command(ctx, "root", "sh", "-c", `while read p; do test ! -e $p || echo $p; done | xargs -r nix-store --delete`)
		cmd.Stdin = strings.NewReader(strings.Join(paths, "\n") + "\n")
		out, err := cmd.CombinedOutput()
		if err == nil {
			return nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return fmt.Errorf("delete paths on %s: %w: %s", h.Name(), err, tail(string(out), 1000))
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// pipeUp measures what copies a path without Nix's help: a dump, ssh, and a
// restore, and the hash that whoever registers it has to make.
func (s *site) pipeUp(p string) func(context.Context, int) (float64, error) {
	return s.pipe(fmt.Sprintf(`nix-store --dump %s | ssh -o Compression=no root@%s 'rm -rf /srv/copy; nix-store --restore /srv/copy'`, p, s.names[0]),
		fmt.Sprintf("nix-store --dump %s | sha256sum", p))
}

func (s *site) pipeDown(p string) func(context.Context, int) (float64, error) {
	return s.pipe(fmt.Sprintf(`rm -rf /srv/copy; ssh -o Compression=no root@%s nix-store --dump %s | nix-store --restore /srv/copy`, s.names[0], p),
		"nix-store --dump /srv/copy | sha256sum")
}

func (s *site) pipe(commands ...string) func(context.Context, int) (float64, error) {
	return func(ctx context.Context, _ int) (float64, error) {
		started := time.Now()
		for _, c := range commands {
			if _, err := s.run(ctx, "sh", "-c", c); err != nil {
				return 0, err
			}
		}
		return time.Since(started).Seconds(), nil
	}
}

// readyOutput has the first machine build a large output before anybody asks for
// it: then bringing it here is all there is to do.
func (s *site) readyOutput(ctx context.Context, size int) (drvPath, output string, err error) {
	expr := fmt.Sprintf(`derivation { name = "large"; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
		args = [ "-c" "head -c %d /dev/urandom > $out" ]; }`, size)
	if drvPath, err = s.run(ctx, "nix-instantiate", "--expr", expr); err != nil {
		return "", "", err
	}
	if output, err = s.run(ctx, "nix-store", "--query", "--outputs", drvPath); err != nil {
		return "", "", err
	}
	_, err = s.machines[0].Run(ctx, "nix-build", "--no-out-link", "--expr", expr)
	return drvPath, output, err
}

// downBy measures a build whose output is on the machine.
func (s *site) downBy(side, hook, drvPath, output string) measure {
	return measure{side, func(ctx context.Context, _ int) (float64, error) {
		if err := s.forget(ctx, s.client, []string{output}); err != nil {
			return 0, err
		}
		started := time.Now()
		_, err := s.run(ctx, append([]string{"nix-store", "--realise", drvPath}, hookOption(hook)...)...)
		return time.Since(started).Seconds(), err
	}}
}
