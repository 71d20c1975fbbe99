package daemon

import (
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	dispatchv1 "nixdispatch/proto/dispatch/v1"
	"nixdispatch/proto/nix/worker"
)

// ping returns the steps to a machine.
func (s *site) ping(req *dispatchv1.PingRequest) ([]*dispatchv1.PingResponse, error) {
	s.t.Helper()
	stream, err := s.client.Ping(s.t.Context(), req)
	if err != nil {
		s.t.Fatal(err)
	}
	var steps []*dispatchv1.PingResponse
	for {
		step, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return steps, nil
		case err != nil:
			return steps, err
		}
		steps = append(steps, step)
	}
}

func (s *site) mustPing(machine string) []*dispatchv1.PingResponse {
	s.t.Helper()
	steps, err := s.ping(&dispatchv1.PingRequest{Machine: machine})
	if err != nil || len(steps) == 0 {
		s.t.Fatalf("Ping = %v, %v", steps, err)
	}
	return steps
}

func names(steps []*dispatchv1.PingResponse) []string {
	var names []string
	for _, s := range steps {
		names = append(names, s.GetStep())
	}
	return names
}

var sshSteps = []string{"ssh config", "connect", "handshake", "host key", "authenticate", "open session"}

func TestPingTellsEachStep(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		s := newSite(t, m)
		steps := s.mustPing("m1")
		if diff := cmp.Diff(append(slices.Clone(sshSteps), "find nix", "protocol", "store", "trust"), names(steps)); diff != "" {
			t.Fatalf("steps (-want +got):\n%s", diff)
		}
		for _, step := range steps {
			if step.GetVerdict() != dispatchv1.PingVerdict_PING_VERDICT_OK || step.GetDetail() == "" || step.GetTook().AsDuration() < 0 {
				t.Errorf("step %v", step)
			}
		}
		want := map[string]string{
			"ssh": "trusted (says its nix-daemon, Nix ", "ssh-ng": "trusted",
		}[scheme]
		if got := steps[9].GetDetail(); !strings.HasPrefix(got, want) {
			t.Errorf("trust: %q, want %q", got, want)
		}
		// What it used is gone, and what builds use was left alone.
		s.eventually("no process is left", func() bool {
			_, running := m.processes()
			return running == 0
		})
		if n := m.ssh.Handshakes(); n != 2 || s.machineStatus(m).GetConnections() != 1 {
			t.Errorf("%d connections made, the daemon has %d; want two and one", n, s.machineStatus(m).GetConnections())
		}
		s.mustBuild(s.drv("a", drvConfig{}))
	})
}

func TestPingTellsOfDistrust(t *testing.T) {
	t.Parallel()
	eachScheme(t, func(t *testing.T, scheme string) {
		m := oneMachine(scheme)
		m.trust = worker.NotTrusted
		s := newSite(t, m)
		steps := s.mustPing(m.uri())
		last := steps[len(steps)-1]
		if last.GetStep() != "trust" || last.GetVerdict() != dispatchv1.PingVerdict_PING_VERDICT_WARNING ||
			last.GetCause() != "user not trusted" || !strings.Contains(last.GetFix(), "trusted-users") {
			t.Errorf("trust: %v", last)
		}
	})
}

func TestPingNamesWhatFails(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name                string
		harm                func(m *fakeMachine)
		timeout             time.Duration
		before              int // steps of ssh that go well
		step, cause, detail string
	}{
		{"host unknown", func(m *fakeMachine) {
			m.ssh.FailDials(&net.DNSError{Err: "no such host", Name: "m1", IsNotFound: true})
		},
			patience, 1, "resolve", "host unknown", "no such host"},
		{"refused", func(m *fakeMachine) { m.ssh.FailDials(errors.New("no route to host")) }, patience, 1, "connect", "unreachable", "no route"},
		{"timeout", func(m *fakeMachine) { m.ssh.HangDials(true) }, time.Second, 1, "connect", "timeout", "no answer within 1s"},
		{"silent sshd", func(m *fakeMachine) { m.ssh.MuteDials(true) }, time.Second, 2, "handshake", "timeout", "no answer within 1s"},
		{"noise", func(m *fakeMachine) { m.noise = "Hi\x1b[2J\n" }, patience, 6, "find nix", "shell noise", `the remote side printed "Hi\x1b[2J\n" before`},
		{"no sessions", func(m *fakeMachine) { m.ssh.RefuseExec(true) }, patience, 5, "open session", "session refused", "refuses to run"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := oneMachine("ssh-ng")
			m.late = true
			s := newSiteWith(t, siteConfig{machines: []*fakeMachine{m}, prepare: func(*site) { tt.harm(m) }})
			steps, err := s.ping(&dispatchv1.PingRequest{Machine: "m1", Timeout: durationpb.New(tt.timeout)})
			if err != nil || len(steps) == 0 {
				t.Fatalf("Ping = %v, %v", steps, err)
			}
			last := steps[len(steps)-1]
			if diff := cmp.Diff(sshSteps[:tt.before], names(steps[:len(steps)-1])); diff != "" {
				t.Errorf("steps before (-want +got):\n%s", diff)
			}
			if last.GetVerdict() != dispatchv1.PingVerdict_PING_VERDICT_FAILED || last.GetStep() != tt.step || last.GetFix() == "" ||
				last.GetCause() != tt.cause || !strings.Contains(last.GetDetail(), tt.detail) {
				t.Errorf("last step %v, want %q: %q: %q", last, tt.step, tt.cause, tt.detail)
			}
		})
	}
}

func TestPingOfNobody(t *testing.T) {
	t.Parallel()
	s := newSiteWith(t, siteConfig{
		machines: []*fakeMachine{oneMachine("ssh")}, builders: "unix:///x",
	})
	for name, want := range map[string]codes.Code{"m2": codes.NotFound, "ssh://m1?x=1": codes.NotFound, "": codes.NotFound} {
		if steps, err := s.ping(&dispatchv1.PingRequest{Machine: name}); status.Code(err) != want || len(steps) != 0 {
			t.Errorf("Ping(%q) = %v, %v; want %v", name, steps, err, want)
		}
	}
	steps := s.mustPing("unix:///x")
	if steps[0].GetStep() != "machine" || steps[0].GetVerdict() != dispatchv1.PingVerdict_PING_VERDICT_WARNING || !strings.Contains(steps[0].GetDetail(), "stock hook") {
		t.Errorf("a machine of another kind: %v", steps)
	}
}

func TestPingsAreFewAtOnceAndEndWithTheDaemon(t *testing.T) {
	t.Parallel()
	m := oneMachine("ssh")
	s := newSite(t, m)
	m.ssh.HangDials(true)
	before := len(m.ssh.Dials())
	ended := make(chan error)
	for range maxPings + 2 {
		go func() {
			stream, err := s.client.Ping(t.Context(), &dispatchv1.PingRequest{Machine: "m1"})
			for err == nil {
				_, err = stream.Recv()
			}
			ended <- err
		}()
	}
	s.eventually("all that may have begun", func() bool { return len(m.ssh.Dials()) >= before+maxPings })
	s.stop()
	for range maxPings + 2 {
		if err := <-ended; status.Code(err) != codes.Unavailable {
			t.Errorf("a ping ended with %v", err)
		}
	}
	if n := len(m.ssh.Dials()) - before; n != maxPings {
		t.Errorf("%d pings at once, want %d", n, maxPings)
	}
}

func TestProbeRefusesWhatIsNoMachine(t *testing.T) {
	t.Parallel()
	for _, entry := range []string{"", "unix:///x", "ssh://a ; ssh://b", "@/etc/nix/machines", "ssh://mac x - four", "#"} {
		if ok, err := Probe(t.Context(), entry, ProbeOptions{}, func(s ProbeStep) { t.Errorf("%q: step %v", entry, s) }); ok || err == nil {
			t.Errorf("Probe(%q) = %v, %v; want an error", entry, ok, err)
		}
	}
}
