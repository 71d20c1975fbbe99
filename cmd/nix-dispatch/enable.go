package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"nixdispatch/proto/nix"
)

const enableAbout = `Has Nix on this host build through nix-dispatch: sets build-hook in root's own nix.conf
(~root/.config/nix/nix.conf), which every version of Nix heeds, for nix-daemon as well as
for root's own builds; enables and starts nix-dispatchd's units; restarts nix-daemon, whose
connections, and the builds on them, go on. What is done is told, and at the end whether
Nix now asks nix-dispatch. Doing it again changes nothing. Only for root.

A nix.conf that is a link, as where NixOS makes it, or that sets another build-hook, is not
touched.

Examples:
  nix-dispatch enable --dry-run
  nix-dispatch enable

Exit status: 0 done, 1 something is left to do, which is told, 2 wrong usage.`

const disableAbout = `Has Nix on this host build without nix-dispatch, as before: takes build-hook out of root's
own nix.conf and of /etc/nix/nix.conf where it is set to nix-dispatch, and restarts
nix-daemon, whose connections, and the builds on them, go on. Builds in progress end as they
would. nix-dispatchd goes on running. Only for root.

A 'nix build' that began before goes on to use nix-dispatch until it ends; before the
programs are removed, wait for it with --wait.

Examples:
  nix-dispatch disable --dry-run
  nix-dispatch disable --wait 10m

Exit status: 0 done, 1 something is left to do, which is told, 2 wrong usage.`

func enableCommand() *command {
	c := newCommand("enable", "", "have Nix build through nix-dispatch", enableAbout)
	dryRun := dryRunFlag(c.Flags)
	c.run = func(ctx context.Context, _ []string, std stdio) int {
		return newSwitch(ctx, *dryRun, std.out).run(std, (*hookSwitch).enable)
	}
	return c
}

func disableCommand() *command {
	c := newCommand("disable", "", "have Nix build without nix-dispatch", disableAbout)
	dryRun := dryRunFlag(c.Flags)
	wait := c.Flags.Duration("wait", 0, "wait for root's Nix processes that began before, for at most this `DURATION`")
	c.run = func(ctx context.Context, _ []string, std stdio) int {
		ctx, stop := interruptible(ctx)
		defer stop()
		return newSwitch(ctx, *dryRun, std.out).run(std, func(s *hookSwitch) error { return s.disable(*wait) })
	}
	return c
}

func dryRunFlag(flags *flag.FlagSet) *bool {
	return flags.Bool("dry-run", false, "only tell what would be done")
}

// A hookSwitch sets Nix's build-hook to nix-dispatch, or takes it out.
type hookSwitch struct {
	ctx    context.Context
	host   *host
	hook   string // the path of its program
	dryRun bool
	out    io.Writer
	// systemctl runs it and returns what it prints; nil where there is no systemd.
	systemctl func(ctx context.Context, args ...string) (string, error)
}

func newSwitch(ctx context.Context, dryRun bool, out io.Writer) *hookSwitch {
	s := &hookSwitch{ctx: ctx, host: thisHost(), hook: hookBeside(), dryRun: dryRun, out: out}
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		s.systemctl = systemctl
	}
	return s
}

func systemctl(ctx context.Context, args ...string) (string, error) {
	var stderr strings.Builder
	cmd := exec.CommandContext(ctx, "systemctl", args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, nix.PlainText(strings.TrimSpace(stderr.String())))
	}
	return strings.TrimSpace(string(out)), err
}

func (s *hookSwitch) run(std stdio, change func(*hookSwitch) error) int {
	err := errors.New("this is for root")
	if s.host.uid == s.host.rootUID {
		err = change(s)
	}
	if err != nil {
		fmt.Fprintf(std.err, "nix-dispatch: %v\n", err)
		return exitFailed
	}
	return exitOK
}

// say tells of a change.
func (s *hookSwitch) say(format string, args ...any) {
	if s.dryRun {
		format = "would: " + format
	}
	fmt.Fprintf(s.out, format+"\n", args...)
}

func (s *hookSwitch) rootConf() string { return filepath.Join(s.host.rootHome, ".config/nix/nix.conf") }

func (s *hookSwitch) enable() error {
	if !runnable(s.hook) {
		return fmt.Errorf("%s is not there, or cannot be run", s.hook)
	}
	file, err := readOwnConf(s.rootConf())
	if err != nil {
		return err
	}
	text, err := withHook(file.text, s.hook)
	if err != nil {
		return fmt.Errorf("%s: %w", file.path, err)
	}
	if text == file.text {
		fmt.Fprintf(s.out, "%s: sets build-hook = %s already\n", file.path, s.hook)
	} else if err := s.change(file, text, "set build-hook = "+s.hook); err != nil {
		return err
	}
	if err := errors.Join(s.startUnits(), s.restartNix()); err != nil || s.dryRun {
		return err
	}
	return s.verify(true)
}

func (s *hookSwitch) disable(wait time.Duration) error {
	before := s.host.rootsNix()
	var errs []error
	changed := false
	for _, path := range []string{s.rootConf(), systemConf(s.host.confEnvironment())} {
		text, err := s.host.readFile(path)
		if err != nil || withoutHook(string(text)) == string(text) {
			continue // whoever made it, it is not about us
		}
		changed = true
		file, err := readOwnConf(path)
		if err == nil {
			err = s.change(file, withoutHook(file.text), "take build-hook out")
		}
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if !changed {
		fmt.Fprintln(s.out, "no nix.conf sets build-hook to nix-dispatch")
	} else if err := s.restartNix(); err != nil {
		return err
	}
	if s.dryRun {
		return nil
	}
	if err := s.verify(false); err != nil {
		return err
	}
	return s.waitFor(before, wait)
}

// change writes a configuration file anew.
func (s *hookSwitch) change(file confFile, text, what string) error {
	if !s.dryRun {
		if err := file.write(text); err != nil {
			return fmt.Errorf("write %s: %w", file.path, err)
		}
	}
	s.say("%s: %s", file.path, what)
	return nil
}

// startUnits enables and starts nix-dispatchd where its units are installed.
func (s *hookSwitch) startUnits() error {
	const socket, service = "nix-dispatchd.socket", "nix-dispatchd.service"
	if s.systemctl == nil {
		s.say("start nix-dispatchd: there is no systemd that would")
		return nil
	}
	if state, _ := s.systemctl(s.ctx, "show", "--value", "-p", "LoadState", service); state != "loaded" {
		s.say("start nix-dispatchd: its unit is not installed, or needs 'systemctl daemon-reload'")
		return nil
	}
	enabled, _ := s.systemctl(s.ctx, "is-enabled", socket, service)
	active, _ := s.systemctl(s.ctx, "is-active", socket, service)
	if enabled == "enabled\nenabled" && active == "active\nactive" {
		fmt.Fprintln(s.out, "nix-dispatchd: runs already")
		return nil
	}
	s.say("nix-dispatchd: enable and start it")
	if s.dryRun {
		return nil
	}
	_, err := s.systemctl(s.ctx, "enable", "--now", socket, service)
	return err
}

// restartNix has nix-daemon read its configuration, if that ends no builds.
func (s *hookSwitch) restartNix() error {
	const unit = "nix-daemon.service"
	if s.systemctl == nil {
		s.say("restart nix-daemon, which reads its configuration only at its start: there is no systemd that would")
		return nil
	}
	properties, err := s.systemctl(s.ctx, "show", "-p", "ActiveState", "-p", "KillMode", unit)
	lines := strings.Split(properties, "\n")
	switch {
	case err != nil:
		return err
	case !slices.Contains(lines, "ActiveState=active"):
		return nil // it will read it when it starts
	case !slices.Contains(lines, "KillMode=process"):
		s.say("restart nix-daemon when nothing builds: 'systemctl restart nix-daemon' would end all builds, as its unit has no KillMode=process")
		return nil
	}
	s.say("nix-daemon: restart it; its connections go on")
	if s.dryRun {
		return nil
	}
	_, err = s.systemctl(s.ctx, "try-restart", unit)
	return err
}

// verify tells whether Nix asks nix-dispatch, and whether it should.
func (s *hookSwitch) verify(should bool) error {
	h := s.host
	d, err := h.findNixDaemon()
	if err != nil {
		d = &nixDaemon{env: map[string]string{}} // as it would be started
	}
	version := ""
	if local, err := h.askNix(); err == nil {
		version = local.version
		local.close()
	}
	v := hookRules(version)
	set, err := h.daemonSetting(hookSubject, d, v.ignoresFile)
	switch {
	case err != nil:
		return fmt.Errorf("the configuration is rejected by Nix: %w", err)
	case should && version != "":
		if f := h.judge(set, v, d.env); f.Level != levelOK {
			return fmt.Errorf("%s: %s; %s", f.Subject, f.Text, f.Fix)
		}
		fmt.Fprintf(s.out, "Nix %s builds through nix-dispatch; 'nix-dispatch doctor' looks at the machines\n", version)
	case !should && isOurs(set.value):
		return fmt.Errorf("build-hook is still %s, set by %s: take it out there, and restart nix-daemon", set.value, set.where)
	case !should:
		fmt.Fprintln(s.out, "Nix builds without nix-dispatch")
	}
	return nil
}
