package sshpool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

func localConfig() Config {
	return Config{Name: "ssh://localhost", Host: "localhost", Local: true}
}

func TestLocalSessions(t *testing.T) {
	cfg := localConfig()
	cfg.ProbeCommand = "echo hello"
	cfg.Probe = func(_ context.Context, s *Session) error {
		out, err := io.ReadAll(s.Stdout)
		if string(out) != "hello\n" {
			err = fmt.Errorf("%q, %v", out, err)
		}
		return err
	}
	to := &target{cfg: cfg, connections: func() int { return 1 }}
	t.Run("streams and exit status", func(t *testing.T) { testStreams(t, to) })
	t.Run("bulk both ways", func(t *testing.T) { testBulk(t, to) })
	t.Run("closed under a running command", func(t *testing.T) { testCloseSession(t, to) })
	t.Run("closed with everything in flight", func(t *testing.T) { testCloseInFlight(t, to) })
	t.Run("16 sessions", func(t *testing.T) {
		h := upHost(t, to.opts, cfg)
		for range 16 {
			mustSession(t, h, "cat")
		}
		if st := h.Status(); st.Connections != 1 || st.Sessions != 16 {
			t.Errorf("with 16 sessions: %+v", st)
		}
	})
}

func TestLocalProbeDecides(t *testing.T) {
	cfg := localConfig()
	cfg.ProbeCommand = "exit 127"
	cfg.Probe = func(_ context.Context, s *Session) error { return s.Wait() }
	p := New(Options{})
	defer p.Close()
	h := p.Add(cfg)
	st := awaitStatus(t, h, "down", func(st Status) bool { return st.State == Down })
	if e := mustBe[*ConnectError](t, "LastError", st.LastError); e.Step != StepProbe {
		t.Errorf("LastError: %v", e)
	}
	if e := mustBe[*ExitError](t, "LastError", st.LastError); e.Status != 127 {
		t.Errorf("LastError: %v", e)
	}
}

// A command is ended with all it has started, even if it does not want to.
func TestLocalCommandsAreEndedWithTheirChildren(t *testing.T) {
	for _, command := range []string{
		"sleep 1000 & echo $$ $!; wait",
		"trap '' TERM; sleep 1000 & echo $$ $!; wait",
	} {
		t.Run(command, func(t *testing.T) {
			t.Parallel()
			h := upHost(t, Options{}, localConfig())
			s := mustSession(t, h, command)
			var shell, child int
			if _, err := fmt.Fscan(s.Stdout, &shell, &child); err != nil {
				t.Fatal(err)
			}
			s.Close()
			if err := s.Wait(); !errors.Is(err, ErrClosed) {
				t.Errorf("Wait: %v", err)
			}
			h.Close()
			for _, pid := range []int{shell, child} {
				gone := false
				for range 12000 { // two minutes
					if gone = syscall.Kill(pid, 0) != nil || isZombie(pid); gone {
						break
					}
					time.Sleep(10 * time.Millisecond)
				}
				if !gone {
					t.Errorf("process %d is still there", pid)
				}
			}
		})
	}
}

func TestLocalWriteToCommandThatIsGone(t *testing.T) {
	h := upHost(t, Options{}, localConfig())
	s := mustSession(t, h, "true")
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := io.WriteString(s.Stdin, strings.Repeat("x", 1<<20)); err == nil {
		t.Error("writing to a command that is gone succeeded")
	}
}

// isZombie reports whether a process has ended and only its parent has not noticed:
// in a container, the init that inherits it may never do.
func isZombie(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "Z")
}
