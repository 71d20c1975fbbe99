package daemonsocket

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestUsersOwnDaemonComesBeforeTheSystems(t *testing.T) {
	t.Setenv(Env, "")
	dir, err := os.MkdirTemp("", "run") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("XDG_RUNTIME_DIR", dir)
	if got := Path(); got != Default {
		t.Errorf("without a daemon of the user's: %q, want %q", got, Default)
	}
	own := User()
	if err := os.MkdirAll(filepath.Dir(own), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", own)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got := Path(); got != own || own != dir+"/nix-dispatch/socket" {
		t.Errorf("with one: %q, want %q", got, own)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(own, 12345, -1); err != nil {
			t.Fatal(err)
		}
		if got := Path(); got != Default {
			t.Errorf("with a socket of another user's: %q, want %q", got, Default)
		}
	}
	t.Setenv(Env, "/elsewhere")
	if got := Path(); got != "/elsewhere" {
		t.Errorf("with %s: %q", Env, got)
	}
}

func TestNobodysRuntimeDirectoryIsNotUsed(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/nonexistent")
	if got := User(); got != "" {
		t.Errorf("User() = %q, want none", got)
	}
}
