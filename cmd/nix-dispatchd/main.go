// Command nix-dispatchd keeps SSH connections to the machines of Nix's builders
// setting and builds on them what it is asked to over a unix socket.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"nixdispatch/cmd/internal/cli"
	"nixdispatch/cmd/internal/daemonsocket"
	"nixdispatch/daemon"
	"nixdispatch/proto/nix"
)

// version is set at build time.
var version = "dev"

const about = `Keeps SSH connections to the machines of Nix's builders setting open and builds on them
what nix-dispatch and Nix's build hook ask for.

Signals:
  HUP        read the list of machines anew
  TERM, INT  stop, after the builds in progress; a second one: at once

Examples:
  nix-dispatchd
  nix-dispatchd --builders 'ssh://mac x86_64-darwin ; ssh-ng://nix@big - - 16 2 kvm'
  nix-dispatchd --user`

// gcPercent has the collector run twice as often as Go's default does: the daemon
// makes little garbage, and what thousands of waiting builds take is not to be doubled.
const gcPercent = 50

func main() {
	syscall.Umask(0o077)
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	ctx, hurry := stopSignals()
	hangup := make(chan os.Signal, 1) // one that is not seen yet will do for all
	signal.Notify(hangup, syscall.SIGHUP)
	os.Exit(run(ctx, os.Args[1:], signals{hangup, hurry}, os.Stdout, os.Stderr))
}

// signals are what the daemon is told while it runs.
type signals struct {
	hangup <-chan os.Signal
	hurry  <-chan struct{} // closed when it is to stop at once
}

// stopSignals returns a context that ends with the first signal to stop, and a
// channel that is closed with the second.
func stopSignals() (context.Context, <-chan struct{}) {
	ctx, cancel := context.WithCancel(context.Background())
	caught := make(chan os.Signal, 2)
	signal.Notify(caught, syscall.SIGTERM, syscall.SIGINT)
	hurry := make(chan struct{})
	go func() { // ends with the process
		<-caught
		cancel()
		<-caught
		close(hurry)
	}()
	return ctx, hurry
}

// run is the program without the process around it. It returns the exit status:
// 0, 1 if the daemon failed, 2 for bad usage.
func run(ctx context.Context, args []string, told signals, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == "probe" {
		return probe(ctx, args[1:], stdout, stderr)
	}
	if ok, err := generator().Run(args, stdout); err != nil {
		fmt.Fprintf(stderr, "nix-dispatchd: %v\n", err)
		return 2
	} else if ok {
		return 0
	}
	opts, level, err := parse(args, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(stderr, "nix-dispatchd: %v\nTry 'nix-dispatchd --help'.\n", err)
		return 2
	}
	opts.Logger, opts.Hangup, opts.Hurry = newLogger(stderr, level), told.hangup, told.hurry
	err = underSystemd(&opts)
	if err == nil {
		err = serve(ctx, opts)
	}
	if err != nil {
		opts.Logger.Error("nix-dispatchd failed", "err", err)
		return 1
	}
	return 0
}

func serve(ctx context.Context, opts daemon.Options) error {
	d, err := daemon.New(opts)
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// settings are what the command line says.
type settings struct {
	daemon.Options
	level       slog.Level
	showVersion bool
}

// commandLine describes the program; parsing its flags fills in the settings.
func commandLine() (*cli.Command, *settings) {
	s := &settings{Options: daemon.Options{Version: version}}
	flags := cli.NewFlags("nix-dispatchd")
	flags.StringVar(&s.Builders, "builders", "", "the machines, `TEXT` as in Nix's builders setting; by default that setting in Nix's configuration, which is \"@/etc/nix/machines\" unless it says otherwise")
	flags.StringVar(&s.MachinesGroup, "machines-group", "", "a group, by its `NAME`, whose members may name machines in their requests, as root may. That is as good as being root")
	flags.BoolVar(&s.PerUser, "user", false, "serve this user only, without root: also private stores ('nix build --store DIR') and single-user installations. It changes other defaults, as is said there")
	flags.StringVar(&s.Socket, "socket", daemonsocket.Default, "listen at this `PATH`; with --user by default $XDG_RUNTIME_DIR/nix-dispatch/socket")
	flags.StringVar(&s.MetricsListen, "metrics-listen", "127.0.0.1:9747", "Prometheus may scrape /metrics at this `ADDRESS`, \"\" for nowhere; with --user by default nowhere")
	flags.StringVar(&s.MetricsConfig, "metrics-config", "", "TLS and passwords for --metrics-listen: the `FILE` that Prometheus's exporters call a web configuration file; by default neither")
	flags.BoolVar(&s.PageNames, "page-names", false, "on the page at --metrics-listen, name derivations, users and what machines say also where no password is asked for")
	flags.StringVar(&s.StateDir, "state-dir", "/var/lib/nix-dispatch", "keep what must not be in memory, and which machines are drained, in `DIR`; with --user by default $XDG_STATE_HOME/nix-dispatch, in ~/.local/state")
	flags.Func("hedge", "whether a build is started on a second machine as well when its own has not answered for 10 seconds, `on|off`; fixed-output derivations never are (default on)", func(value string) error {
		if value != "on" && value != "off" {
			return errors.New("must be on or off")
		}
		s.NoHedge = value == "off"
		return nil
	})
	flags.DurationVar(&s.MachineWait, "machine-wait", 5*time.Minute, "how long a build waits while none of its machines is up, a `DURATION`")
	flags.DurationVar(&s.DrainTimeout, "drain-timeout", 10*time.Minute, "how long builds in progress may go on after a signal to stop, a `DURATION`; what is asked for meanwhile is put off")
	gateFlags(flags, &s.Options)
	flags.TextVar(&s.level, "log-level", slog.LevelInfo, "a `LEVEL`: debug, info, warn or error")
	flags.Lookup("log-level").DefValue = "info"
	flags.BoolVar(&s.showVersion, "version", false, "print the version and exit")
	probe, _ := probeCommand()
	return &cli.Command{
		Name: "nix-dispatchd", Summary: "build for Nix on other machines", About: about,
		Flags: flags, Commands: []*cli.Command{probe},
	}, s
}

// generator makes the manual page and completions.
func generator() *cli.Generator {
	c, _ := commandLine()
	return &cli.Generator{
		Program: c, Version: version, ManSection: "8",
		SeeAlso: []string{"nix-dispatch(1)", "nix-daemon(8)", "nix.conf(5)"},
	}
}

func parse(args []string, stdout io.Writer) (daemon.Options, slog.Level, error) {
	c, s := commandLine()
	flags, opts := c.Flags, &s.Options
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		c.WriteHelp(stdout, "")
		return s.Options, s.level, err
	case err != nil:
		return s.Options, s.level, err
	case s.showVersion:
		fmt.Fprintf(stdout, "nix-dispatchd %s\n", version)
		return s.Options, s.level, flag.ErrHelp
	case flags.NArg() > 0:
		return s.Options, s.level, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case opts.MachineWait <= 0:
		return s.Options, s.level, fmt.Errorf("--machine-wait must be positive")
	case opts.DrainTimeout < 0:
		return s.Options, s.level, fmt.Errorf("--drain-timeout must not be negative")
	}
	if err := checkGates(s.Options); err != nil {
		return s.Options, s.level, err
	}
	given := make(map[string]bool)
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	home, homeErr := os.UserHomeDir()
	if !given["builders"] {
		opts.NixConf = &nix.ConfSource{Getenv: os.Getenv, Home: cmp.Or(home, "/root")}
	}
	if opts.PerUser {
		err = forUser(opts, given, home, homeErr)
	}
	return s.Options, s.level, err
}

// forUser puts the defaults of a user's own daemon in place of what was not given.
func forUser(opts *daemon.Options, given map[string]bool, home string, homeErr error) error {
	if !given["metrics-listen"] {
		opts.MetricsListen = ""
	}
	if !given["socket"] {
		if opts.Socket = daemonsocket.User(); opts.Socket == "" {
			return errors.New("--user needs the directory that XDG_RUNTIME_DIR names, which must be this user's, or --socket")
		}
	}
	if given["state-dir"] {
		return nil
	}
	state := os.Getenv("XDG_STATE_HOME")
	if state == "" {
		if homeErr != nil {
			return fmt.Errorf("--user needs a home directory, or --state-dir: %w", homeErr)
		}
		state = filepath.Join(home, ".local/state")
	}
	opts.StateDir = filepath.Join(state, "nix-dispatch")
	return nil
}

// newLogger writes to stderr. Under journald, which stamps each line itself, the
// time is left out and the priority put in front, as sd-daemon(3) describes.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	opts := &slog.HandlerOptions{Level: level}
	if os.Getenv("JOURNAL_STREAM") != "" {
		w = journalWriter{w}
		opts.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// A journalWriter puts journald's priorities before lines that begin with their
// levels, each of which is one Write.
type journalWriter struct{ w io.Writer }

func (j journalWriter) Write(line []byte) (int, error) {
	priority := "<6>" // info
	for level, p := range map[string]string{"DEBUG": "<7>", "WARN": "<4>", "ERROR": "<3>"} {
		if bytes.HasPrefix(line, []byte("level="+level)) {
			priority = p
		}
	}
	if _, err := j.w.Write(append([]byte(priority), line...)); err != nil {
		return 0, err
	}
	return len(line), nil
}
