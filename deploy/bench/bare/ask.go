package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"nixdispatch/proto/nix/wire"
)

// ask starts a hook n times, one after the other, as Nix does for the derivation
// given, and prints the milliseconds from each start to the reply. It gives the
// build up then. Every reply must be "accept".
func ask(args []string) error {
	if len(args) != 3 {
		return errors.New("usage: bare ask HOOK DRV N")
	}
	n, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	for range n {
		took, err := askOnce(args[0], args[1])
		if err != nil {
			return err
		}
		fmt.Printf("%.3f\n", float64(took.Microseconds())/1000)
	}
	return nil
}

func askOnce(hook, drvPath string) (time.Duration, error) {
	var r, w [3]*os.File // standard input and error, log
	for n := range r {
		var err error
		if r[n], w[n], err = os.Pipe(); err != nil {
			return 0, err
		}
		defer r[n].Close()
		defer w[n].Close()
	}
	cmd := exec.Command(hook, "3")
	cmd.Stdin, cmd.Stderr, cmd.ExtraFiles = r[0], w[1], []*os.File{nil, w[2], r[2]}
	started := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer cmd.Wait() //nolint:errcheck // it was broken off
	defer cmd.Process.Kill()
	if err := question(w[0], drvPath); err != nil {
		return 0, err
	}
	_ = w[1].Close() // ours, so that its end shows
	lines := bufio.NewScanner(r[1])
	for lines.Scan() {
		if reply, ok := strings.CutPrefix(lines.Text(), "# "); ok {
			took := time.Since(started)
			if reply != "accept" {
				return 0, fmt.Errorf("the hook replied %q", reply)
			}
			return took, nil
		}
	}
	return 0, errors.New("the hook did not reply")
}

// settingsBesides is how many further settings are sent: as many as Nix has.
const settingsBesides = 180

// question writes what Nix tells a hook, and its first question.
func question(stdin *os.File, drvPath string) error {
	w := wire.NewWriter(stdin)
	setting := func(name, value string) {
		w.Bool(true)
		w.String(name)
		w.String(value)
	}
	setting("builders", "@/etc/nix/machines")
	setting("max-jobs", "0")
	setting("store", "auto")
	setting("system", "x86_64-linux")
	setting("system-features", "benchmark big-parallel nixos-test uid-range")
	for n := range settingsBesides {
		setting(fmt.Sprintf("another-setting-%d", n), "and its value, of a usual length")
	}
	w.Bool(false)
	w.String("try")
	w.Bool(false) // Nix has no slot of its own
	w.String("x86_64-linux")
	w.String(drvPath)
	w.Strings(nil)
	return w.Flush()
}
