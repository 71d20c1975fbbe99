package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestHookLines(t *testing.T) {
	const ours = "build-hook = /usr/bin/nix-dispatch-hook # set by 'nix-dispatch enable'\n"
	for _, tt := range []struct{ name, before, with, without string }{
		{"no file", "", ours, ""},
		{"other settings", "max-jobs = 4", "max-jobs = 4\n" + ours, "max-jobs = 4\n"},
		{"set already", "# mine\n" + ours + "max-jobs = 4\n", "# mine\n" + ours + "max-jobs = 4\n", "# mine\nmax-jobs = 4\n"},
		{"set by hand", "build-hook=x\n build-hook  =  /usr/bin/nix-dispatch-hook\n", "build-hook=x\n build-hook  =  /usr/bin/nix-dispatch-hook\n", "build-hook=x\n"},
		{"moved", "a = b\nbuild-hook = /usr/local/bin/nix-dispatch hook\nc = d\n", "a = b\n" + ours + "c = d\n", "a = b\nc = d\n"},
		{"twice", ours + "build-hook = /x/nix-dispatch-hook\n", ours, ""},
		{"a comment", "# build-hook = /other\n", "# build-hook = /other\n" + ours, "# build-hook = /other\n"},
	} {
		with, err := withHook(tt.before, "/usr/bin/nix-dispatch-hook")
		if err != nil || with != tt.with {
			t.Errorf("%s: withHook gives %q, %v, want %q", tt.name, with, err, tt.with)
		}
		if got := withoutHook(tt.before); got != tt.without && got != tt.before {
			t.Errorf("%s: withoutHook gives %q, want %q", tt.name, got, tt.without)
		}
		if got := withoutHook(with); got != tt.without {
			t.Errorf("%s: there and back gives %q, want %q", tt.name, got, tt.without)
		}
		if again, err := withHook(with, "/usr/bin/nix-dispatch-hook"); err != nil || again != with {
			t.Errorf("%s: a second time gives %q, %v", tt.name, again, err)
		}
	}
	const foreign = "a = b\nbuild-hook = /their/hook\n"
	if text, err := withHook(foreign, "/usr/bin/nix-dispatch-hook"); err == nil || !strings.Contains(err.Error(), `line 2 sets build-hook to "/their/hook"`) {
		t.Errorf("another's hook: %q, %v", text, err)
	}
	if got := withoutHook(foreign); got != foreign {
		t.Errorf("another's hook is taken out: %q", got)
	}
}

// A switchScene is a host to switch, in a directory.
type switchScene struct {
	*hookSwitch
	out   bytes.Buffer
	calls []string // of systemctl
}

func newSwitchScene(t *testing.T, f fakeHost) *switchScene {
	t.Helper()
	dir := t.TempDir()
	h := f.host(t)
	h.uid, h.rootHome, h.readFile = h.rootUID, dir, readConfFile
	h.getenv = func(name string) string { return map[string]string{"NIX_CONF_DIR": dir + "/etc"}[name] }
	s := &switchScene{}
	s.hookSwitch = &hookSwitch{ctx: t.Context(), host: h, out: &s.out}
	s.systemctl = func(_ context.Context, args ...string) (string, error) {
		call := strings.Join(args, " ")
		s.calls = append(s.calls, call)
		switch {
		case strings.HasPrefix(call, "show --value"):
			return "loaded", nil
		case strings.HasPrefix(call, "is-"):
			return "no", errors.New("exit status 1")
		case strings.HasPrefix(call, "show -p ActiveState"):
			return "ActiveState=active\nKillMode=process", nil
		}
		return "", nil
	}
	return s
}

func (s *switchScene) conf(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(s.rootConf())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(text)
}

func TestEnableAndDisable(t *testing.T) {
	hook := filepath.Join(t.TempDir(), "nix-dispatch-hook")
	if err := os.WriteFile(hook, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	s := newSwitchScene(t, fakeHost{version: "2.26.3", args: []string{"nix-daemon", "--daemon"}})
	s.hook = hook
	s.dryRun = true
	if err := s.enable(); err != nil || s.conf(t) != "" || len(s.calls) != 4 {
		t.Fatalf("dry run: %v, wrote %q, called %q", err, s.conf(t), s.calls)
	}
	if want := "would: " + s.rootConf() + ": set build-hook = " + hook + "\nwould: nix-dispatchd: enable and start it\nwould: nix-daemon: restart it; its connections go on\n"; s.out.String() != want {
		t.Errorf("a dry run says:\n%swant:\n%s", s.out.String(), want)
	}
	s.dryRun, s.calls = false, nil
	if err := s.enable(); err != nil {
		t.Fatal(err)
	}
	if want := "build-hook = " + hook + setBy + "\n"; s.conf(t) != want {
		t.Errorf("wrote %q, want %q", s.conf(t), want)
	}
	calls := strings.Join(s.calls, "\n")
	if !strings.Contains(calls, "enable --now nix-dispatchd.socket nix-dispatchd.service") || !strings.HasSuffix(calls, "try-restart nix-daemon.service") {
		t.Errorf("called:\n%s", calls)
	}
	s.out.Reset()
	if err := s.disable(0); err != nil || s.conf(t) != "" || !strings.HasSuffix(s.out.String(), "Nix builds without nix-dispatch\n") {
		t.Errorf("disable: %v, left %q, said:\n%s", err, s.conf(t), s.out.String())
	}
	if _, err := os.Stat(s.rootConf()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the empty file stays: %v", err)
	}
	s.out.Reset()
	if err := s.disable(0); err != nil || !strings.Contains(s.out.String(), "no nix.conf sets build-hook") {
		t.Errorf("disable again: %v, said:\n%s", err, s.out.String())
	}
}

func TestSwitchLeavesOthersFilesAlone(t *testing.T) {
	hook := filepath.Join(t.TempDir(), "nix-dispatch-hook")
	if err := os.WriteFile(hook, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	line := "build-hook = " + hook + "\n"
	for _, tt := range []struct {
		name string
		host fakeHost
		// prepare makes files; conf is root's nix.conf, system the system's.
		prepare         func(conf, system string) error
		enable, disable string // the errors' texts; "" for none
	}{
		{"a link", fakeHost{version: "2.34.8"}, func(conf, _ string) error {
			return errors.Join(os.WriteFile(conf+".real", []byte(line), 0o644), os.Symlink(conf+".real", conf))
		}, "services.nix-dispatch", "services.nix-dispatch"},
		{"the system's is a link", fakeHost{version: "2.34.8"}, func(_, system string) error {
			return errors.Join(os.WriteFile(system+".real", []byte(line), 0o644), os.Symlink(system+".real", system))
		}, "", "services.nix-dispatch"},
		{"the system's, by hand", fakeHost{version: "2.34.8"}, func(_, system string) error {
			return os.WriteFile(system, []byte(line), 0o644)
		}, "", ""},
		{"another hook", fakeHost{version: "2.34.8"}, func(conf, _ string) error {
			return os.WriteFile(conf, []byte("build-hook = /their\n"), 0o644)
		}, `sets build-hook to "/their"`, ""},
		{"another hook in the environment", fakeHost{version: "2.34.8", args: []string{"nix-daemon"}, env: []string{"NIX_CONFIG=build-hook = /their"}}, nil,
			"NIX_CONFIG in nix-daemon's environment sets it to \"/their\"", ""},
		{"ours in the environment", fakeHost{version: "2.34.8", args: []string{"nix-daemon"}, env: []string{"NIX_CONFIG=" + line}}, nil,
			"", "set by NIX_CONFIG in nix-daemon's environment: take it out there"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSwitchScene(t, tt.host)
			s.hook = hook
			conf, system := s.rootConf(), filepath.Join(s.host.rootHome, "etc/nix.conf")
			if err := errors.Join(os.MkdirAll(filepath.Dir(conf), 0o755), os.MkdirAll(filepath.Dir(system), 0o755)); err != nil {
				t.Fatal(err)
			}
			if tt.prepare != nil {
				if err := tt.prepare(conf, system); err != nil {
					t.Fatal(err)
				}
			}
			check := func(what string, err error, want string) {
				t.Helper()
				if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
					t.Errorf("%s: %v, want %q; it said:\n%s", what, err, want, s.out.String())
				}
			}
			check("enable", s.enable(), tt.enable)
			check("disable", s.disable(0), tt.disable)
			if _, err := os.Stat(system); err == nil && tt.disable == "" {
				t.Error("the system's file still sets the hook")
			}
		})
	}
}

func TestSwitchKeepsModeAndRest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nix.conf")
	if err := os.WriteFile(path, []byte("a = b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := readOwnConf(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := file.write("c = d\n"); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, _ := filepath.Glob(filepath.Dir(path) + "/.nix*"); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestSwitchEndsNoBuilds(t *testing.T) {
	s := newSwitchScene(t, fakeHost{version: "2.34.8"})
	s.systemctl = func(_ context.Context, args ...string) (string, error) {
		if args[0] == "try-restart" {
			t.Error("nix-daemon is restarted")
		}
		return "ActiveState=active\nKillMode=control-group", nil
	}
	if err := s.restartNix(); err != nil || !strings.Contains(s.out.String(), "would end all builds") {
		t.Errorf("%v, said:\n%s", err, s.out.String())
	}
}

func TestNixProcessesThatAcceptConnections(t *testing.T) {
	for args, want := range map[string]bool{
		"nix-daemon --daemon": true, "nix-daemon": true, "/usr/bin/nix-daemon --option a b": true,
		"nix-daemon 1234mon": false, "nix-daemon --stdio": false, "nix build": false, "": false,
	} {
		if got := acceptsConnections(strings.Fields(args)); got != want {
			t.Errorf("%q: %v", args, got)
		}
	}
}
