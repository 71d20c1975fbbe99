package nix

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFindLocalStore(t *testing.T) {
	usual := LocalStore{Dir: "/nix/store", RealDir: "/nix/store", StateDir: "/nix/var/nix"}
	socket := usual
	socket.Socket = "/nix/var/nix/daemon-socket/socket"
	below := func(root string) LocalStore {
		return LocalStore{Dir: "/nix/store", RealDir: root + "/nix/store", StateDir: root + "/nix/var/nix"}
	}
	nothing := []string{}
	for _, tt := range []struct {
		name, uri        string
		env              map[string]string
		exists, writable []string
		want             LocalStore
	}{
		{"single user", "auto", nil, nothing, []string{"/nix/var/nix"}, usual},
		{"single user, nothing said", "", nil, nothing, []string{"/nix/var/nix"}, usual},
		{"behind a daemon", "auto", nil, []string{"/nix/var/nix", socket.Socket}, nothing, socket},
		{"a daemon of another name", "auto", map[string]string{"NIX_DAEMON_SOCKET_PATH": "/run/n"}, []string{"/run/n"}, nothing,
			LocalStore{Dir: "/nix/store", RealDir: "/nix/store", StateDir: "/nix/var/nix", Socket: "/run/n"}},
		{"no Nix at all", "auto", nil, nothing, nothing, below("/home/alice/.local/share/nix/root")},
		{"no Nix at all, data elsewhere", "auto", map[string]string{"XDG_DATA_HOME": "/d"}, nothing, nothing, below("/d/nix/root")},
		{"no Nix, but places are named", "auto", map[string]string{"NIX_STATE_DIR": "/s/"}, nothing, nothing,
			LocalStore{Dir: "/nix/store", RealDir: "/nix/store", StateDir: "/s"}},
		{"places of the environment", "local", map[string]string{"NIX_STORE_DIR": "/a/store", "NIX_STATE_DIR": "/a/var"}, nothing, nothing,
			LocalStore{Dir: "/a/store", RealDir: "/a/store", StateDir: "/a/var"}},
		{"a directory", "/home/alice/my-nix", nil, nothing, nothing, below("/home/alice/my-nix")},
		{"a directory, environment set", "/home/alice/my-nix/", map[string]string{"NIX_STATE_DIR": "/a/var"}, nothing, nothing, below("/home/alice/my-nix")},
		{"as Nix prints it", "local:///home/alice/my-nix", nil, nothing, nothing, below("/home/alice/my-nix")},
		{"a root", "local?root=/r", nil, nothing, nothing, below("/r")},
		{"all said", "local?real=/real&state=/state&store=/logical", nil, nothing, nothing,
			LocalStore{Dir: "/logical", RealDir: "/real", StateDir: "/state"}},
		{"daemon", "daemon", nil, nothing, nothing, socket},
		{"daemon by its socket", "unix:///s", nil, nothing, nothing,
			LocalStore{Dir: "/nix/store", RealDir: "/nix/store", StateDir: "/nix/var/nix", Socket: "/s"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			among := func(names []string) func(string) bool {
				return func(name string) bool {
					for _, n := range names {
						if n == name {
							return true
						}
					}
					return false
				}
			}
			got, err := FindLocalStore(tt.uri, StoreHost{
				Getenv: func(name string) string { return tt.env[name] },
				Exists: among(tt.exists), Writable: among(tt.writable), Home: "/home/alice",
			})
			if diff := cmp.Diff(tt.want, got); err != nil || diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
		})
	}
	for _, uri := range []string{"https://cache.example.org", "ssh://mac", "file:///cache", "s3://b", "dummy://", "local-overlay:///x"} {
		if _, err := FindLocalStore(uri, ThisStoreHost(func(string) string { return "" })); !errors.Is(err, ErrNotLocal) {
			t.Errorf("FindLocalStore(%q) = %v, want ErrNotLocal", uri, err)
		}
	}
}

func TestSameStore(t *testing.T) {
	opened := LocalStore{Dir: "/nix/store", RealDir: "/nix/store", StateDir: "/nix/var/nix"}
	served, elsewhere, below := opened, opened, opened
	served.Socket, elsewhere.Socket, below.RealDir = "/a", "/b", "/r/nix/store"
	for _, tt := range []struct {
		a, b LocalStore
		want bool
	}{{opened, opened, true}, {opened, served, true}, {served, opened, true}, {served, elsewhere, false}, {opened, below, false}} {
		if got := tt.a.Same(tt.b); got != tt.want {
			t.Errorf("%v.Same(%v) = %v", tt.a, tt.b, got)
		}
	}
	if got := below.Real("/nix/store/s66mzxpvicwk07gjbjfw9izjfa797vsw-hello"); got != "/r/nix/store/s66mzxpvicwk07gjbjfw9izjfa797vsw-hello" {
		t.Errorf("Real = %q", got)
	}
}
