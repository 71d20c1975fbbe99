package buildhook

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"nixdispatch/proto/nix/hook"
)

const (
	stockHookEnv = "NIX_DISPATCH_STOCK_HOOK"
	// libexecHook is the stock hook beside a Nix's bin directory; it is there for
	// 2.8, which has no other way, and for most later ones.
	libexecHook  = "../libexec/nix/build-remote"
	debianHook   = "/usr/libexec/nix/build-remote"
	nixSubHook   = "__build-remote"
	stockHookEnd = hookFailed
)

// findStockHook finds the build hook of the Nix that runs this process.
func findStockHook() (string, error) {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", os.Getppid()))
	if err != nil {
		exe = "" // then PATH tells
	}
	return FindStock(os.Getenv, exe)
}

// FindStock finds Nix's own build hook as a hook does that runs in an environment
// and was started by a program: named by the environment, else that of the program
// if it is Nix, else that of the Nix in PATH, else that of the system.
func FindStock(getenv func(string) string, startedBy string) (string, error) {
	if path := getenv(stockHookEnv); path != "" {
		if !executable(path) {
			return "", fmt.Errorf("%s names %q, which cannot be run", stockHookEnv, path)
		}
		return path, nil
	}
	programs := nixPrograms(getenv("PATH"), startedBy)
	var candidates []string
	for _, program := range programs {
		candidates = append(candidates, filepath.Join(filepath.Dir(program), libexecHook))
	}
	candidates = append(candidates, debianHook)
	for _, program := range programs {
		if filepath.Base(program) == "nix" {
			candidates = append(candidates, program+" "+nixSubHook)
		}
	}
	for _, candidate := range candidates {
		program, _, _ := strings.Cut(candidate, " ")
		if executable(program) {
			return candidate, nil
		}
	}
	return "", fmt.Errorf("it was not found (looked for %s); set %s", strings.Join(candidates, ", "), stockHookEnv)
}

// nixPrograms are the Nix that started a hook and the one in its PATH, links
// resolved.
func nixPrograms(path, startedBy string) []string {
	var programs []string
	if strings.HasPrefix(filepath.Base(startedBy), "nix") {
		programs = append(programs, startedBy)
	}
	for _, dir := range filepath.SplitList(path) {
		program := filepath.Join(dir, "nix")
		if !filepath.IsAbs(program) || !executable(program) {
			continue
		}
		if program, err := filepath.EvalSymlinks(program); err == nil {
			programs = append(programs, program)
		}
		break
	}
	return programs
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0
}

// takeStock passes the conversation to the stock hook, from the question under
// way to the end, and returns its exit status. The child stays in our process
// group, which is what Nix kills.
func (h *hookProcess) takeStock(stock string) int {
	h.link.reset()
	h.log.Flush()
	program, sub, _ := strings.Cut(stock, " ")
	cmd := exec.Command(program)
	if sub != "" {
		cmd.Args = append(cmd.Args, sub)
	}
	cmd.Args = append(cmd.Args, h.verbosity)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{nil, h.buildLog, h.logRead} // 3 stays closed
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err := cmd.StdinPipe()
	if err == nil {
		// Pdeathsig is of the thread, not the process.
		runtime.LockOSThread()
		err = cmd.Start()
	}
	if err != nil {
		h.warn(fmt.Sprintf("nix-dispatch: Nix's own build hook cannot be started: %v", err))
		h.log.Decline()
		return stockHookEnd
	}
	// The log's write end stays open: at its end Nix kills us all, and our exit
	// status is to be the child's by then.
	h.logRead.Close() // nil is fine
	go pump(stdin, h.in)
	return stockStatus(cmd.Wait())
}

// pump gives the stock hook what we were given and will be given. It ends with
// the process: a read of standard input cannot be interrupted.
func pump(stdin io.WriteCloser, in *hook.Reader) {
	defer stdin.Close()
	if _, err := stdin.Write(in.Replay()); err != nil {
		return
	}
	io.Copy(stdin, in.Rest()) //nolint:errcheck // the child's exit tells
}

func stockStatus(err error) int {
	exit, ok := errors.AsType[*exec.ExitError](err)
	switch {
	case err == nil:
		return 0
	case ok && exit.Exited():
		return exit.ExitCode()
	default:
		return stockHookEnd
	}
}
