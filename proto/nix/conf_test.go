package nix_test

import (
	"io/fs"
	"strings"
	"testing"

	"nixdispatch/proto/nix"
)

// confOf is a configuration in memory: files, and variables whose names have no
// slash.
func confOf(texts map[string]string) nix.ConfSource {
	return nix.ConfSource{
		Home:   "/root",
		Getenv: func(name string) string { return texts[name] },
		ReadFile: func(path string) ([]byte, error) {
			if texts[path] == "secret" {
				return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrPermission}
			}
			if text, ok := texts[path]; ok {
				return []byte(text), nil
			}
			return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		},
	}
}

func TestConfSetting(t *testing.T) {
	type m = map[string]string
	for _, tt := range []struct {
		name  string
		texts m
		want  string // "-" for not found
		err   string
	}{
		{name: "no files", want: "-"},
		{name: "plain", texts: m{"/etc/nix/nix.conf": "# machines\nbuilders = ssh://mac  x86_64-darwin\t; ssh://b # two\n"}, want: "ssh://mac x86_64-darwin ; ssh://b"},
		{name: "empty", texts: m{"/etc/nix/nix.conf": "builders =\n"}, want: ""},
		{name: "another setting", texts: m{"/etc/nix/nix.conf": "builders-use-substitutes = true\n"}, want: "-"},
		{name: "the last one wins", texts: m{"/etc/nix/nix.conf": "builders = a\nbuilders = b"}, want: "b"},
		{name: "the user's file wins", texts: m{"/etc/nix/nix.conf": "builders = a", "/etc/xdg/nix/nix.conf": "builders = b", "/root/.config/nix/nix.conf": "builders = c"}, want: "c"},
		{name: "the first config directory wins", texts: m{"XDG_CONFIG_DIRS": "/x:/y", "/x/nix/nix.conf": "builders = x", "/y/nix/nix.conf": "builders = y"}, want: "x"},
		{name: "user files by name", texts: m{"NIX_USER_CONF_FILES": "/x:/y", "/x": "builders = x", "/y": "builders = y", "/root/.config/nix/nix.conf": "builders = c"}, want: "x"},
		{name: "the environment wins", texts: m{"NIX_CONFIG": "cores = 1\nbuilders = e", "/root/.config/nix/nix.conf": "builders = c"}, want: "e"},
		{name: "another directory", texts: m{"NIX_CONF_DIR": "/srv/nix/", "/srv/nix/nix.conf": "builders = s", "/etc/nix/nix.conf": "builders = a"}, want: "s"},
		{name: "include", texts: m{"/etc/nix/nix.conf": "builders = a\ninclude more.conf\n!include none.conf", "/etc/nix/more.conf": "builders = m"}, want: "m"},
		{name: "include of what may not be read", texts: m{"/etc/nix/nix.conf": "builders = a\ninclude /x\n!include /x", "/x": "secret"}, want: "a"},
		{name: "a file that may not be read", texts: m{"/etc/nix/nix.conf": "secret", "/root/.config/nix/nix.conf": "builders = c"}, want: "c"},
		{name: "include of nothing", texts: m{"/etc/nix/nix.conf": "\ninclude /x"}, err: "/etc/nix/nix.conf:2: open /x"},
		{name: "cycle", texts: m{"/etc/nix/nix.conf": "include nix.conf"}, err: "one within the other"},
		{name: "no value", texts: m{"/etc/nix/nix.conf": "builders"}, err: `/etc/nix/nix.conf:1: found "builders"`},
		{name: "no equals sign", texts: m{"/etc/nix/nix.conf": "builders a b"}, err: "name = value"},
		{name: "too large", texts: m{"NIX_CONFIG": strings.Repeat("#", nix.MaxConfSize+1)}, err: "bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, found, err := confOf(tt.texts).Setting("builders")
			switch {
			case tt.err != "":
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("Setting = %q, %v; want an error with %q", got, err, tt.err)
				}
			case err != nil || found != (tt.want != "-") || found && got != tt.want:
				t.Errorf("Setting = %q, %v, %v; want %q", got, found, err, tt.want)
			}
		})
	}
}

// FuzzConfSetting checks that the value has no line of its own and comes from a
// line that assigns it.
func FuzzConfSetting(f *testing.F) {
	f.Add("builders = a ; b\n", "")
	f.Add("include x\n!include y", "builders = c")
	f.Add("x = y # builders = z\r\nbuilders\t=\n", "include /etc/nix/nix.conf")
	f.Fuzz(func(t *testing.T, conf, included string) {
		value, found, err := confOf(map[string]string{"/etc/nix/nix.conf": conf, "/etc/nix/x": included}).Setting("builders")
		if err != nil && found {
			t.Errorf("found %q along with %v", value, err)
		}
		if strings.ContainsAny(value, "\n#") || !found && value != "" {
			t.Errorf("value = %q, %v", value, found)
		}
		if found && !strings.Contains(conf+included, "builders") {
			t.Errorf("found %q in %q and %q", value, conf, included)
		}
	})
}
