// Package buildhook is the process that Nix's build-hook setting starts: it asks
// nix-dispatchd about each derivation, and stays for the build that it got.
//
// One is started for every build while Nix's whole client waits, so it is small:
// one goroutine that reads, asks and writes in turn, each a plain system call.
package buildhook

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nixdispatch/cmd/internal/daemonsocket"
	"nixdispatch/proto/hookcall"
	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/hook"
)

// The descriptors Nix gives a hook besides 0 and 2 (src/libstore/unix/build/hook-instance.cc).
const (
	logWriteFD = 4 // write end of the build log's pipe
	logReadFD  = 5 // its read end, meant for the stock hook's ssh errors
)

// About tells what the program is for, as its --help and its manual page do.
const About = `Nix runs this for its build-hook setting; it is of no use by hand. With Nix 2.13
and later:

  build-hook = /path/to/nix-dispatch hook

Nix 2.8 takes a program without arguments: /path/to/nix-dispatch-hook. --socket PATH
before Nix's own argument names another daemon.

Environment: NIX_DISPATCH_STOCK_HOOK names the hook that builds what the daemon cannot,
by default the build-remote of the Nix that runs this.
`

const usage = "Usage: nix-dispatch hook [--socket PATH] VERBOSITY\n\n" + About

// hookOptions are what tests change.
type hookOptions struct {
	socket string
	// answerTimeout bounds connecting to the daemon and its answer, for Nix's
	// whole client waits meanwhile.
	answerTimeout time.Duration
	// patience is how long builds that only machines can do are postponed while
	// the daemon is out of reach, before the stock hook gets them.
	patience time.Duration
	// askAgain and askAgainTimeout bound what a daemon that did not answer once
	// costs a Nix that asks for many builds.
	askAgain        time.Duration
	askAgainTimeout time.Duration
}

func newHookOptions() hookOptions {
	return hookOptions{
		socket: daemonsocket.Path(), answerTimeout: time.Second, patience: 30 * time.Second,
		askAgain: 3 * time.Second, askAgainTimeout: 250 * time.Millisecond,
	}
}

// What a hook exits with when it is not Nix that started it.
const (
	exitOK    = 0
	exitUsage = 2
)

// Main runs a hook process with the arguments after the program's name, the last
// of which is Nix's verbosity, and returns its exit status.
func Main(args []string) int {
	opts := newHookOptions()
	for i, arg := range args {
		switch {
		case arg == "--help" || arg == "-h":
			os.Stdout.WriteString(usage)
			return exitOK
		case (arg == "--socket" || arg == "-socket") && i+1 < len(args):
			opts.socket = args[i+1]
		case strings.HasPrefix(arg, "--socket="):
			opts.socket = strings.TrimPrefix(arg, "--socket=")
		}
	}
	verbosity := "0"
	if len(args) > 0 {
		verbosity = args[len(args)-1]
	}
	return run(verbosity, opts)
}

func run(verbosity string, opts hookOptions) int {
	// A child that inherited them would keep Nix waiting for the end of the log.
	if _, err := unix.FcntlInt(logWriteFD, unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
		fmt.Fprintf(os.Stderr, "nix-dispatch hook: descriptor %d: %v: this is for Nix to run\n%s", logWriteFD, err, usage)
		return exitUsage
	}
	_, logReadErr := unix.FcntlInt(logReadFD, unix.F_SETFD, unix.FD_CLOEXEC)
	h := &hookProcess{
		opts:      opts,
		verbosity: verbosity,
		in:        hook.NewReader(os.Stdin),
		log:       hook.NewLog(os.Stderr),
		buildLog:  os.NewFile(logWriteFD, "build log"),
		link:      daemonLink{socket: opts.socket},
		memory:    newOutageMemory(),
	}
	h.outage = h.memory.recall()
	if logReadErr == nil {
		h.logRead = os.NewFile(logReadFD, "build log, read end")
	}
	defer h.link.reset()
	return h.run()
}

// A hookProcess is one conversation with one Nix.
type hookProcess struct {
	opts      hookOptions
	verbosity string
	in        *hook.Reader
	log       *hook.Log
	buildLog  *os.File
	logRead   *os.File // nil if Nix gave none
	settings  *hook.Settings
	link      daemonLink
	outage    outage
	memory    outageMemory
	// restartTold is set once the user knows of the daemon's restart.
	restartTold bool
	broken      bool // by a panic; nothing is tried any more
}

// run answers Nix's questions until one is accepted and built, or Nix has no
// more. Whatever happens, each question gets exactly one answer.
func (h *hookProcess) run() int {
	defer h.log.Flush()
	settings, settingsErr := h.in.Settings()
	if errors.Is(settingsErr, io.EOF) {
		return 0
	}
	h.settings = settings
	if settingsErr == nil {
		h.link.hello = helloOf(settings)
	}
	for {
		try, err := h.in.Try()
		if err == io.EOF {
			return 0
		}
		if err = errors.Join(settingsErr, err); err != nil {
			h.warn(fmt.Sprintf("nix-dispatch hook: %v", err))
			h.log.Decline()
			return 1
		}
		d := h.decide(try)
		h.explain(d)
		switch d.action {
		case hookcall.Accept:
			return h.build(try, d)
		case hookcall.Stock:
			return h.takeStock(d.stock)
		case hookcall.Postpone:
			h.log.Postpone()
		case hookcall.DeclinePermanently:
			h.log.DeclinePermanently()
		default:
			h.log.Decline()
		}
	}
}

// A decision is the answer to one question.
type decision struct {
	action hookcall.Action
	// machine is what Nix shall call the machine, of an accepting one.
	machine string
	reason  string
	warn    bool
	stock   string       // the hook to pass to
	locks   *outputLocks // of an accepting one
}

// decide asks the daemon, or does without it. It never panics.
func (h *hookProcess) decide(try *hook.Try) (d decision) {
	defer func() {
		if p := recover(); p != nil {
			h.broken = true
			h.link.reset()
			d = decision{
				action: hookcall.Decline, warn: true,
				reason: fmt.Sprintf("nix-dispatch hook: a bug, please report it: %v\n%s", p, debug.Stack()),
			}
		}
	}()
	if h.broken {
		return decision{action: hookcall.Decline}
	}
	if strings.TrimSpace(h.settings.Builders) == "" {
		return decision{action: hookcall.DeclinePermanently}
	}
	d = h.consult(try)
	if d.action == hookcall.Accept {
		d = h.prepare(try, d)
	}
	if d.action == hookcall.Stock {
		d = h.orWithoutStock(try, d)
	}
	return d
}

// prepare takes hold of the output locks, which the asking Nix has now.
func (h *hookProcess) prepare(try *hook.Try, d decision) decision {
	where, err := nix.FindLocalStore(h.settings.Store, nix.ThisStoreHost(os.Getenv))
	var locks *outputLocks
	if err == nil {
		locks, err = openOutputLocks(where, try.DrvPath)
	}
	if err != nil {
		h.link.reset() // gives the build up
		return decision{
			action: hookcall.Stock, warn: true,
			reason: fmt.Sprintf("nix-dispatch cannot build '%s': %v", try.DrvPath, err),
		}
	}
	d.locks = locks
	return d
}

// orWithoutStock finds the stock hook for d, or does without.
func (h *hookProcess) orWithoutStock(try *hook.Try, d decision) decision {
	h.link.reset()
	stock, err := findStockHook()
	if err == nil {
		d.stock = stock
		return d
	}
	reason := d.reason
	d = decision{action: hookcall.Postpone, warn: true}
	if h.settings.CouldBuildLocally(try) || h.outage.began.IsZero() {
		// The daemon will not change its mind: asking again would never end.
		d.action = hookcall.Decline
	}
	d.reason = fmt.Sprintf("%s; and Nix's own build hook cannot take it: %v", reason, err)
	return d
}

// explain tells the user why, where that is worth telling.
func (h *hookProcess) explain(d decision) {
	switch {
	case d.reason == "":
	case d.warn:
		h.warn(d.reason)
	default:
		h.log.Msg(hook.Chatty, nix.PlainText(d.reason))
	}
}

func (h *hookProcess) warn(text string) { h.log.Msg(hook.Warn, "warning: "+nix.PlainText(text)) }
