package daemon

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"testing"
)

func TestOnlyAUsersDaemonServesOtherStores(t *testing.T) {
	log := slog.New(slog.NewTextHandler(io.Discard, nil))
	system, err := newStores(Options{Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	own := []string{"daemon", "local", "unix://" + system.own.Socket}
	if os.Geteuid() == 0 { // for others it depends on what is installed
		own = append(own, "", "auto")
	}
	for _, uri := range own {
		if got, err := system.find(uri, []string{"XDG_DATA_HOME=/d", "SECRET=x"}); err != nil || got != system.own {
			t.Errorf("find(%q) = %v, %v, want the daemon's own", uri, got, err)
		}
	}
	for _, uri := range []string{"/home/alice/my-nix", "local?root=/r", "unix:///elsewhere", "https://cache.example.org", "\x00"} {
		if got, err := system.find(uri, nil); !errors.Is(err, errForeignStore) {
			t.Errorf("find(%q) = %v, %v, want errForeignStore", uri, got, err)
		}
	}
	if got, err := system.find("local", []string{"NIX_STATE_DIR=/elsewhere"}); !errors.Is(err, errForeignStore) {
		t.Errorf("with another state directory = %v, %v", got, err)
	}

	users, err := newStores(Options{Logger: log, PerUser: true, Socket: "/run/user/1/socket"})
	if err != nil {
		t.Fatal(err)
	}
	mine, err := users.find("/home/alice/my-nix", []string{"NIX_CONF_DIR=/c", "PATH=/evil", "NIX_LOG_DIR=a\x00b"})
	if err != nil || mine.RealDir != "/home/alice/my-nix/nix/store" || mine.key == users.own.key {
		t.Fatalf("the user's store: %v, %v", mine, err)
	}
	if want := []string{"--stdio", "--store", "/home/alice/my-nix"}; !slices.Equal(mine.daemonArgs, want) {
		t.Errorf("nix-daemon's arguments are %q, want %q", mine.daemonArgs, want)
	}
	for variable, want := range map[string]bool{
		"NIX_CONF_DIR=/c": true, "NIX_DISPATCH_SOCKET=/run/user/1/socket": true, "PATH=/evil": false, "NIX_LOG_DIR=a\x00b": false,
	} {
		if slices.Contains(mine.env, variable) != want {
			t.Errorf("%q in nix-daemon's environment: %v, want %v", variable, !want, want)
		}
	}
	if again, _ := users.find("/home/alice/my-nix", []string{"NIX_CONF_DIR=/c"}); again != mine {
		t.Error("the same store is another at the second time")
	}
	if got, err := users.find("https://cache.example.org", nil); !errors.Is(err, errForeignStore) {
		t.Errorf("a binary cache = %v, %v", got, err)
	}
	for n := range 2 * maxStores {
		if _, err := users.find("/r"+strconv.Itoa(n), nil); err != nil {
			t.Fatal(err)
		}
	}
	if len(users.named) > maxStores {
		t.Errorf("%d stores are kept, want at most %d", len(users.named), maxStores)
	}
}
