package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"nixdispatch/proto/nix"
)

// This file finds out whether Nix asks nix-dispatch. There are two who ask: the
// running nix-daemon, for everybody, and root's own nix build, which opens the
// store without it.

// hookSubject and rootSubject are what the findings are about.
const (
	hookSubject = "build-hook"
	rootSubject = "root's own builds"
)

// A confSetting is the value of a setting of Nix and where it stands.
type confSetting struct {
	value, where string
	found        bool // it is set at all
}

// lookAtHook tells whether Nix of this version runs nix-dispatch.
func (h *host) lookAtHook(d *nixDaemon, v rules, tell func(finding)) {
	set, err := h.daemonSetting(hookSubject, d, v.ignoresFile)
	if err != nil {
		tell(problem(hookSubject, "correct that line: Nix rejects it, too", "%v", err))
		return
	}
	f := h.judge(set, v, d.env)
	tell(f)
	if f.Level != levelNext { // else root's builds wait for the same step
		h.lookAtRoot(v, tell)
	}
}

// rules are what a version of Nix makes of build-hook.
type rules struct {
	version string
	// ignoresFile: it does not heed the system's nix.conf, as 2.25 to 2.33 (measured
	// with 2.26.3).
	ignoresFile bool
	// onePath: it takes a path and no arguments, until 2.16 (src/libstore/globals.hh).
	onePath bool
}

func hookRules(version string) rules {
	var major, minor int
	_, _ = fmt.Sscanf(version, "%d.%d", &major, &minor) // zeros will do
	return rules{version, major == 2 && 25 <= minor && minor <= 33, major == 2 && minor < 17}
}

// howTo says how nix-dispatch is switched on.
const howTo = "run 'nix-dispatch enable' as root"

// hookBeside is the hook's program beside this one.
func hookBeside() string {
	if self, err := os.Executable(); err == nil {
		if beside := filepath.Join(filepath.Dir(self), "nix-dispatch-hook"); runnable(beside) {
			return beside
		}
	}
	return "/usr/local/bin/nix-dispatch-hook"
}

func runnable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0
}

// judge is about what nix-daemon runs for builds.
func (h *host) judge(set confSetting, v rules, env map[string]string) finding {
	program, ours, arguments := hookProgram(set.value)
	inFile, _ := h.fileSetting(hookSubject, env)
	_, fileIsOurs, _ := hookProgram(inFile.value)
	switch {
	case !ours && v.ignoresFile && fileIsOurs:
		return problem(hookSubject, howTo, "%s sets it, and Nix %s ignores it there", inFile.where, v.version)
	case !set.found:
		return next(hookSubject, howTo, "Nix does not use nix-dispatch yet")
	case !ours:
		return problem(hookSubject, "take it out there, and "+howTo, "%s sets it to %q, which is not nix-dispatch", set.where, set.value)
	case v.onePath && arguments:
		return problem(hookSubject, howTo, "%s sets it to %q, but Nix %s takes a path without arguments", set.where, set.value, v.version)
	case !runnable(program):
		return problem(hookSubject, howTo, "%s names %q, which cannot be run", set.where, program)
	default:
		return fine(hookSubject, "nix-daemon runs %s (set by %s)", set.value, set.where)
	}
}

// lookAtFilesAlone is for who may not see what nix-daemon was started with.
func (h *host) lookAtFilesAlone(v rules, reason error, tell func(finding)) {
	set, err := h.fileSetting(hookSubject, map[string]string{"NIX_CONF_DIR": h.getenv("NIX_CONF_DIR")})
	_, ours, _ := hookProgram(set.value)
	if err == nil && ours && !v.ignoresFile {
		tell(h.judge(set, v, nil))
		return
	}
	why := "nix-daemon's environment cannot be seen"
	if errors.Is(reason, errNoNixDaemon) {
		why = reason.Error()
	}
	tell(warning(hookSubject, "run this as root", "not known whether Nix runs nix-dispatch: %s", why))
}

const commandLine = "nix-daemon's command line"

// daemonSetting is the value that counts for a nix-daemon: on its command line, in
// its environment, in root's configuration files, in the system's unless it heeds
// that not.
func (h *host) daemonSetting(name string, d *nixDaemon, ignoresFile bool) (confSetting, error) {
	set := confSetting{}
	for i, arg := range d.args {
		rest := d.args[i+1:]
		switch {
		case arg == "--option" && len(rest) > 1 && rest[0] == name:
			set = confSetting{rest[1], commandLine, true}
		case arg == "--"+name && len(rest) > 0:
			set = confSetting{rest[0], commandLine, true}
		}
	}
	if set.found {
		return set, nil
	}
	return h.confSetting(name, d.env, "nix-daemon's", h.rootHome, ignoresFile)
}

// confSetting is the value that counts for a Nix with an environment, which is
// whose: what stands there, then the files in a home directory, then the system's.
func (h *host) confSetting(name string, env map[string]string, whose, home string, ignoresFile bool) (confSetting, error) {
	set, err := h.environmentSetting(name, env, whose)
	if err == nil && !set.found {
		set, err = h.userSetting(name, env, home)
	}
	if err == nil && !set.found && !ignoresFile {
		set, err = h.fileSetting(name, env)
	}
	return set, err
}

// lookAtRoot is about builds that root begins, which do not pass nix-daemon.
func (h *host) lookAtRoot(v rules, tell func(finding)) {
	env := map[string]string{}
	if h.uid == 0 {
		env = h.confEnvironment()
	}
	set, err := h.confSetting(hookSubject, env, "your", h.rootHome, v.ignoresFile)
	_, ours, _ := hookProgram(set.value)
	switch {
	case err != nil:
		tell(problem(rootSubject, "correct that line: Nix rejects it, too", "%v", err))
	case ours:
		tell(fine(rootSubject, "they run %s (set by %s)", set.value, set.where))
	case h.uid != 0:
		tell(warning(rootSubject, "run this as root", "not known whether they use nix-dispatch: root's configuration cannot be seen"))
	default:
		tell(warning(rootSubject, howTo,
			"they do not pass nix-daemon, and do not use nix-dispatch"))
	}
}

// confEnvironment are the variables of our own environment that Nix's configuration
// depends on.
func (h *host) confEnvironment() map[string]string {
	env := make(map[string]string)
	for _, name := range []string{"NIX_CONFIG", "NIX_CONF_DIR", "NIX_USER_CONF_FILES", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS"} {
		env[name] = h.getenv(name)
	}
	return env
}

// conf is Nix's configuration with some environment, without the files that skip
// picks.
func (h *host) conf(env map[string]string, home string, skip func(path string) bool) nix.ConfSource {
	return nix.ConfSource{
		Getenv: func(name string) string { return env[name] },
		Home:   home,
		ReadFile: func(path string) ([]byte, error) {
			if skip(path) {
				return nil, fs.ErrNotExist
			}
			return h.readFile(path)
		},
	}
}

func setting(name string, c nix.ConfSource, where string) (confSetting, error) {
	value, found, err := c.Setting(name)
	return confSetting{value, where, found}, err
}

// environmentSetting is the value that NIX_CONFIG gives.
func (h *host) environmentSetting(name string, env map[string]string, whose string) (confSetting, error) {
	all := func(string) bool { return true }
	return setting(name, h.conf(map[string]string{"NIX_CONFIG": env["NIX_CONFIG"]}, "", all), "NIX_CONFIG in "+whose+" environment")
}

// userSetting is the value that a user's configuration files give.
func (h *host) userSetting(name string, env map[string]string, home string) (confSetting, error) {
	system := systemConf(env)
	env = without(env, "NIX_CONFIG")
	return setting(name, h.conf(env, cmp.Or(env["HOME"], home), func(path string) bool { return path == system }), cmp.Or(env["HOME"], home)+"/.config/nix/nix.conf")
}

// fileSetting is the value that the system's configuration file gives.
func (h *host) fileSetting(name string, env map[string]string) (confSetting, error) {
	env = without(env, "NIX_CONFIG")
	env["NIX_USER_CONF_FILES"] = noFile
	return setting(name, h.conf(env, "", func(path string) bool { return path == noFile }), systemConf(env))
}

// noFile is the name of no file.
const noFile = "/dev/null/none"

func systemConf(env map[string]string) string {
	return nix.ConfSource{Getenv: func(name string) string { return env[name] }}.ConfDir() + "/nix.conf"
}

// without is a copy of an environment without a variable.
func without(env map[string]string, name string) map[string]string {
	out := make(map[string]string, len(env))
	for k, v := range env {
		if k != name {
			out[k] = v
		}
	}
	return out
}
