package daemon

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix"
)

// Whatever stands at a path that a caller names, the daemon waits for none of it and
// reads no device: what is not valid is not opened, and what Nix 2.8 calls valid may be
// a link to anything.
func TestCallersNameWhatIsNoFile(t *testing.T) {
	t.Parallel()
	s := newSite(t, oneMachine("ssh"))
	good := s.drv("good", drvConfig{})
	pipe := filepath.Join(s.dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, put := range map[string]func(at string) error{
		"pipe":                 func(at string) error { return unix.Mkfifo(at, 0o600) },
		"link to a pipe":       func(at string) error { return os.Symlink(pipe, at) },
		"link to a device":     func(at string) error { return os.Symlink("/dev/zero", at) },
		"link to a terminal":   func(at string) error { return os.Symlink("/dev/ptmx", at) },
		"link to a derivation": func(at string) error { return os.Symlink(string(good.path), at) },
	} {
		for _, valid := range []bool{false, true} {
			label := strings.ReplaceAll(name, " ", "-")
			want := codes.InvalidArgument
			if !valid {
				want = codes.NotFound
			}
			t.Run(label+map[bool]string{true: " valid"}[valid], func(t *testing.T) {
				p := s.path(label + map[bool]string{true: "-valid"}[valid] + ".drv")
				if err := put(s.store().Real(p)); err != nil {
					t.Fatal(err)
				}
				if valid {
					s.local.store.PutFile(p, "")
				}
				s.refuses(t, p, want)
			})
		}
	}
	s.mustBuild(s.drv("after", drvConfig{}))
}

// refuses asks for a path in every way there is.
func (s *site) refuses(t *testing.T, p nix.StorePath, want codes.Code) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ask := &dispatchv1.BuildRequest{Derivations: []string{string(p)}}
	detached := &dispatchv1.BuildRequest{Derivations: []string{string(p)}, Detach: true}
	for what, call := range map[string]func() error{
		"Explain": func() error {
			_, err := s.client.Explain(ctx, &dispatchv1.ExplainRequest{DrvPath: string(p)})
			return err
		},
		"Build":           func() error { return s.realise(ask).err },
		"Build, detached": func() error { return s.realise(detached).err },
	} {
		if err := call(); status.Code(err) != want {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	// An input derivation of one that is what it seems; root's hook says which inputs
	// there are, but a member's are worked out here.
	above := nix.Derivation{InputDrvs: map[nix.StorePath][]string{p: {"out"}}}
	if _, err := s.d.stores.own.inputClosure(ctx, &above); err == nil || ctx.Err() != nil {
		t.Errorf("as an input: %v", err)
	}
	for name, c := range map[string]caller{"root": {uid: 0}, "a member": member} {
		done := make(chan *dispatchv1.Reply, 1)
		go func() {
			r, _ := s.conversation(c, s.hello()).decide(&dispatchv1.Try{DrvPath: string(p)})
			done <- r
		}()
		select {
		case r := <-done:
			if r.GetAction() != stock {
				t.Errorf("hook of %s: %v, want it left to Nix's own", name, r)
			}
		case <-time.After(patience):
			t.Fatalf("hook of %s: no answer", name)
		}
	}
}
